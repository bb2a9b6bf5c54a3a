"""The executor: carries out one rank's program. It does no schedule arithmetic and knows no model.

What lives is what the actions made and have not dropped yet, so memory is bounded by the chunks in flight and not by
the film. Latents are never written in place: another chunk may still read that version as its left context.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol, assert_never

import torch
from torch import Tensor

from longvid.cache.runtime import CacheRuntime
from longvid.errors import RuntimeFailure
from longvid.parallel.actions import (
    Action,
    Admit,
    DropGlobals,
    DropKv,
    DropLatents,
    Edge,
    Encode,
    Finish,
    Forecast,
    Forward,
    Fuse,
    Gate,
    GlobalVersion,
    KvVersion,
    LatentVersion,
    OverlapVersion,
    Recall,
    Step,
)
from longvid.parallel.comm import Header, Incoming
from longvid.parallel.decoding import Decode, Piece
from longvid.parallel.decoding_roles import LEADER_DECODES, DecodingOwners, DecodingParts
from longvid.parallel.mesh import Mesh, lone_mesh
from longvid.parallel.pipeline import SAVE_NOTICE, rank_program
from longvid.parallel.rank_actions import (
    BULKY,
    Border,
    Boundary,
    DecoderState,
    DropBorder,
    Halfway,
    HandOn,
    Hidden,
    KeepState,
    KeptState,
    Look,
    Message,
    Notice,
    Overlap,
    PieceFrames,
    PieceLatents,
    RankAction,
    Receive,
    SaveFilms,
    SaveLatents,
    Seen,
    Send,
    Show,
    Velocity,
    Verdict,
)
from longvid.parallel.snapshot import key_latents
from longvid.parallel.stage import Begun, GatedStage, GlobalStage, KeyLatents, KvSpan, PieceDecoder, Stage, Unit
from longvid.parallel.vin import merge, pack
from longvid.plan import Chunk, ModelFacts, Plan
from longvid.sampler import Forecaster, Sampler, Solver, fuse, guide

LOOK_AHEAD = 32
"""Actions that are read ahead of the one at hand, to post their receives."""


@dataclass(frozen=True)
class Finished:
    """A chunk's finished latents fp32 [C, num_latents, h, w], the receiver's to keep.

    Where several ranks decode, `halfway` is what the others made of them; or, where stages do, `frames` are uint8
    [T, H, W, 3]: as many as the decoder has given.
    """

    chunk: Chunk
    latents: Tensor
    frames: Tensor | None = None
    halfway: Tensor | None = None


@dataclass
class Live:
    """All state of a run. Across the end of a round live latents, solvers and the K/V of cached left context.

    Of latents that other ranks own, `borders` are what is seen as left context. Parts of velocities and `overlaps` are
    of one branch or more each. With a cache, `kept` are the last K/V of each edge of the chunks in flight, which units
    that are left out hand on.
    """

    latents: dict[LatentVersion, Tensor] = field(default_factory=dict)
    borders: dict[LatentVersion, Tensor] = field(default_factory=dict)
    kv: dict[KvVersion, KvSpan] = field(default_factory=dict)
    solvers: dict[int, Solver] = field(default_factory=dict)
    velocity: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)
    overlaps: dict[OverlapVersion, list[Tensor]] = field(default_factory=dict)
    hidden: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    kept: dict[tuple[int, Edge], KvSpan] = field(default_factory=dict)
    begun: dict[tuple[int, int], Begun] = field(default_factory=dict)
    left_out: set[tuple[int, int]] = field(default_factory=set)
    tokens: dict[GlobalVersion, Tensor] = field(default_factory=dict)
    brought: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """Global tokens that units bring along from the stage before."""
    halfway: dict[int, Tensor] = field(default_factory=dict)
    """Chunks on their way through the decoder."""
    seen: dict[LatentVersion, Tensor] = field(default_factory=dict)
    """What global tokens see of each chunk's key latents, packed: see `longvid.parallel.vin`."""
    finished: dict[int, Tensor] = field(default_factory=dict)
    """On the leader, finished latents of chunks that are not shown yet."""
    pieces: dict[Piece, Tensor] = field(default_factory=dict)
    """On other ranks, latents that are to be decoded here."""
    frames: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """What was decoded, by chunk and the first latent of its piece."""


class DecoderPart(Protocol):
    """Some of the decoder's layers, or some rows in all of them."""

    def hand_on(self, chunk: Chunk, x: Tensor) -> Tensor:
        """What they make of a chunk's finished latents, or of what the part before them made."""
        ...

    def shape(self, chunk: Chunk) -> tuple[Sequence[int], torch.dtype]:
        """Of what the part before them makes of a chunk; the first number says nothing."""
        ...


KEPT = -1
"""The round of K/V that a checkpoint holds because a cache keeps them."""


class Saver(Protocol):
    """Keeps the state of a run at the end of a round, on every rank."""

    def is_due(self, done: int) -> bool:
        """Asked on the leader at the end of every round: whether the state should be saved soon."""
        ...

    def save_kv(self, done: int, kv: dict[KvVersion, KvSpan]) -> None:
        """This rank's K/V that live on after round `done`."""
        ...

    def save_latents(self, done: int, latents: dict[LatentVersion, Tensor], solvers: dict[int, Solver]) -> None:
        """An owner's latents and solvers."""
        ...

    def save_films(self, done: int) -> None:
        """On the leader, behind `save_latents`: all chunks that finished until the end of that round are handed out."""
        ...


class Prompter(Protocol):
    """Changes prompts while a film is made, on every rank."""

    def is_due(self) -> bool:
        """Asked on the leader at the end of every round: whether there is a new prompt."""
        ...

    def announce(self, at: int, plan: Plan) -> None:
        """On the leader: have it ready for all ranks at the end of round `at`."""
        ...

    def change(self, at: int, plan: Plan) -> Plan:
        """The plan for the rounds after `at`: none but prompts may differ."""
        ...


OnAction = Callable[[RankAction, int, int], None]
"""Called after an action with the nanoseconds (time.monotonic_ns) at which it began and ended."""


@dataclass
class Executor:
    """Runs schedules on one rank. `noise` gives a chunk's first latents, fp32 [C, num_latents, h, w].

    `guidance` scales the difference between the two branches, if there are two; it may have one value a step.
    `latent_size` is (h, w). Where the model takes one timestep a chunk (`facts.per_token_timesteps` False), left
    context is given the chunk's.
    """

    stage: Stage
    sampler: Sampler
    noise: Callable[[Chunk], Tensor]
    facts: ModelFacts
    latent_size: tuple[int, int]
    guidance: float | Sequence[float] = 1.0
    mesh: Mesh = field(default_factory=lone_mesh)
    buffers: int = 2
    sharing: range = range(0)
    """Layers of the stage, counted in it, that read how the scene before ended."""
    recalled: Tensor | None = None
    """The last latents of the film that goes on, fp32 [C, as many as left context, h, w]; on ranks of stage 0."""
    cache: CacheRuntime | None = None
    decoding: DecodingParts | None = None
    decoder: PieceDecoder | None = None
    """Where stages decode, how that is dealt out, and what this rank has for it."""
    owners: DecodingOwners = LEADER_DECODES
    """Who decodes with the leader; `part` is what this rank does of it, if there are several."""
    part: DecoderPart | None = None
    shown: Callable[[Finished], Finished] = lambda finished: finished
    """On the leader: what a film shows of finished latents."""
    saver: Saver | None = None
    prompter: Prompter | None = None
    on_action: OnAction | None = None
    on_value: Callable[[RankAction, Tensor], None] | None = None
    """Called with every hidden state, velocity and latents that this rank makes."""

    current: RankAction | None = None
    """The action at hand, for whoever watches this rank."""
    live: Live = field(default_factory=Live)
    """The state of the run at hand."""
    _save_at: int = -1
    _latents_saved_at: int = -1
    """The last round whose latents were saved: none are of the film's last one."""
    _prompt_at: int = -SAVE_NOTICE - 1

    def run(
        self,
        actions: Iterable[Action],
        plan: Plan,
        on_unit: Callable[[Step], None] | None = None,
        live: Live | None = None,
        done: int = -1,
    ) -> Iterator[Finished]:
        """Carry out a schedule; or what is left of it after round `done`, with the values of that moment in `live`.

        On the leader, yields each chunk as it finishes, in the order of the film, and calls `on_unit` after every
        unit's step. On other ranks it yields nothing. Raises RuntimeFailure when latents stop being finite, and when
        another rank is lost. Closing the iterator early releases everything.
        """
        live = self.live = live or Live()
        self._save_at, self._latents_saved_at, self._prompt_at = -1, -1, -SAVE_NOTICE - 1
        for action, incoming in self._with_receives(actions, plan, done):
            if self.prompter and isinstance(action, Boundary):
                plan = self._with_new_prompt(action.round, self.prompter, plan)
            self.current = action
            start = time.monotonic_ns()
            finished = self._act(action, incoming, plan, live)
            if self.on_action:
                self.on_action(action, start, time.monotonic_ns())
            if finished:
                yield finished
            if on_unit and isinstance(action, Step):
                on_unit(action)
        self.mesh.comm.flush()

    def _with_receives(
        self, actions: Iterable[Action], plan: Plan, done: int
    ) -> Iterator[tuple[RankAction, Incoming | None]]:
        """The rank's program, with receives posted ahead: of hidden states, `buffers` at once from each rank."""
        whole = rank_program(actions, self.mesh.topology, self.mesh.rank, self.decoding, self.owners)
        program = (action for action in whole if action.round > done)
        ahead: deque[tuple[RankAction, Incoming | None]] = deque()
        posted: Counter[int] = Counter()
        for action in chain(program, [None]):
            while ahead and (action is None or len(ahead) >= LOOK_AHEAD or not self._may_post(action, posted)):
                ready, incoming = ahead.popleft()
                yield ready, incoming
                if isinstance(ready, Receive) and isinstance(ready.message, BULKY):
                    posted[ready.source] -= 1
            if isinstance(action, Receive):
                if isinstance(action.message, BULKY):
                    posted[action.source] += 1
                ahead.append((action, self._post(action, plan)))
            elif action is not None:
                ahead.append((action, None))

    def _post(self, action: Receive, plan: Plan) -> Incoming:
        message, comm = action.message, self.mesh.comm
        if _is_made(message):
            made = (0, plan.height, plan.width, 3) if isinstance(message, PieceFrames) else (0,)
            return comm.receive(action.source, made, torch.uint8, is_sized=True, on_host=True)
        shape, dtype = self._shape(message, plan)
        return comm.receive(action.source, shape, dtype, is_sized=self._is_sized(message))

    def _may_post(self, action: RankAction, posted: Counter[int]) -> bool:
        if not isinstance(action, Receive) or not isinstance(action.message, BULKY):
            return True
        return posted[action.source] < self.buffers

    def _act(  # noqa: C901 - one match over all actions
        self, action: RankAction, incoming: Incoming | None, plan: Plan, live: Live
    ) -> Finished | None:
        match action:
            case Admit(chunk=i):
                live.latents[LatentVersion(i, 0)] = self.noise(plan.chunks[i])
                if self.mesh.is_owner:
                    live.solvers[i] = self.sampler.new_solver()
            case Look(encode=encode, own=own):
                live.seen.clear()  # what was found for others alone
                for version in own:
                    keys = self._key_latents(encode, [version], plan.chunks, live)
                    live.seen[version] = pack(*self._global_stage().look(keys))
            case Encode():
                live.tokens[action.tokens] = self._encode(action, plan.chunks, live)
            case Recall(latents=version):
                assert self.recalled is not None, f"{action}: there is no film to go on with"
                live.latents[version] = self.recalled
            case Gate():
                self._gate(action, plan, live)
            case Forward():
                self._forward(action, plan, live)
            case Forecast():
                """Its step has no velocity, and asks the solver for one."""
            case Fuse():
                self._fuse(action, live)
            case Step():
                self._step(action, plan, live)
            case Finish(latents=version):
                live.solvers.pop(version.chunk, None)  # that of another owner's chunk is there
                if self.mesh.is_leader and self.decoding:
                    live.finished[version.chunk] = live.latents[version]
                elif self.mesh.is_leader:
                    halfway = live.halfway.pop(version.chunk, None)
                    return Finished(plan.chunks[version.chunk], live.latents[version].clone(), halfway=halfway)
            case HandOn(latents=version):
                assert self.part is not None
                x = live.halfway.pop(version.chunk) if version.chunk in live.halfway else live.latents[version]
                made = self.part.hand_on(plan.chunks[version.chunk], x)
                if not self.owners.by_rows:
                    live.halfway[version.chunk] = made
            case DropLatents(latents=version):
                del live.latents[version]
            case DropKv(kv=kv):
                del live.kv[kv]
            case DropBorder(latents=version):
                del live.borders[version]
            case DropGlobals(tokens=tokens):
                del live.tokens[tokens]
            case Send():
                self._send(action, plan, live)
            case Receive():
                assert incoming is not None
                self._receive(action, incoming, live)
            case Boundary():
                self._boundary(action, live)
            case SaveLatents():
                self._save_latents(action, live)
            case Decode(piece=piece):
                self._decode(piece, plan, live)
            case KeepState(film=film):
                if len(state := self._kept_state(action)):
                    self._piece_decoder().keep(film, state)
            case Show(chunk=i):
                parts = sorted(key for key in live.frames if key[0] == i)
                frames = torch.cat([live.frames.pop(part) for part in parts])
                return Finished(plan.chunks[i], live.finished.pop(i).clone(), frames)
            case SaveFilms():
                if self.saver and self._latents_saved_at == action.round:
                    self.saver.save_films(action.round)
            case _:
                assert_never(action)
        return None

    # ---------------------------------------------------------------------------------------------------------- units

    @torch.no_grad()
    def _forward(self, action: Forward, plan: Plan, live: Live) -> None:
        unit = i, k = action.chunk, action.step
        live.left_out.discard((i, k - 1))
        tokens = self._tokens(action, live)
        begun, is_left_out = live.begun.pop(unit, None), unit in live.left_out
        if self.cache and is_left_out and not self.cache.at(k).span:
            live.kv |= {version: live.kept[i, version.edge] for version in action.store}
            return
        if begun:
            output = self._gated_stage().go_on(begun, is_left_out=is_left_out)
        else:
            output = self.stage.forward(self._unit(action, plan.chunks, live))
        live.brought.pop(unit, None)
        assert len(output.kv) == len(action.store), f"{action}: the stage kept {len(output.kv)} spans"
        live.kv |= dict(zip(action.store, output.kv, strict=True))
        if self.cache:
            self._keep(action, live)
        if output.hidden is not None:
            live.hidden[unit] = output.hidden if tokens is None else _with_tokens(output.hidden, tokens)
        elif output.velocity is not None and self.mesh.place.seq == 0:
            # The other ranks of a sequence have the same, and nobody to give it to.
            velocity = output.velocity
            if action.overlap:
                count = velocity.shape[2] - plan.chunks[i].num_latents
                live.overlaps.setdefault(action.overlap, []).append(velocity[:, :, :count])
                velocity = velocity[:, :, count:]
            live.velocity[unit] = [velocity]
        if self.on_value:
            made = output.hidden if output.hidden is not None else output.velocity
            assert made is not None
            self.on_value(action, made)

    @torch.no_grad()
    def _gate(self, action: Gate, plan: Plan, live: Live) -> None:
        """Come as far as the gate. The leader decides, by what all ranks that hold the prompt's branch see."""
        i, k, mesh = action.forward.chunk, action.forward.step, self.mesh
        begun = self._gated_stage().begin(self._unit(action.forward, plan.chunks, live))
        live.begun[i, k] = begun
        if begun.probe is None:
            return
        assert self.cache
        sums = self.cache.judge(i, k, begun.probe)
        parts = mesh.seq.all_gather(sums, [sums.shape] * mesh.seq.size)
        if mesh.is_owner:
            is_left_out = self.cache.decide(i, torch.stack(parts).sum(0))
            self.cache.note(i, is_left_out=is_left_out)
            if is_left_out:
                live.left_out.add((i, k))

    def _encode(self, action: Encode, chunks: Sequence[Chunk], live: Live) -> Tensor:
        """A shot's global tokens: of its key latents, or of what they see of each chunk's, if that was found before."""
        stage, was_seen = self._global_stage(), action.latents[0] in live.seen
        keys = self._key_latents(action, () if was_seen else action.latents, chunks, live)
        if was_seen:
            return stage.conclude(merge([live.seen.pop(version) for version in action.latents]), keys.prompts)
        return stage.encode(keys)

    def _key_latents(
        self, action: Encode, versions: Sequence[LatentVersion], chunks: Sequence[Chunk], live: Live
    ) -> KeyLatents:
        """The key latents of some chunks; how far back they are, and the prompts of all in flight, are the shot's."""
        stage, values, times, at = self._global_stage(), [], [], []
        for version in versions:
            chunk = chunks[version.chunk]
            found = key_latents(chunk, stage.key_spacing)
            values.append(live.latents[version][:, found])
            times += [self.sampler.timestep(version.version)] * len(found)
            at += [chunk.start + latent for latent in found]
        newest = action.latents[-1]
        told = [chunks[z.chunk] for z in action.latents if z == newest or z.version < self.sampler.num_steps]
        blends = [blend for chunk in told for blend in chunk.prompts[-chunk.num_latents :]]
        of_all = (chunks[z.chunk] for z in action.latents)
        last = max((c.start + latent for c in of_all for latent in key_latents(c, stage.key_spacing)), default=0)
        places = [last - place for place in at]
        return KeyLatents(
            torch.cat(values, dim=1) if values else torch.empty(0),
            torch.tensor(times, dtype=torch.float32),
            torch.tensor(places, dtype=torch.float32),
            tuple(dict.fromkeys(prompt for blend in blends for prompt in (blend.a, blend.b))),
        )

    def _tokens(self, action: Forward, live: Live) -> Tensor | None:
        """What global tokens a unit's layers read: those of its round, as the first stage made them."""
        if action.tokens is None:
            return None
        if self.mesh.is_first:
            return live.tokens[action.tokens][: self._num_branches(action.step)]
        return live.brought.get((action.chunk, action.step))

    def _global_stage(self) -> GlobalStage:
        assert isinstance(self.stage, GlobalStage), "a schedule with global tokens needs stages that read them"
        return self.stage

    def _gated_stage(self) -> GatedStage:
        assert isinstance(self.stage, GatedStage), "a schedule with gates needs stages that stop there"
        return self.stage

    def _keep(self, action: Forward, live: Live) -> None:
        """Keep the K/V of a unit for those after it, until the chunk's last step."""
        for version in action.store:
            if version.edge != "scene":  # those are not shared under a cache that leaves layers out
                live.kept[action.chunk, version.edge] = live.kv[version]
        if action.step == self.sampler.num_steps - 1:
            for edge in ("first", "last"):
                live.kept.pop((action.chunk, edge), None)

    def _unit(self, action: Forward, chunks: Sequence[Chunk], live: Live) -> Unit:
        """Own latents, behind the last latents of the left context if that is recomputed, each at its own level."""
        i, k, chunk = action.chunk, action.step, chunks[action.chunk]
        levels, before = [k] * chunk.num_latents, 0
        if isinstance(action.left, LatentVersion):
            before = chunk.num_left
            levels = [action.left.version if self.facts.per_token_timesteps else k] * before + levels
        latents = live.latents[LatentVersion(i, k)] if self.mesh.is_first else None
        if latents is not None and isinstance(action.left, LatentVersion):
            left = live.borders[action.left] if action.left in live.borders else live.latents[action.left]
            latents = torch.cat([left[:, -before:], latents], dim=1)
        times = [self.sampler.timestep(level) for level in levels]

        def span(kv: KvVersion) -> slice:
            if kv.edge == "first":
                return slice(before, before + chunks[i - 1].num_right)
            if kv.edge == "scene" and chunk.scene_end:
                return slice(before + chunk.scene_end.first, before + chunk.scene_end.stop)
            return slice(len(levels) - chunks[i + 1].num_left, len(levels))

        return Unit(
            chunk=chunk,
            step=k,
            timesteps=torch.tensor(times, dtype=torch.float32),
            latent_size=self.latent_size,
            latents=latents,
            hidden=None if self.mesh.is_first else live.hidden.pop((i, k)),
            left=live.kv[action.left] if isinstance(action.left, KvVersion) else None,
            right=live.kv[action.right] if action.right else None,
            store=tuple(span(kv) for kv in action.store),
            is_left_out=(i, k) in live.left_out,
            kept=tuple(live.kept[i, kv.edge] for kv in action.store if (i, kv.edge) in live.kept),
            num_branches=self._num_branches(k),
            num_overlap=before if action.overlap else 0,
            tokens=self._tokens(action, live),
            shared=live.kv[action.shared] if action.shared else None,
            stores_scene=any(kv.edge == "scene" for kv in action.store),
            sharing=self.sharing,
        )

    def _fuse(self, action: Fuse, live: Live) -> None:
        """A gate may have left out either of the two: then there is nothing to fuse."""
        parts, others = live.velocity.get((action.chunk, action.step)), live.overlaps.pop(action.overlap, None)
        if parts and others:
            live.velocity[action.chunk, action.step] = [fuse(torch.cat(parts), torch.cat(others))]

    @torch.no_grad()
    def _step(self, action: Step, plan: Plan, live: Live) -> None:
        i, k = action.chunk, action.step
        sample = live.latents[LatentVersion(i, k)]
        solver, parts = live.solvers[i], live.velocity.pop((i, k), [])
        if parts:
            branches = torch.cat(parts) if len(parts) > 1 else parts[0]
            assert branches.shape[1:] == sample.shape, f"{action}: velocity {branches.shape[1:]} of {sample.shape}"
            velocity = self._guided(branches.to(sample.device), solver, k, sample)
        else:
            velocity = _forecaster(solver).forecast(k)
        latents = solver.step(velocity, k, sample)
        assert latents.data_ptr() != sample.data_ptr(), "a solver must leave its sample as it is"
        if not torch.isfinite(latents).all():
            raise RuntimeFailure(
                f"latents of chunk {i} are not finite after step {k + 1} of {self.sampler.num_steps} "
                f"({self._place(plan.chunks[i], plan)})"
            )
        live.latents[LatentVersion(i, k + 1)] = latents
        if self.on_value:
            self.on_value(action, latents)

    def _guided(self, branches: Tensor, solver: Solver, step: int, sample: Tensor) -> Tensor:
        """The velocity by one or two branches; a negative's pass that was left out is made up for."""
        negative: Tensor | None = branches[1] if len(branches) == 2 else None
        if self._skips_negative(step):
            negative = _forecaster(solver).negative(step, sample)
        elif negative is not None and isinstance(solver, Forecaster):
            solver.learn_negative(negative, step, sample)
        if negative is None:
            return branches[0]
        scale = self.guidance if isinstance(self.guidance, float | int) else self.guidance[step]
        return guide(branches[0], negative, scale)

    def _num_branches(self, step: int) -> int:
        return 1 if self._skips_negative(step) else self.stage.num_branches

    def _skips_negative(self, step: int) -> bool:
        is_alone = self.mesh.topology.guidance == 1 and self.stage.num_branches == 1
        return self.cache is not None and self.cache.at(step).skips_negative and not is_alone

    # ------------------------------------------------------------------------------------------------------- decoding

    def _decode(self, piece: Piece, plan: Plan, live: Live) -> None:
        """Here the peers of a stage would join in, each with some rows of the latents."""
        latents, chunk = range(piece.first, piece.stop), plan.chunks[piece.chunk]
        values = live.pieces.pop(piece) if piece in live.pieces else self._part(piece, plan, live)
        frames = self._piece_decoder().decode(piece.film, chunk, latents, values)
        live.frames[piece.chunk, piece.first] = frames

    def _part(self, piece: Piece, plan: Plan, live: Live) -> Tensor:
        finished = Finished(plan.chunks[piece.chunk], live.finished[piece.chunk])
        return self.shown(finished).latents[:, piece.first : piece.stop]

    def _kept_state(self, action: KeepState | KeptState) -> Tensor:
        """Where a film's decoder is, if a checkpoint or the film's end needs it."""
        decoder = self._piece_decoder()
        is_needed = decoder.keeps_endings if action.is_end else self._save_at == action.round
        state = decoder.packed(action.film) if is_needed else _NOTHING.to(torch.uint8)
        if action.is_end:
            decoder.forget(action.film)
        return state

    def _piece_decoder(self) -> PieceDecoder:
        assert self.decoder is not None, "a rank that decodes needs a decoder"
        return self.decoder

    # ------------------------------------------------------------------------------------------------------- messages

    def _send(self, action: Send, plan: Plan, live: Live) -> None:
        message, comm = action.message, self.mesh.comm
        unit = _unit_of(message)
        is_sized = self._is_sized(message)
        header = Header(*unit, self._save_at, unit in live.left_out, prompt_at=self._prompt_at)
        match message:
            case Hidden():
                hidden = live.hidden.pop(unit, _NOTHING)
                comm.send(header, hidden, action.to, window=self.buffers, is_sized=is_sized)
            case Velocity():
                [velocity] = live.velocity.pop(unit, [_NOTHING])
                comm.send(header, velocity, action.to, is_sized=is_sized)
            case Overlap(chunk=i, step=k):
                [overlap] = live.overlaps.pop(OverlapVersion(i, k), [_NOTHING])
                comm.send(header, overlap, action.to, is_sized=is_sized)
            case Seen(latents=seen):
                comm.send(header, torch.stack([live.seen[version] for version in seen]), action.to)
            case Verdict() | Notice():
                comm.send(header, _NOTHING, action.to)
            case Halfway(chunk=i):
                comm.send(header, live.halfway.pop(i), action.to, window=self.buffers, is_sized=is_sized)
            case Border(latents=version):
                count = plan.chunks[version.chunk + 1].num_left
                comm.send(header, live.latents[version][:, -count:], action.to)
            case LatentVersion() as version:
                comm.send(header, live.latents[version], action.to)
            case _:
                comm.send(header, self._of_decoding(message, plan, live), action.to, is_sized=_is_made(message))

    def _of_decoding(self, message: Message, plan: Plan, live: Live) -> Tensor:
        """What a message between stages that decode holds."""
        match message:
            case PieceLatents(piece=piece):
                return self._part(piece, plan, live)
            case PieceFrames(piece=piece):
                return live.frames.pop((piece.chunk, piece.first))
            case DecoderState(piece=piece):
                state = self._piece_decoder().packed(piece.film)
                self._piece_decoder().forget(piece.film)
                return state
            case KeptState(is_asked=False):
                return self._kept_state(message)
        return _NOTHING

    def _receive(self, action: Receive, incoming: Incoming, live: Live) -> None:
        header, value = incoming.wait()
        message = action.message
        if (header.chunk, header.step) != _unit_of(message):
            raise RuntimeFailure(
                f"{message} was due from rank {action.source}, but c{header.chunk} k{header.step} came"
            )
        self._save_at = max(self._save_at, header.save_at)
        self._prompt_at = max(self._prompt_at, header.prompt_at)
        unit = header.chunk, header.step
        if header.is_left_out and isinstance(message, Hidden | Velocity | Verdict):
            live.left_out.add(unit)
        match message:
            case Hidden() if len(value):
                if message.with_tokens:
                    count = value.shape[1] - self._global_stage().num_globals
                    live.brought[unit] = value[: self._num_branches(unit[1]), count:]
                    value = value[:, :count].contiguous()
                live.hidden[unit] = value
            case Velocity() if len(value):
                live.velocity.setdefault(unit, []).append(value)
            case Overlap(chunk=i, step=k) if len(value):
                live.overlaps.setdefault(OverlapVersion(i, k), []).append(value)
            case Border(latents=version):
                live.borders[version] = value
            case Seen(latents=seen):
                live.seen |= dict(zip(seen, value, strict=True))
            case LatentVersion():
                live.latents[message] = value
            case _:
                self._take_for_decoding(message, value, live)

    def _take_for_decoding(self, message: Message, value: Tensor, live: Live) -> None:
        match message:
            case PieceLatents(piece=piece):
                live.pieces[piece] = value
            case Halfway(chunk=i):
                live.halfway[i] = value
            case PieceFrames(piece=piece):
                live.frames[piece.chunk, piece.first] = value
            case DecoderState(piece=piece):
                self._piece_decoder().go_on(piece.film, value)
            case KeptState(film=film, is_asked=False) if len(value):
                self._piece_decoder().keep(film, value)

    def _shape(self, message: Message, plan: Plan) -> tuple[Sequence[int], torch.dtype]:
        if isinstance(message, Verdict | Notice | KeptState | DecoderState | PieceFrames):
            return _NOTHING.shape, _NOTHING.dtype
        if isinstance(message, Seen):
            heads, tokens, width = self._global_stage().part_shape
            return (len(message.latents), heads, tokens, width + 1), torch.float32
        if isinstance(message, PieceLatents | Halfway):
            return self._shape_for_decoding(message, plan)
        chunk = plan.chunks[message.chunk]
        if isinstance(message, Hidden):
            num_latents = chunk.num_latents + chunk.num_left * message.with_left
            shape, dtype = self.stage.hidden_shape(num_latents, self.latent_size)
            if self.cache and self.cache.regions:
                num_own = shape[1] * chunk.num_latents // num_latents
                shape = (shape[0], self.cache.num_rows(shape[1], num_own, shape[2], message.step), shape[2])
            if message.with_tokens:
                shape = (shape[0], shape[1] + self._global_stage().num_globals, shape[2])
            return shape, dtype
        count = chunk.num_latents
        if isinstance(message, Overlap):
            count = chunk.num_left
        elif isinstance(message, Border):
            count = plan.chunks[message.chunk + 1].num_left
        shape = (self.facts.latent_channels, count, *self.latent_size)
        if isinstance(message, Velocity | Overlap):
            return (self.stage.num_branches, *shape), torch.float32
        return shape, torch.float32

    def _shape_for_decoding(self, message: PieceLatents | Halfway, plan: Plan) -> tuple[Sequence[int], torch.dtype]:
        if isinstance(message, Halfway):
            assert self.part is not None
            return self.part.shape(plan.chunks[message.chunk])
        count = message.piece.stop - message.piece.first
        return (self.facts.latent_channels, count, *self.latent_size), torch.float32

    def _is_sized(self, message: Message) -> bool:
        """With a cache that leaves layers out, a unit's messages may be empty, or hold more than hidden states.

        What the decoder makes of a shot's first chunk has fewer frames.
        """
        if isinstance(message, Halfway):
            return True
        return self.cache is not None and isinstance(message, Hidden | Velocity | Overlap | Verdict)

    # ------------------------------------------------------------------------------------------------------- decisions

    def _with_new_prompt(self, done: int, prompter: Prompter, plan: Plan) -> Plan:
        """The plan after a round. The leader decides as it does for checkpoints, and all ranks hear of it in time."""
        notice = SAVE_NOTICE if self.mesh.topology.num_ranks > 1 else 0
        if self.mesh.is_leader and self._prompt_at <= done - max(1, notice) and prompter.is_due():
            self._prompt_at = done + notice
            prompter.announce(self._prompt_at, plan)
        return prompter.change(done, plan) if self._prompt_at == done else plan

    def _boundary(self, action: Boundary, live: Live) -> None:
        if not self.saver:
            return
        if self.mesh.is_leader and self.saver.is_due(action.round) and self._save_at <= action.round - SAVE_NOTICE:
            # A lone rank has nobody to tell.
            self._save_at = action.round + (SAVE_NOTICE if self.mesh.topology.num_ranks > 1 else 0)
        if self._save_at == action.round:
            kept = {KvVersion(chunk, KEPT, edge): kv for (chunk, edge), kv in live.kept.items()}
            self.saver.save_kv(action.round, kept | {version: live.kv[version] for version in action.kv})

    def _save_latents(self, action: SaveLatents, live: Live) -> None:
        if self.saver and self._save_at == action.round:
            latents = {version: live.latents[version] for version in action.latents}
            solvers = {i: live.solvers[i] for i in {version.chunk for version in latents} & live.solvers.keys()}
            self.saver.save_latents(action.round, latents, solvers)
            self._latents_saved_at = action.round
            if self.mesh.is_leader and not self.decoding:
                self.saver.save_films(action.round)

    def _place(self, chunk: Chunk, plan: Plan) -> str:
        shot, film = plan.shots[chunk.shot], plan.film_of(chunk)
        index = shot.index - plan.films[film].shots.start
        name = f"film {film + 1} of {len(plan.films)}, shot {index}" if plan.joined else f"shot {index}"
        first = self.facts.grid.num_frames(chunk.start)
        end = min(self.facts.grid.num_frames(chunk.start + chunk.num_latents), shot.num_frames)
        return f"{name}, frames {shot.first_frame + first}-{shot.first_frame + end - 1}"


_NOTHING = torch.empty(0)


def _is_made(message: Message) -> bool:
    """Whether a message holds what a decoder made: bytes on the CPU, of which its sender alone knows how many."""
    return isinstance(message, PieceFrames | DecoderState) or (isinstance(message, KeptState) and not message.is_asked)


def _with_tokens(hidden: Tensor, tokens: Tensor) -> Tensor:
    """Hidden states with the global tokens behind them; each branch may have two rows."""
    return torch.cat([hidden, tokens.repeat(len(hidden) // len(tokens), 1, 1)], dim=1)


def _forecaster(solver: Solver) -> Forecaster:
    assert isinstance(solver, Forecaster), "a schedule that leaves work out needs solvers that make up for it"
    return solver


def _unit_of(message: Message) -> tuple[int, int]:
    """Chunk and step, as its header says them."""
    match message:
        case LatentVersion(chunk=i, version=k):
            return i, k
        case Notice(round=n):
            return -1, n
        case Halfway(chunk=i):
            return i, -1
        case PieceLatents(piece=piece) | PieceFrames(piece=piece) | DecoderState(piece=piece):
            return piece.chunk, piece.first
        case KeptState(film=film, round=n):
            return film, n
        case _:
            return message.chunk, message.step
