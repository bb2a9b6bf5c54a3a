"""The engine: puts script, plan, schedule, model, decoder and writer together. The composition root."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longvid.cache.make import make_cache, make_caching
from longvid.cache.runtime import CacheRuntime
from longvid.cache.settings import plan_cache
from longvid.checkpoint import (
    CheckpointSaver,
    Ended,
    Holder,
    LocalBulletin,
    Saved,
    load_checkpoint,
    load_ending,
)
from longvid.decode import FilmDecoders, StageDecoders, push
from longvid.decoding_parts import LayersPart, RowsPart, decoding_owners
from longvid.ending import Ending
from longvid.errors import InputError, Interrupted, LongvidError, Preempted
from longvid.events import ChunkDone, Event, Notice, Started
from longvid.ledger import Ledger
from longvid.live import LivePrompter, Wish, Wishes
from longvid.models.checkpoint import (
    Checkpoint,
    Condition,
    FamilyStage,
    FilmInputs,
    PartsDecoder,
    Prompt,
    RowsDecoder,
    SharedRowsDecoder,
    StageOptions,
)
from longvid.models.costs import measure_costs
from longvid.models.families import require
from longvid.models.loader import checkpoint_of, open_checkpoint, open_loading
from longvid.models.parts import ModelPart
from longvid.models.prompt_cache import open_prompts
from longvid.models.vin_config import find_vin
from longvid.noise import chunk_noise
from longvid.notices import notices
from longvid.orders import Orders
from longvid.parallel.comm import DistComm, StoreBulletin, broadcast, disconnect, gather
from longvid.parallel.decode_program import StageDecoding
from longvid.parallel.decoding import Decoding, Shares, deal_work
from longvid.parallel.executor import DecoderPart, Executor, Finished, OnAction
from longvid.parallel.mesh import Mesh, describe
from longvid.parallel.partition import Costs
from longvid.parallel.pipeline import place_of
from longvid.parallel.rank_actions import name_of
from longvid.parallel.rehearsal import rehearse_schedule, stage_costs
from longvid.parallel.schedule import (
    ChunkRules,
    QueueRules,
    first_round,
    last_round,
    make_schedule,
    num_finished,
    num_rounds,
    num_units,
    rules_of,
)
from longvid.parallel.sequence import make_sequence
from longvid.plan import Chunk, FilmSpan, ModelFacts, Plan, make_plan, sharing_layers
from longvid.preemption import Preemption
from longvid.ranks import join_mesh, pick_device, set_threads
from longvid.rounds import RoundCounter
from longvid.sampler import Sampler
from longvid.script import Scene, Script, load_script
from longvid.settings import Settings, load_settings
from longvid.sparsity.make import make_attention
from longvid.sparsity.runtime import SparseRuntime
from longvid.together import Clip, FilmSavers, FilmSet, Job, join_live, join_memory
from longvid.trace import Trace, summary, summary_text, write_trace

Frames = NDArray[np.uint8]
OnEvent = Callable[[Event], None]
T = TypeVar("T")


@dataclass
class _Tools:
    """What goes along with one render."""

    trace: Trace | None = None
    ledger: Ledger | None = None
    decoders: FilmDecoders | StageDecoders | None = None
    decoding: StageDecoding | None = None
    """How decoding is dealt out, where stages do it."""
    saver: FilmSavers | None = None
    saved: Sequence[Saved | None] = ()
    done: int = -1
    """The last round that all films have behind them."""
    ended: Ended | None = None
    """What the film goes on from."""
    lasts: dict[int, Tensor] = field(default_factory=dict)
    """On the leader, the last finished latents of each film's shot at hand: see `_last_of_shot`."""
    prompter: LivePrompter | None = None
    preemption: Preemption = field(default_factory=Preemption)


def ignore_event(event: Event) -> None:
    """The default callback."""


class FilmStream(Iterator[Frames]):
    """A film's frames, piece by piece, uint8 [T, height, width, 3]; what is still to come may be changed."""

    def __init__(self, frames: Generator[Frames, None, None], wishes: Wishes | None) -> None:
        self._frames, self._wishes = frames, wishes

    def __next__(self) -> Frames:
        return next(self._frames)

    def prompt(self, text: str, negative: str | None = None) -> None:
        """Have the scene that is on follow another prompt, from the next chunk that can take it to the scene's end.

        From any thread; on a rank other than the leader it does nothing. The event PromptChanged says from which frame.
        """
        text = " ".join(text.split())
        if not text:
            raise InputError("a prompt must say something")
        if self._wishes is None:
            raise InputError(
                "with schedule=chunks all chunks are at one step, and none can take another prompt: use queue"
            )
        self._wishes.ask(Wish(text, negative))

    def close(self) -> None:
        """Stop early."""
        self._frames.close()


class Engine:
    """A loaded model that renders storyboards, one after the other.

    Under a launcher (torchrun, ``longvid render --ranks``) there is an engine on every rank, and all make the same
    calls. The *leader* (rank 0) reads storyboards, yields frames and writes films; on the others ``stream`` yields
    nothing.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: Settings,
        mesh: Mesh,
        *,
        attention: SparseRuntime | None = None,
        cache: CacheRuntime | None = None,
    ) -> None:
        self.settings, self.mesh = settings, mesh
        self.device = pick_device(settings)
        self.facts: ModelFacts = checkpoint.facts
        """What planning needs to know of the model: sizes, native frame rate, limits."""
        self._root = checkpoint.root
        self._executor: Executor | None = None
        self._inputs = FilmInputs(())
        """What the stage was given for the film at hand."""
        self._num_streams = 0
        self._behind_the_end: Frames
        """Of the chunk that was decoded last, frames that its shot does not have."""
        self.costs: Costs | None = None
        """Measured where layers are split over stages."""
        self.cache_plan = plan_cache(settings.cache, settings.sampler.steps, self.facts.num_layers)
        require(self.facts, settings, self.cache_plan)
        self.attention = attention or make_attention(settings, self.facts, checkpoint.root)
        """The policy of sparse attention at work; None: dense."""
        self.cache = cache
        """What leaves layers out, if anything does."""
        self._vin = find_vin(settings, self.facts, checkpoint.root)
        self._make_sampler = checkpoint.make_sampler
        self.wrap_sampler: Callable[[Sampler], Sampler] = _as_it_is
        """What stands around every film's sampler, for whoever wants to see velocities."""
        self.watch_action: OnAction | None = None
        """Called after every action of a render that is not traced."""
        self._sampler = self._new_sampler(num_tokens=1)
        """Of the film at hand: noise levels may depend on its size."""
        self._boundary = checkpoint.boundary
        self._orders = Orders(
            settings,
            self.facts,
            self._root,
            self._vin,
            self.device,
            mesh.topology,
            self.attention is not None,
            self._sampler_of,
        )
        dtype = getattr(torch, settings.runtime.dtype)
        self._loading = open_loading(checkpoint, settings, self.device, mesh.seq)
        self.shares: Shares | None = None
        """Where stages decode: how that is dealt out."""
        self._owners_decode = decoding_owners(settings, self.facts, mesh.topology, self.device)
        if mesh.is_leader:
            self._prompts = open_prompts(checkpoint, settings.memory, dtype, self.device)
        if mesh.is_leader or self._has_part:
            self._load_decoder(checkpoint, dtype)
        if mesh.is_leader:
            self.vae = self._decoder.vae
            """The video VAE; on the leader alone."""
            self._images = checkpoint.load_images(self._decoder, dtype, self.device)
        self._stage = self._load_stage(checkpoint, dtype)

    @classmethod
    def load(
        cls,
        model: Any = None,
        *,
        preset: str | None = None,
        overrides: Sequence[str] = (),
        film: str | Path | None = None,
    ) -> Engine:
        """Load a model once, for any number of films.

        ``model`` is a known name (``mini``), a directory in diffusers' format, or a loaded
        pipeline of diffusers, whose transformer the engine then takes over; None: what the settings say.
        ``preset`` and ``overrides`` (such as ``sampler.steps=4``) are those of the command line; with ``film``, whose
        state was kept, settings and model are that film's.
        Raises InputError for an unknown or damaged model, for wrong settings, and for a mesh that does not fit.
        """
        if isinstance(model, str | Path):
            overrides = [*overrides, f"model.path={model}"]
        settings = load_settings(preset, overrides, Ending.read(Path(film)).settings if film else None)
        set_threads(settings)
        is_pipeline = model is not None and not isinstance(model, str | Path)
        checkpoint = checkpoint_of(model) if is_pipeline else open_checkpoint(settings.model.path)
        return cls(checkpoint, settings, join_mesh(settings, checkpoint.facts, checkpoint.configs))

    def _new_sampler(self, num_tokens: int) -> Sampler:
        return self.wrap_sampler(make_caching(self._make_sampler(self.settings.sampler, num_tokens), self.cache_plan))

    def _sampler_of(self, plan: Plan) -> Sampler:
        """A film's: noise levels may depend on the tokens of its largest unit."""
        per_latent = self.facts.grid.tokens_per_latent(plan.width, plan.height)
        return self._new_sampler(per_latent * max(chunk.num_left + chunk.num_latents for chunk in plan.chunks))

    @property
    def _has_part(self) -> bool:
        """Whether this rank decodes together with others: some of the layers, or some rows."""
        size = self._owners_decode.size
        return self.mesh.is_owner and self.mesh.place.chunk < size and size > 1

    def _take_part(self) -> None:
        size = self._owners_decode.size
        if self._owners_decode.by_rows:
            cast(SharedRowsDecoder, self._decoder).share_rows(self.mesh.owners)
        else:
            cast(PartsDecoder, self._decoder).take_part(size - 1 - self.mesh.place.chunk, size)

    def _part_in_decoding(self, images: Sequence[Condition | None], latent_size: tuple[int, int]) -> DecoderPart | None:
        if not self._has_part:
            return None
        if self._owners_decode.by_rows:
            return RowsPart(self._decoder)
        is_first = self.mesh.place.chunk + 1 == self._owners_decode.size
        return LayersPart(cast(PartsDecoder, self._decoder), images, latent_size, is_first)

    def _load_stage(self, checkpoint: Checkpoint, dtype: torch.dtype) -> FamilyStage:
        """This rank's layers, dealt out by what they cost."""
        mesh = self.mesh
        layers = range(checkpoint.facts.num_layers)
        if mesh.topology.stage > 1:
            measured = measure_costs(checkpoint, self._decoder, self.settings, self.device) if mesh.is_leader else None
            self.costs = broadcast(measured)
            assert self.costs is not None
            bounds, self.shares = self._dealt_work()
            layers = bounds[mesh.place.stage]
        if self._decodes and not mesh.is_leader:
            self._load_decoder(checkpoint, dtype)
        self.layers = layers
        self.cache = self.cache or make_cache(self.cache_plan, layers, mesh.topology.guidance)
        part = ModelPart(layers, mesh.is_first, mesh.is_last)
        branches = range(self.settings.sampler.num_branches)
        options = StageOptions(
            branches=branches if mesh.topology.guidance == 1 else [branches[mesh.place.guidance]],
            sequence=make_sequence(self.settings.sequence.backend, mesh.ulysses, mesh.ring, mesh.seq),
            attention=self.attention,
            cache=self.cache,
            loading=self._loading,
            embedded_guidance=self.settings.sampler.embedded_guidance,
            vin=self._vin,
            linear=self.settings.runtime.linear,
        )
        return checkpoint.load_stage(part, dtype, self.device, options)

    def _load_decoder(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._decoder = checkpoint.load_decoder(dtype, self.device)
        if self.settings.memory.vae_rows:
            cast(RowsDecoder, self._decoder).split_rows(self.settings.memory.vae_rows)
        if self._has_part:
            self._take_part()

    def _dealt_work(self) -> tuple[tuple[range, ...], Shares | None]:
        """Each stage's layers, and what it decodes."""
        assert self.costs is not None, "costs are measured where there are several stages"
        chosen = self.settings
        return deal_work(self.costs, self.mesh.topology.stage, chosen.mesh.decode)

    @property
    def _decodes(self) -> bool:
        """Whether this rank has a decoder."""
        place = self.mesh.place
        is_first = place.chunk == place.guidance == place.seq == 0
        return self.mesh.is_leader or bool(self.shares and is_first and self.shares.of_stages[place.stage])

    def _decoding(self, plan: Plan) -> StageDecoding | None:
        rules, steps = rules_of(self.settings), self.settings.sampler.steps
        return StageDecoding(Decoding.of(self.shares, plan, rules, steps)) if self.shares else None

    def plan(self, story: str | Path | Script) -> Plan:
        """The plan of a storyboard (a path, or a loaded Script): shots, chunks, prompts, noise keys."""

        def read() -> Plan:
            script = story if isinstance(story, Script) else load_script(story)
            return make_plan(script, self.settings, self.facts)

        return self._on_leader(read)

    def _on_leader(self, work: Callable[[], T]) -> T:
        """What the leader makes, on every rank; and what it raises of our errors."""
        if self.mesh.topology.num_ranks == 1:
            return work()
        result: T | LongvidError | None = None
        if self.mesh.is_leader:
            try:
                result = work()
            except LongvidError as error:
                result = error
        result = broadcast(result)
        if isinstance(result, LongvidError):
            raise result
        assert result is not None
        return result

    def stream(
        self, story: str | Path | Script, on_event: OnEvent = ignore_event, *, early_steps: int = 0
    ) -> FilmStream:
        """Render, and yield the film's frames as chunks finish: uint8 [T, height, width, 3], in order.

        While it goes on, ``FilmStream.prompt`` changes what comes: chunks that have taken at most ``early_steps``
        denoising steps take the new prompt, those that are further keep theirs. Raises InputError for a wrong
        storyboard before any work, RuntimeFailure for latents that are not finite. Close the iterator to stop early.
        """
        plan, wishes = self.plan(story), Wishes()
        tools = self._tools(plan)
        if not 0 <= early_steps < self.settings.sampler.steps:
            raise InputError(f"early_steps must be 0 to {self.settings.sampler.steps - 1}, not {early_steps}")
        if self.settings.schedule != "chunks":
            tools.prompter = self._prompter(wishes, early_steps, on_event)
        return FilmStream(self._frames(plan, on_event, tools), wishes if tools.prompter else None)

    def _tools(self, plan: Plan, **with_them: Any) -> _Tools:
        """What goes along with a render, and what decodes it."""
        tools = _Tools(**with_them)
        tools.decoding = self._decoding(plan)
        if not self._decodes:
            return tools
        films = FilmDecoders(self._decoder)
        if tools.decoding is None:
            tools.decoders = films if self.mesh.is_leader else None
            return tools
        before = enumerate(num_finished(plan, self.settings, tools.done))
        resting = {i for i, count in before if tools.decoding.plan.resting(i, count) == self.mesh.place.stage}
        keeps = self.settings.output.keep_state or plan.first_chunk > 0
        tools.decoders = StageDecoders(films, plan, frozenset(resting), keeps)
        return tools

    def _prompter(self, wishes: Wishes, early_steps: int, on_event: OnEvent) -> LivePrompter:
        self._num_streams += 1
        is_alone = self.mesh.topology.num_ranks == 1
        return LivePrompter(
            wishes,
            LocalBulletin() if is_alone else StoreBulletin(),
            self._encode_prompts,
            self._add_prompt,
            QueueRules.of(self.settings),
            self.facts.grid,
            early_steps,
            str(self._num_streams),
            self.settings.runtime.timeout_s,
            on_event if self.mesh.is_leader else None,
        )

    def _frames(self, plan: Plan, on_event: OnEvent, tools: _Tools) -> Generator[Frames, None, None]:
        with contextlib.closing(self._stream(plan, on_event, tools)) as clips:
            yield from (clip.frames for clip in clips if len(clip.frames))

    def render(
        self,
        story: str | Path | Script,
        path: str | Path,
        on_event: OnEvent = ignore_event,
        *,
        resume: bool = False,
        trace: str | Path | None = None,
        ledger: str | Path | None = None,
        preemption: Preemption | None = None,
    ) -> Path:
        """Render a storyboard to an H.264 film at ``path`` (.mp4) and return the path.

        With ``output.keep_state`` what ``extend`` needs is kept beside it.

        While it runs, ``PATH.longvid/film.m3u8`` plays what is finished, and every ``runtime.checkpoint_s`` seconds
        its state is saved there. With ``resume`` a render that ended early goes on from it, to the same bytes as one
        that never did; InputError says what changed if it cannot. ``trace`` is a file for a Perfetto trace of every
        rank's work, ``ledger`` one for hashes of what this rank makes. Raises Interrupted on Ctrl-C, after saving what
        is finished as a film of its own, and Preempted after saving its state, once ``preemption`` was asked for.
        """
        film = Path(path)
        job = self._on_leader(lambda: self._orders.film(story, film, resume))
        self._render(self._orders.join([job]), on_event, trace, ledger, preemption)
        return film

    def extend(
        self,
        film: str | Path,
        scenes: Sequence[Scene],
        path: str | Path | None = None,
        on_event: OnEvent = ignore_event,
        *,
        resume: bool = False,
        trace: str | Path | None = None,
        ledger: str | Path | None = None,
        preemption: Preemption | None = None,
    ) -> Path:
        """Add scenes to a finished film whose state was kept, as a film at ``path`` (None: in its place).

        Its frames keep their bytes. What follows sees its last latents, clean (Mask²DiT's extension), and the decoder
        goes on where it was. A scene that begins with a cut is a new shot. The engine must have the film's model and
        settings: ``Engine.load(film=film)``. Raises InputError where the state is missing, or something changed.
        The rest is as with ``render``; the state is kept again.
        """
        target = Path(path or film)
        job = self._on_leader(lambda: self._orders.longer(Path(film), tuple(scenes), target, resume))
        self._render(self._orders.join([job]), on_event, trace, ledger, preemption)
        return target

    def render_films(
        self,
        stories: Sequence[str | Path | Script],
        paths: Sequence[str | Path],
        on_event: OnEvent = ignore_event,
        *,
        resume: bool = False,
        trace: str | Path | None = None,
        ledger: str | Path | None = None,
        preemption: Preemption | None = None,
    ) -> list[Path]:
        """Render storyboards of one size and frame rate to a film each, side by side through the stages.

        Every film is what `render` makes of it; ``mesh.films`` says how many are under way at once. With ``resume``
        films that are complete are left as they are, those with a checkpoint go on from it, and the others begin. All
        else is as in `render`.
        """
        films = [Path(path) for path in paths]
        to_make = self._on_leader(lambda: list(self._orders.films_to_make(stories, films, resume)))
        if to_make:
            self._render(self._orders.join(to_make), on_event, trace, ledger, preemption)
        return films

    def _render(
        self,
        job: Job,
        on_event: OnEvent,
        trace: str | Path | None,
        ledger: str | Path | None,
        preemption: Preemption | None,
    ) -> None:
        tools = self._tools(job.plan, done=job.done, preemption=preemption or Preemption())
        if trace:
            tools.trace = Trace(self.mesh.rank, describe(self.mesh.topology, self.mesh.rank))
        if ledger:
            tools.ledger = Ledger(
                Path(ledger) if self.mesh.is_leader else Path(f"{ledger}.{self.mesh.rank}"), self.layers
            )
        holder = self._holder(job.plan)
        tools.saved = [
            load_checkpoint(film.path, film.manifest, holder, self.device) if film.manifest else None
            for film in job.films
        ]
        tools.ended = next(
            (load_ending(film.path, film.ending, self.device) for film in job.films if film.ending), None
        )
        if not self.mesh.is_leader:
            self._go_on_decoding(tools)
        with FilmSet(job, tools.decoders, on_event, self._orders.keep_ending, tools.lasts) as films:
            if self.mesh.is_leader:
                films.open(tools.saved, self.settings.output, tools.ended)
            if self._root is not None:
                films.saver = tools.saver = self._make_savers(films, holder, on_event, tools.preemption)
                tools.preemption.is_awaited = True
            self._write(films, on_event, tools)
        if trace and tools.trace:
            self._write_trace(Path(trace), tools.trace, job.plan, on_event)

    def _go_on_decoding(self, tools: _Tools) -> None:
        """Put the decoder of a rank besides the leader where checkpoints say."""
        for index, saved in enumerate(tools.saved):
            state = saved.decoder if saved else tools.ended and tools.ended.decoder
            if state and self._has_part:
                self._decoder.load_state(state)
            elif state and tools.decoders:
                tools.decoders.load(index, state)

    def _holder(self, plan: Plan) -> Holder:
        owners = self._owners(plan)

        def reader(chunk: int) -> int | None:
            has_reader = chunk + 1 < len(owners) and plan.chunks[chunk + 1].num_left > 0
            return owners[chunk + 1] if has_reader else None

        branches = self._stage.branches
        return Holder(
            self.mesh,
            self.layers,
            branches,
            self.attention,
            self.cache,
            owners.__getitem__,
            reader,
            self._decoder if self._has_part else None,
            self._decodes,
        )

    def _make_savers(self, films: FilmSet, holder: Holder, on_event: OnEvent, preemption: Preemption) -> FilmSavers:
        spans = films.job.plan.films
        bulletin = LocalBulletin() if self.mesh.topology.num_ranks == 1 else StoreBulletin()
        savers = [
            CheckpointSaver(
                film.path,
                holder,
                bulletin,
                chunks=span.chunks,
                fingerprint=film.fingerprint,
                film_state=partial(films.state, index),
                on_notice=lambda text: on_event(Notice(text)),
                interval_s=self.settings.runtime.checkpoint_s,
                timeout_s=self.settings.runtime.timeout_s,
                preemption=preemption,
            )
            for index, (film, span) in enumerate(zip(films.job.films, spans, strict=True))
        ]
        return FilmSavers(spans, [last_round(span, self.settings) for span in spans], savers)

    def _write(self, films: FilmSet, on_event: OnEvent, tools: _Tools) -> None:
        """Stream the films to their writers."""
        try:
            with contextlib.ExitStack() as stack:
                if films.saver:
                    stack.callback(films.saver.close)
                if tools.ledger:
                    stack.callback(tools.ledger.close)
                for clip in self._stream(films.job.plan, on_event, tools):
                    began = time.monotonic_ns()
                    films.add(clip)
                    if tools.trace:
                        tools.trace.add("write", f"{len(clip.frames)} frames", began, time.monotonic_ns())
            films.finish_ended()
        except KeyboardInterrupt:
            if tools.preemption.is_asked:
                raise Preempted(films.what_is_saved()) from None
            raise Interrupted(films.what_is_left()) from None
        except Preempted:
            raise Preempted(films.what_is_saved() if self.mesh.is_leader else "") from None

    def _write_trace(self, path: Path, own: Trace, plan: Plan, on_event: OnEvent) -> None:
        traces = [own] if self.mesh.topology.num_ranks == 1 else gather(own)
        if self.mesh.is_leader:
            found = {**summary(traces), "predicted_bubble": self.predicted_bubble(plan)}
            found["costs"] = asdict(self.costs) if self.costs else None
            write_trace(path, traces, found)
            on_event(Notice(summary_text(found)))

    def predicted_bubble(self, plan: Plan) -> float | None:
        """The share of the ranks' time without work, by a rehearsal with measured costs; None on a single stage."""
        if self.costs is None:
            return None
        topology = self.mesh.topology
        bounds, shares = self._dealt_work()
        latents = self.settings.queue.chunk_latents if shares else None
        cost = stage_costs(self.costs, topology, bounds, self.settings.sampler.steps, self.cache_plan.share, latents)
        buffers = 2 * self.settings.mesh.buffers  # under way, and posted by the receiver
        decoding = self._decoding(plan)
        return rehearse_schedule(lambda: make_schedule(plan, self.settings), topology, buffers, cost, decoding).bubble

    def denoise(self, plan: Plan, on_event: OnEvent = ignore_event, tools: _Tools | None = None) -> Iterator[Finished]:
        """Run the plan's schedule; on the leader, yields each chunk's finished latents fp32 [C, F, h, w] in order."""
        tools = tools or _Tools()
        images = self._prepare(plan, spare_prompts=2 if tools.prompter else 0)
        self._sampler = self._sampler_of(plan)
        topology, buffers = self.mesh.topology, self.settings.mesh.buffers
        if self.mesh.is_leader and topology.num_ranks > 1:
            rehearse_schedule(
                lambda: make_schedule(plan, self.settings),
                topology,
                buffers,
                decoding=tools.decoding,
                owners=self._owners_decode,
            )
        width, height = self.facts.grid.latent_size(plan.width, plan.height)
        self._executor = Executor(
            self._stage,
            self._sampler,
            self._noise(plan),
            self.facts,
            (height, width),
            guidance=self._guidance(),
            mesh=self.mesh,
            buffers=buffers,
            sharing=self._sharing(),
            recalled=tools.ended.last if tools.ended else None,
            cache=self.cache,
            decoding=tools.decoding,
            decoder=tools.decoders if isinstance(tools.decoders, StageDecoders) else None,
            owners=self._owners_decode,
            part=self._part_in_decoding(images, (height, width)),
            shown=lambda finished: self._shown(finished, images),
            saver=tools.saver,
            prompter=tools.prompter,
            on_action=tools.trace.on_action if tools.trace else self.watch_action,
            on_value=tools.ledger.on_value if tools.ledger else None,
        )
        saved = tools.saved or [None] * len(plan.films)
        if self.attention:
            self.attention.load_state(join_memory(plan.films, [film.memory if film else {} for film in saved]))
        if self.cache:
            self.cache.load_state(join_memory(plan.films, [film.cached if film else {} for film in saved]))
        rounds = RoundCounter(plan, self.settings, on_event, tools.done, self._units_of_last_round(plan))
        actions = make_schedule(plan, self.settings)
        live = join_live(plan.films, saved, self._sampler)
        try:
            for finished in self._executor.run(actions, plan, rounds.on_unit, live, tools.done):
                film = plan.film_of(finished.chunk)
                tools.lasts[film] = self._last_of_shot(finished, tools.lasts.get(film))
                yield finished if tools.decoding else self._shown(finished, images)
        finally:
            self._executor = None

    def _shown(self, finished: Finished, images: Sequence[Condition | None]) -> Finished:
        """What the film shows of finished latents."""
        image = images[finished.chunk.shot]
        return replace(finished, latents=image.show(finished.latents, finished.chunk)) if image else finished

    def _last_of_shot(self, finished: Finished, before: Tensor | None) -> Tensor:
        """The shot's last finished latents, as many as there is left context; `before` are those so far."""
        known = [before] if finished.chunk.start and before is not None else []
        whole, count = torch.cat([*known, finished.latents], dim=1), max(1, self.settings.queue.context_latents)
        return whole[:, -count:].clone()

    def _units_of_last_round(self, plan: Plan) -> int:
        """Those of them that the leader steps."""
        rules, owners = rules_of(self.settings), self._owners(plan)
        if isinstance(rules, ChunkRules):
            return sum(owners[i] == 0 for i in rules.groups(len(plan.chunks))[-1])
        last = first_round(plan, self.settings) + num_rounds(plan, self.settings) - 1
        return num_units(plan, self.settings, last) - num_units(plan, self.settings, last - 1)

    def _owners(self, plan: Plan) -> list[int]:
        """The place on the `chunk` axis that has each chunk."""
        rules, num_chunks = rules_of(self.settings), len(plan.chunks)
        if not isinstance(rules, ChunkRules):
            return [0] * num_chunks
        size = self.mesh.topology.chunk
        return [place_of(i, group, size) for group in rules.groups(num_chunks) for i in group]

    def describe(self, rank: int) -> str:
        """A rank and its place in the mesh, for people."""
        return describe(self.mesh.topology, rank)

    def doing(self) -> str:
        """What this rank is doing, for people; from any thread."""
        executor = self._executor
        action = executor.current if executor else None
        return name_of(action) if action else ""

    def abort(self, error: Exception) -> None:
        """From any thread: have this rank's waits for others raise this error."""
        if isinstance(self.mesh.comm, DistComm):
            self.mesh.comm.abort(error)

    def leave(self) -> None:
        """Part from the other ranks; the engine is of no use then."""
        disconnect()

    def _prepare(self, plan: Plan, spare_prompts: int) -> Sequence[Condition | None]:
        """Give the stage prompts and images. Returns every shot's image.

        Prompts that come later are at most so many more in a chunk: its own, and one in its left context.
        """
        texts = [*plan.prompts, *(plan.negatives if self.settings.sampler.num_branches == 2 else ())]
        prompts = self._on_leader(lambda: self._prompts.encode(texts))
        prompts = [prompt.to(self.device) for prompt in prompts]
        files = dict.fromkeys(shot.image for shot in plan.shots if shot.image)
        encoded = self._on_leader(lambda: [self._encode_image(file, plan) for file in files])
        images = {file: image.to(self.device) for file, image in zip(files, encoded, strict=True)}
        of_shot = [images[shot.image] if shot.image else None for shot in plan.shots]
        most = max(len({x for blend in chunk.prompts for x in (blend.a, blend.b)}) for chunk in plan.chunks)
        count = len(plan.prompts)
        self._inputs = FilmInputs(prompts[:count], prompts[count:], of_shot, most + spare_prompts, plan.fps)
        self._stage.prepare(self._inputs)
        return of_shot

    def _encode_prompts(self, texts: Sequence[str]) -> list[Prompt]:
        return self._prompts.encode(texts)

    def _add_prompt(self, prompt: Prompt, negative: Prompt) -> None:
        """Give the stage one more prompt, behind those that it has."""
        prompts = [*self._inputs.prompts, prompt.to(self.device)]
        negatives = [*self._inputs.negatives, negative.to(self.device)] if self._inputs.negatives else ()
        self._inputs = replace(self._inputs, prompts=prompts, negatives=negatives)
        self._stage.prepare(self._inputs)

    def _encode_image(self, file: Path, plan: Plan) -> Condition:
        assert self._images is not None, "a plan for a model without images has none"
        return self._images.encode(file, plan.width, plan.height)

    def _sharing(self) -> range:
        """The layers of this rank's stage that share how a scene ended."""
        shared, first = sharing_layers(self.facts.num_layers), self.layers.start
        return range(max(shared.start - first, 0), max(shared.stop - first, 0))

    def _guidance(self) -> tuple[float, ...]:
        """The guidance of every step: with two experts each has its own."""
        chosen, boundary = self.settings.sampler, self._boundary
        low = chosen.guidance if chosen.guidance_low is None else chosen.guidance_low
        levels = map(self._sampler.timestep, range(self._sampler.num_steps))
        return tuple(chosen.guidance if level >= boundary else low for level in levels)

    def _stream(self, plan: Plan, on_event: OnEvent, tools: _Tools) -> Generator[Clip]:
        if self.mesh.is_leader:
            for text in notices(plan, self.settings, self.facts, self.attention, self.costs, self.device):
                on_event(Notice(text))
            rounds, shape = num_rounds(plan, self.settings), (plan.width, plan.height, plan.fps)
            on_event(Started(plan.num_frames, len(plan.chunks), rounds, *shape, num_films=len(plan.films)))
        chunks_done = num_finished(plan, self.settings, tools.done)
        frames_done = [
            self._frames_until(plan, film, count) for film, count in zip(plan.films, chunks_done, strict=True)
        ]
        for finished in self.denoise(plan, on_event, tools):
            chunk, film = finished.chunk, plan.film_of(finished.chunk)
            began = time.monotonic_ns()
            if isinstance(tools.decoders, FilmDecoders):
                tools.decoders.at(film)
            frames = self.decode(plan, finished)
            if tools.trace and not tools.decoding:
                tools.trace.add("decode", f"c{chunk.index}", began, time.monotonic_ns())
            chunks_done[film] += 1
            frames_done[film] = self._frames_until(plan, plan.films[film], chunks_done[film])
            is_last = chunk.index == plan.films[film].chunks[-1]
            yield Clip(film, frames, self._behind_the_end, is_last=is_last)
            on_event(ChunkDone(sum(chunks_done), len(plan.chunks), sum(frames_done)))

    def decode(self, plan: Plan, finished: Finished) -> Frames:
        """Frames of a chunk, uint8 [T, H, W, 3]; chunks must come in film order.

        Every shot starts a decode of its own; its last chunk is trimmed to the frames asked for.
        """
        chunk, shot = finished.chunk, plan.shots[finished.chunk.shot]
        made = finished.frames
        if finished.halfway is not None:
            if chunk.start == 0:
                self._decoder.reset()
            made = cast(PartsDecoder, self._decoder).hand_on(finished.halfway)
        if made is None:
            made = push(self._decoder, plan, chunk, range(chunk.num_latents), finished.latents)
        frames: Frames = made.numpy()
        left = max(0, shot.num_frames - self._decoder.frames_after(chunk.start))
        self._behind_the_end = frames[left:]
        return frames[:left]

    def _frames_until(self, plan: Plan, film: FilmSpan, num_chunks: int) -> int:
        """Frames of a film's first chunks."""
        if not num_chunks:
            return 0
        chunk = plan.chunks[film.chunks[num_chunks - 1]]
        shot = plan.shots[chunk.shot]
        return shot.first_frame + min(self.facts.grid.num_frames(chunk.start + chunk.num_latents), shot.num_frames)

    def _noise(self, plan: Plan) -> Callable[[Chunk], Tensor]:
        width, height = self.facts.grid.latent_size(plan.width, plan.height)
        channels = self.facts.latent_channels
        return lambda chunk: chunk_noise(chunk, channels, height, width).to(self.device)


def _as_it_is(sampler: Sampler) -> Sampler:
    return sampler
