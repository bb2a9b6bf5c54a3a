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
from typing import assert_never

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
    Encode,
    Finish,
    Forecast,
    Forward,
    Fuse,
    Gate,
    LatentVersion,
    OverlapVersion,
    Recall,
    Step,
)
from longvid.parallel.comm import Header, Incoming
from longvid.parallel.decisions import Decisions, Prompter, Saver
from longvid.parallel.decoding import Decode
from longvid.parallel.decoding_roles import LEADER_DECODES, DecodingOwners, DecodingParts
from longvid.parallel.lending import NOTHING_LENT, Lending
from longvid.parallel.mesh import Mesh, lone_mesh
from longvid.parallel.message_shapes import NOTHING, MessageShapes, is_made, unit_of
from longvid.parallel.piece_decoding import PieceDecoding
from longvid.parallel.pipeline import rank_program
from longvid.parallel.rank_actions import (
    BULKY,
    Border,
    Boundary,
    DropBorder,
    Halfway,
    HandOn,
    Hidden,
    KeepState,
    Loan,
    Look,
    Notice,
    Overlap,
    PieceFrames,
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
from longvid.parallel.run_state import Finished, Live
from longvid.parallel.stage import DecoderPart, PieceDecoder, Stage, gated_stage, global_stage
from longvid.parallel.stage_inputs import StageInputs
from longvid.parallel.vin import merge, pack
from longvid.plan import Chunk, ModelFacts, Plan
from longvid.sampler import Forecaster, Sampler, Solver, fuse, guide

LOOK_AHEAD = 32
"""Actions that are read ahead of the one at hand, to post their receives."""

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
    lending: Lending = NOTHING_LENT
    """Which units are computed for the owners of other chunks."""
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
    _decisions: Decisions = field(init=False, repr=False, compare=False)
    _shapes: MessageShapes = field(init=False, repr=False, compare=False)
    _inputs: StageInputs = field(init=False, repr=False, compare=False)
    _pieces: PieceDecoding = field(init=False, repr=False, compare=False)

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
        self._begin()
        for action, incoming in self._with_receives(actions, plan, done):
            if isinstance(action, Boundary):
                plan = self._decisions.with_new_prompt(action.round, plan)
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

    def _begin(self) -> None:
        """What a run has beside its values."""
        self._decisions = Decisions(self.mesh, self.saver, self.prompter, films_come_later=bool(self.decoding))
        self._shapes = MessageShapes(self.stage, self.facts, self.latent_size, self.cache, self.part)
        self._inputs = StageInputs(
            self.stage, self.sampler, self.facts, self.latent_size, self.mesh, self.cache, self.sharing
        )
        self._pieces = PieceDecoding(self.decoder, self.shown, self._decisions)

    def _with_receives(
        self, actions: Iterable[Action], plan: Plan, done: int
    ) -> Iterator[tuple[RankAction, Incoming | None]]:
        """The rank's program, with receives posted ahead: of hidden states, `buffers` at once from each rank."""
        whole = rank_program(actions, self.mesh.topology, self.mesh.rank, self.decoding, self.owners, self.lending)
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
        if is_made(message):
            made = (0, plan.height, plan.width, 3) if isinstance(message, PieceFrames) else (0,)
            return comm.receive(action.source, made, torch.uint8, is_sized=True, on_host=True)
        shape, dtype = self._shapes.of(message, plan)
        return comm.receive(action.source, shape, dtype, is_sized=self._shapes.is_sized(message))

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
                    keys = self._inputs.key_latents(encode, [version], plan.chunks, live)
                    live.seen[version] = pack(*global_stage(self.stage).look(keys))
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
                self._decisions.boundary(action, live)
            case SaveLatents():
                self._decisions.save_latents(action, live)
            case Decode(piece=piece):
                self._pieces.decode(piece, plan, live)
            case KeepState():
                self._pieces.keep_state(action)
            case Show():
                return self._pieces.show(action, plan, live)
            case SaveFilms():
                self._decisions.save_films(action)
            case _:
                assert_never(action)
        return None

    # ---------------------------------------------------------------------------------------------------------- units

    @torch.no_grad()
    def _forward(self, action: Forward, plan: Plan, live: Live) -> None:
        unit = i, k = action.chunk, action.step
        live.left_out.discard((i, k - 1))
        tokens = self._inputs.tokens(action, live)
        begun, is_left_out = live.begun.pop(unit, None), unit in live.left_out
        if self.cache and is_left_out and not self.cache.at(k).span:
            live.kv |= {version: live.kept[i, version.edge] for version in action.store}
            return
        if begun:
            output = gated_stage(self.stage).go_on(begun, is_left_out=is_left_out)
        else:
            output = self.stage.forward(self._inputs.unit(action, plan.chunks, live))
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
        begun = gated_stage(self.stage).begin(self._inputs.unit(action.forward, plan.chunks, live))
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
        stage, was_seen = global_stage(self.stage), action.latents[0] in live.seen
        keys = self._inputs.key_latents(action, () if was_seen else action.latents, chunks, live)
        if was_seen:
            return stage.conclude(merge([live.seen.pop(version) for version in action.latents]), keys.prompts)
        return stage.encode(keys)

    def _keep(self, action: Forward, live: Live) -> None:
        """Keep the K/V of a unit for those after it, until the chunk's last step."""
        for version in action.store:
            if version.edge != "scene":  # those are not shared under a cache that leaves layers out
                live.kept[action.chunk, version.edge] = live.kv[version]
        if action.step == self.sampler.num_steps - 1:
            for edge in ("first", "last"):
                live.kept.pop((action.chunk, edge), None)

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
        if self._inputs.skips_negative(step):
            negative = _forecaster(solver).negative(step, sample)
        elif negative is not None and isinstance(solver, Forecaster):
            solver.learn_negative(negative, step, sample)
        if negative is None:
            return branches[0]
        scale = self.guidance if isinstance(self.guidance, float | int) else self.guidance[step]
        return guide(branches[0], negative, scale)

    def _place(self, chunk: Chunk, plan: Plan) -> str:
        shot, film = plan.shots[chunk.shot], plan.film_of(chunk)
        index = shot.index - plan.films[film].shots.start
        name = f"film {film + 1} of {len(plan.films)}, shot {index}" if plan.joined else f"shot {index}"
        first = self.facts.grid.num_frames(chunk.start)
        end = min(self.facts.grid.num_frames(chunk.start + chunk.num_latents), shot.num_frames)
        return f"{name}, frames {shot.first_frame + first}-{shot.first_frame + end - 1}"

    # ------------------------------------------------------------------------------------------------------- messages

    def _send(self, action: Send, plan: Plan, live: Live) -> None:
        message, comm = action.message, self.mesh.comm
        unit = unit_of(message)
        is_sized = self._shapes.is_sized(message)
        header = Header(*unit, self._decisions.save_at, unit in live.left_out, prompt_at=self._decisions.prompt_at)
        match message:
            case Hidden():
                hidden = live.hidden.pop(unit, NOTHING)
                comm.send(header, hidden, action.to, window=self.buffers, is_sized=is_sized)
            case Velocity():
                [velocity] = live.velocity.pop(unit, [NOTHING])
                comm.send(header, velocity, action.to, is_sized=is_sized)
            case Overlap(chunk=i, step=k):
                [overlap] = live.overlaps.pop(OverlapVersion(i, k), [NOTHING])
                comm.send(header, overlap, action.to, is_sized=is_sized)
            case Seen(latents=seen):
                comm.send(header, torch.stack([live.seen[version] for version in seen]), action.to)
            case Verdict() | Notice():
                comm.send(header, NOTHING, action.to)
            case Halfway(chunk=i):
                comm.send(header, live.halfway.pop(i), action.to, window=self.buffers, is_sized=is_sized)
            case Border(latents=version):
                count = plan.chunks[version.chunk + 1].num_left
                comm.send(header, live.latents[version][:, -count:], action.to)
            case (LatentVersion() as version) | Loan(latents=version):
                comm.send(header, live.latents[version], action.to)
            case _:
                comm.send(header, self._pieces.of(message, plan, live), action.to, is_sized=is_made(message))

    def _receive(self, action: Receive, incoming: Incoming, live: Live) -> None:
        header, value = incoming.wait()
        message = action.message
        if (header.chunk, header.step) != unit_of(message):
            raise RuntimeFailure(
                f"{message} was due from rank {action.source}, but c{header.chunk} k{header.step} came"
            )
        self._decisions.hear(header)
        unit = header.chunk, header.step
        if header.is_left_out and isinstance(message, Hidden | Velocity | Verdict):
            live.left_out.add(unit)
        match message:
            case Hidden() if len(value):
                if message.with_tokens:
                    count = value.shape[1] - global_stage(self.stage).num_globals
                    live.brought[unit] = value[: self._inputs.num_branches(unit[1]), count:]
                    value = value[:, :count].contiguous()
                live.hidden[unit] = value
            case Velocity() if len(value):
                live.velocity.setdefault(unit, []).append(value)
            case Overlap(chunk=i, step=k) if len(value):
                live.overlaps.setdefault(OverlapVersion(i, k), []).append(value)
            case Border(latents=version) | Loan(latents=version):
                live.borders[version] = value
            case Seen(latents=seen):
                live.seen |= dict(zip(seen, value, strict=True))
            case LatentVersion():
                live.latents[message] = value
            case _:
                self._pieces.take(message, value, live)


def _with_tokens(hidden: Tensor, tokens: Tensor) -> Tensor:
    """Hidden states with the global tokens behind them; each branch may have two rows."""
    return torch.cat([hidden, tokens.repeat(len(hidden) // len(tokens), 1, 1)], dim=1)


def _forecaster(solver: Solver) -> Forecaster:
    assert isinstance(solver, Forecaster), "a schedule that leaves work out needs solvers that make up for it"
    return solver
