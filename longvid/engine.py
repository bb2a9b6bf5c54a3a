"""The engine: puts script, plan, schedule, model, decoder and writer together. The composition root."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from longvid.cache.make import make_caching
from longvid.cache.runtime import CacheRuntime
from longvid.cache.settings import plan_cache
from longvid.checkpoint import LocalBulletin
from longvid.conditioning import Conditioning
from longvid.decode import FilmDecoders, StageDecoders, push
from longvid.ending import Ending
from longvid.errors import InputError
from longvid.events import ChunkDone, Event, Notice, PromptChanged, Started
from longvid.film_stream import FilmStream, Frames, OnEvent, ignore_event
from longvid.live import LivePrompter, Wishes
from longvid.models.checkpoint import Checkpoint, Condition, PartsDecoder
from longvid.models.families import require
from longvid.models.loader import checkpoint_of, open_checkpoint
from longvid.models.vin_config import find_vin
from longvid.noise import chunk_noise
from longvid.notices import notices, unknown_in
from longvid.orders import Orders
from longvid.parallel.collectives import StoreBulletin, disconnect
from longvid.parallel.comm import DistComm
from longvid.parallel.executor import Executor, OnAction
from longvid.parallel.lending import Lending
from longvid.parallel.mesh import Mesh, describe
from longvid.parallel.rank_actions import name_of
from longvid.parallel.rehearsal import rehearse_schedule, stage_costs
from longvid.parallel.rules import QueueRules
from longvid.parallel.run_state import Finished
from longvid.parallel.schedule import make_schedule, num_finished, num_rounds
from longvid.plan import Chunk, ModelFacts, Plan, make_plan, sharing_layers
from longvid.preemption import Preemption
from longvid.rank_model import RankModel
from longvid.ranks import join_mesh, on_leader, pick_device, set_threads
from longvid.render_tools import Tools, make_tools
from longvid.renderer import Renderer
from longvid.rounds import RoundCounter, frames_until, units_of_last_round
from longvid.sampler import Sampler
from longvid.script import Scene, Script, load_script
from longvid.settings import Settings, load_settings, text_override
from longvid.sparsity.make import make_attention
from longvid.sparsity.runtime import SparseRuntime
from longvid.together import Clip, join_live, join_memory


class Engine:
    """A loaded model that renders storyboards, one after the other, from any thread.

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
        self._executor: Executor | None = None
        self._at_work = threading.Lock()
        """Held while a film is denoised: its prompts, its sampler and its place in the decoder are the engine's."""
        self._num_streams = 0
        self._behind_the_end: Frames
        """Of the chunk that was decoded last, frames that its shot does not have."""
        self.cache_plan = plan_cache(settings.cache, settings.sampler.steps, self.facts.num_layers)
        require(self.facts, settings, self.cache_plan)
        self.attention = attention or make_attention(settings, self.facts, checkpoint.root)
        """The policy of sparse attention at work; None: dense."""
        vin = find_vin(settings, self.facts, checkpoint.root)
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
            checkpoint.root,
            vin,
            self.device,
            mesh.topology,
            self.attention is not None,
            self._sampler_of,
        )
        self._model = RankModel(
            checkpoint,
            settings,
            mesh,
            self.device,
            attention=self.attention,
            cache=cache,
            cache_plan=self.cache_plan,
            vin=vin,
        )
        self._stage, self.layers = self._model.stage, self._model.layers
        self.costs = self._model.costs
        """Measured where layers are split over stages."""
        self.cache = self._model.cache
        """What leaves layers out, if anything does."""
        if mesh.is_leader:
            self.vae = self._model.decoder.vae
            """The video VAE; on the leader alone."""
        self._conditioning = Conditioning(self._model)
        self._renderer = Renderer(self._model, self._orders, self.attention, self._stream, self.predicted_bubble)

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
            overrides = [*overrides, text_override("model.path", str(model))]
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

    def plan(self, story: str | Path | Script) -> Plan:
        """The plan of a storyboard (a path, or a loaded Script): shots, chunks, prompts, noise keys."""

        def read() -> Plan:
            script = story if isinstance(story, Script) else load_script(story)
            return make_plan(script, self.settings, self.facts)

        return on_leader(self.mesh, read)

    def stream(
        self, story: str | Path | Script, on_event: OnEvent = ignore_event, *, early_steps: int = 0
    ) -> FilmStream:
        """Render, and yield the film's frames as chunks finish: uint8 [T, height, width, 3], in order.

        While it goes on, ``FilmStream.prompt`` changes what comes: chunks that have taken at most ``early_steps``
        denoising steps take the new prompt, those that are further keep theirs. Raises InputError for a wrong
        storyboard before any work, and while another film of this engine is under way, RuntimeFailure for latents that
        are not finite. Close the iterator to stop early.
        """
        plan, wishes = self.plan(story), Wishes()
        tools = make_tools(plan, self._model)
        if not 0 <= early_steps < self.settings.sampler.steps:
            raise InputError(f"early_steps must be 0 to {self.settings.sampler.steps - 1}, not {early_steps}")
        if self.settings.schedule != "chunks":
            tools.prompter = self._prompter(wishes, early_steps, on_event)
        return FilmStream(self._frames(plan, on_event, tools), wishes if tools.prompter else None)

    def _prompter(self, wishes: Wishes, early_steps: int, on_event: OnEvent) -> LivePrompter:
        self._num_streams += 1
        is_alone = self.mesh.topology.num_ranks == 1
        return LivePrompter(
            wishes,
            LocalBulletin() if is_alone else StoreBulletin(),
            self._conditioning.encode_prompts,
            self._conditioning.add_prompt,
            QueueRules.of(self.settings),
            self.facts.grid,
            early_steps,
            str(self._num_streams),
            self.settings.runtime.timeout_s,
            self._tell_of_prompts(on_event) if self.mesh.is_leader else None,
        )

    def _tell_of_prompts(self, on_event: OnEvent) -> OnEvent:
        """A callback that says, too, which words of a new prompt the model does not know."""

        def tell(event: Event) -> None:
            on_event(event)
            if isinstance(event, PromptChanged) and (not_known := unknown_in(event.prompt, self.facts)):
                on_event(Notice(not_known))

        return tell

    def _frames(self, plan: Plan, on_event: OnEvent, tools: Tools) -> Generator[Frames, None, None]:
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
        job = on_leader(self.mesh, lambda: self._orders.film(story, film, resume))
        self._renderer.render(self._orders.join([job]), on_event, trace, ledger, preemption)
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
        job = on_leader(self.mesh, lambda: self._orders.longer(Path(film), tuple(scenes), target, resume))
        self._renderer.render(self._orders.join([job]), on_event, trace, ledger, preemption)
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
        if len(stories) != len(films) or len(set(films)) != len(films):
            names = ", ".join(map(str, films))
            raise InputError(f"each of the {len(stories)} storyboards needs a film of its own, not {names or 'none'}")
        to_make = on_leader(self.mesh, lambda: list(self._orders.films_to_make(stories, films, resume)))
        if self.mesh.is_leader:
            for path in sorted(set(films) - {film.path for film in to_make}):
                on_event(Notice(f"{path} is complete: left as it is"))
        if to_make:
            self._renderer.render(self._orders.join(to_make), on_event, trace, ledger, preemption)
        return films

    def predicted_bubble(self, plan: Plan) -> float | None:
        """The share of the ranks' time without work, by a rehearsal with measured costs; None on a single stage."""
        if self.costs is None:
            return None
        topology = self.mesh.topology
        bounds, _ = self._model.dealt_work()
        buffers = 2 * self.settings.mesh.buffers  # under way, and posted by the receiver
        decoding, queue = self._model.decoding(plan), self.settings.queue
        of_pieces: dict[str, Any] = {}
        if decoding:
            chunk_work = queue.chunk_latents * self.facts.decoder_passes.repeated
            of_pieces = {"chunk_work": chunk_work, "work": decoding.plan.work}
        steps, share = self.settings.sampler.steps, self.cache_plan.share
        cost = stage_costs(self.costs, topology, bounds, steps, share, **of_pieces)
        return rehearse_schedule(lambda: make_schedule(plan, self.settings), topology, buffers, cost, decoding).bubble

    def denoise(self, plan: Plan, on_event: OnEvent = ignore_event, tools: Tools | None = None) -> Iterator[Finished]:
        """Run the plan's schedule; on the leader, yields each chunk's finished latents fp32 [C, F, h, w] in order.

        Raises InputError while another film of this engine is under way.
        """
        if not self._at_work.acquire(blocking=False):
            raise InputError(
                "the engine is at work on another film: let its stream end or close it, or load another engine"
            )
        try:
            yield from self._denoise(plan, on_event, tools or Tools())
        finally:
            self._at_work.release()

    def _denoise(self, plan: Plan, on_event: OnEvent, tools: Tools) -> Iterator[Finished]:
        images = self._conditioning.prepare(plan, spare_prompts=2 if tools.prompter else 0)
        self._sampler = self._sampler_of(plan)
        topology, buffers = self.mesh.topology, self.settings.mesh.buffers
        lending = Lending.of(plan, self.settings, topology)
        if self.mesh.is_leader and topology.num_ranks > 1:
            rehearse_schedule(
                lambda: make_schedule(plan, self.settings),
                topology,
                buffers,
                decoding=tools.decoding,
                owners=self._model.owners_decode,
                lending=lending,
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
            owners=self._model.owners_decode,
            part=self._model.part_in_decoding(images, (height, width)),
            lending=lending,
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
        rounds = RoundCounter(
            plan, self.settings, on_event, tools.done, units_of_last_round(plan, self.settings, topology.chunk)
        )
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

    def _stream(self, plan: Plan, on_event: OnEvent, tools: Tools) -> Generator[Clip]:
        if self.mesh.is_leader:
            for text in notices(plan, self.settings, self.facts, self.attention, self.costs, self.device):
                on_event(Notice(text))
            rounds, shape = num_rounds(plan, self.settings), (plan.width, plan.height, plan.fps)
            on_event(Started(plan.num_frames, len(plan.chunks), rounds, *shape, num_films=len(plan.films)))
        chunks_done = num_finished(plan, self.settings, tools.done)
        frames_done = [
            frames_until(plan, film, count, self.facts.grid)
            for film, count in zip(plan.films, chunks_done, strict=True)
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
            frames_done[film] = frames_until(plan, plan.films[film], chunks_done[film], self.facts.grid)
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
                self._model.decoder.reset()
            made = cast(PartsDecoder, self._model.decoder).hand_on(finished.halfway)
        if made is None:
            made = push(self._model.decoder, plan, chunk, range(chunk.num_latents), finished.latents)
        frames: Frames = made.numpy()
        left = max(0, shot.num_frames - self._model.decoder.frames_after(chunk.start))
        self._behind_the_end = frames[left:]
        return frames[:left]

    def _noise(self, plan: Plan) -> Callable[[Chunk], Tensor]:
        width, height = self.facts.grid.latent_size(plan.width, plan.height)
        channels = self.facts.latent_channels
        return lambda chunk: chunk_noise(chunk, channels, height, width).to(self.device)


def _as_it_is(sampler: Sampler) -> Sampler:
    return sampler
