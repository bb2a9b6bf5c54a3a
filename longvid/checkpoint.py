"""Checkpoints of a running render: the state after a round, written while the render goes on, and read to resume it.

Every rank writes one safetensors file; the leader (rank 0) then commits them all by replacing the manifest, and only
then removes the checkpoint before. So at every moment there is one whole checkpoint, the one before or the new one.
"""

from __future__ import annotations

import json
import math
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from longvid.cache.runtime import CacheRuntime
from longvid.decode import join_states
from longvid.ending import Ending
from longvid.errors import InputError, Preempted, RuntimeFailure
from longvid.hls import sync, write_whole
from longvid.manifest import ANEW, ENDING, MANIFEST, Manifest, file_name, state_folder, working_folder
from longvid.parallel.actions import KvVersion, LatentVersion
from longvid.parallel.around import KvPart
from longvid.parallel.mesh import Mesh
from longvid.parallel.run_state import KEPT, Live
from longvid.parallel.stage import KvSpan
from longvid.preemption import Preemption
from longvid.sampler import Sampler, Solver
from longvid.sparsity.policy import Memory
from longvid.sparsity.runtime import SparseRuntime
from longvid.writer import WriterState, segment_name

Tensors = dict[str, Tensor]

GRACE_S = 10.0
"""How long `close` gives the other ranks to end a checkpoint that is under way."""


class StatefulDecoder(Protocol):
    """A decoder, or some layers of one."""

    def state(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Holder:
    """Whose state it is: a rank, and the layers and branches of the whole model of which it keeps K/V.

    Branch 0 follows the prompts, 1 the negatives. `attention` is the policy at work there, if it is not dense, and
    `cache` that of the cache, if it leaves layers out. `owner` says which place on the `chunk` axis has a chunk, and
    `readers` which read latents of it besides.
    """

    mesh: Mesh
    layers: range
    branches: Sequence[int]
    attention: SparseRuntime | None = None
    cache: CacheRuntime | None = None
    owner: Callable[[int], int] = lambda chunk: 0
    readers: Callable[[LatentVersion], set[int]] = lambda latents: set()
    decoder: StatefulDecoder | None = None
    """Its part of the decoder's layers, where it has some and not all."""
    decodes: bool = False
    """Whether a rank besides the leader has a decoder."""

    def has(self, chunk: int) -> bool:
        """Whether this rank has a part in a chunk."""
        return self.owner(chunk) == self.mesh.place.chunk

    def sees(self, latents: LatentVersion) -> bool:
        """Whether it reads latents: those of own chunks, and others that own units are made of."""
        return self.mesh.is_first and self.mesh.place.chunk in {self.owner(latents.chunk), *self.readers(latents)}


@dataclass(frozen=True)
class FilmState:
    """What the leader has of the film besides latents in flight: the decoder's state, the writer's, and the shot's last
    finished latents fp32 [C, as many as left context, h, w], from which a scene that is added later goes on.
    """

    decoder: Mapping[str, Tensor]
    writer: WriterState
    last: Tensor | None = None


@dataclass(frozen=True)
class Saved:
    """A checkpoint as one rank reads it. `round` is the last that was carried out.

    `latents` are on ranks of the first stage, and `borders` those of other ranks' chunks; `solvers` (states, by chunk)
    on owners, `film` on the leader. `memory` is that of the attention's policy, by (chunk, branch, layer), and `cached`
    the cache's.
    """

    round: int
    latents: dict[LatentVersion, Tensor]
    kv: dict[KvVersion, KvSpan]
    borders: dict[LatentVersion, Tensor] = field(default_factory=dict)
    solvers: dict[int, Tensors] = field(default_factory=dict)
    film: FilmState | None = None
    decoder: Tensors = field(default_factory=dict)
    """Where the film's decoder was, on ranks that decode."""
    memory: dict[tuple[int, int, int], Memory] = field(default_factory=dict)
    cached: dict[tuple[int, int, int], Memory] = field(default_factory=dict)

    def live(self, sampler: Sampler) -> Live:
        """What lives on, for the executor."""
        solvers = {chunk: sampler.new_solver() for chunk in self.solvers}
        for chunk, solver in solvers.items():
            solver.load_state(self.solvers[chunk])
        kept = {(v.chunk, v.edge): kv for v, kv in self.kv.items() if v.round == KEPT}
        kv = {version: kv for version, kv in self.kv.items() if version.round != KEPT}
        return Live(latents=dict(self.latents), borders=dict(self.borders), kv=kv, solvers=solvers, kept=kept)


class Bulletin(Protocol):
    """Where ranks tell each other small things, from any thread; what is posted stays."""

    def post(self, key: str, value: str) -> None: ...

    def wait(self, keys: Sequence[str], timeout_s: float) -> list[str] | None:
        """The values of all keys; None where one of them is not posted in that time."""
        ...


class LocalBulletin:
    """That of the ranks of one process."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._changed = threading.Condition()

    def post(self, key: str, value: str) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def wait(self, keys: Sequence[str], timeout_s: float) -> list[str] | None:
        with self._changed:
            there = self._changed.wait_for(lambda: self._values.keys() >= set(keys), timeout_s)
            return [self._values[key] for key in keys] if there else None


# -------------------------------------------------------------------------------------------------------------- saving


@dataclass(frozen=True)
class _Job:
    """What one rank saves of a round; on the leader with what the manifest says of it."""

    round: int
    tensors: Tensors
    names: dict[str, Any] = field(default_factory=dict)


class CheckpointSaver:
    """Saves one film's state on one rank; `together.FilmSavers` gives it the film's part of what the executor saves.

    Chunks and rounds count within the film; `chunks` are its own among those of the plan.

    A save is due `interval_s` seconds after the last one began, and at most one is under way. A thread of its own does
    the writing: tensors are taken as they are, for nobody writes to them. Where it fails (the disk is full, a rank does
    not answer for `timeout_s`), `on_notice` is told by `is_due` or `close`, on the caller's thread, and the checkpoint
    before stays.

    On the leader `film_state` is asked inside `save_film`, when all chunks that were finished are handed out: their
    frames must be written by then. `fingerprint` goes to the manifest. The film's folder must be on a disk that all
    ranks share. Once `preemption` is asked for, a save is due at once, and `is_due` raises Preempted when it is there.
    """

    def __init__(
        self,
        film: Path,
        holder: Holder,
        bulletin: Bulletin,
        *,
        chunks: range,
        fingerprint: Mapping[str, Any],
        film_state: Callable[[], FilmState],
        on_notice: Callable[[str], None],
        interval_s: float = 30.0,
        timeout_s: float = 600.0,
        preemption: Preemption | None = None,
    ) -> None:
        self._film, self._state, self._holder, self._bulletin = film, state_folder(film), holder, bulletin
        self._chunks = chunks
        self._fingerprint, self._film_state, self._on_notice = fingerprint, film_state, on_notice
        self._interval_s, self._timeout_s = interval_s, timeout_s
        self._preemption = preemption or Preemption()
        self._began = time.monotonic()
        self._saved_at = -math.inf
        self._until = math.inf
        self._synced_segments = 0
        self._kv: _Job | None = None
        self._latents: _Job | None = None
        self._thread: threading.Thread | None = None
        self._notices: deque[str] = deque()
        self._told = ""

    @property
    def is_busy(self) -> bool:
        """Whether a save is under way."""
        is_begun = self._kv is not None or self._latents is not None
        return is_begun or (self._thread is not None and self._thread.is_alive())

    def is_due(self) -> bool:
        self._tell()
        if self.is_saved_for_preemption:
            raise Preempted
        waited = time.monotonic() - self._began >= self._interval_s
        return not self.is_busy and (waited or self._preemption.is_asked)

    @property
    def is_saved_for_preemption(self) -> bool:
        """On the leader: whether a checkpoint was completed since somebody asked for pre-emption."""
        return self._preemption.is_asked and self._saved_at >= self._preemption.asked_at

    def save_kv(self, done: int, kv: dict[KvVersion, KvSpan]) -> None:
        self._began = time.monotonic()
        tensors = kv_tensors(kv, self._holder) | memory_tensors(self._holder, self._chunks)
        job = _Job(done, tensors, {"kv": [(v.chunk, v.round, v.edge) for v in kv]})
        mesh = self._holder.mesh
        if self.is_busy and not mesh.is_leader:
            self._answer(done, {"error": "an earlier checkpoint is still being written"})
        elif mesh.is_owner:
            self._kv = job
        else:
            self._start(job)

    def save_latents(self, done: int, latents: dict[LatentVersion, Tensor], solvers: dict[int, Solver]) -> None:
        if self._kv is None and not self._holder.mesh.is_leader:
            return  # `save_kv` said why
        assert self._kv and self._kv.round == done, "K/V come first"
        job, self._kv = self._kv, None
        tensors = job.tensors | {f"latents/{v.chunk}/{v.version}": value for v, value in latents.items()}
        for chunk, solver in solvers.items():
            tensors |= {f"solver/{chunk}/{name}": value for name, value in solver.state().items()}
        names = {**job.names, "latents": [(v.chunk, v.version) for v in latents], "solvers": list(solvers)}
        job = _Job(done, tensors, names)
        if self._holder.mesh.is_leader:
            self._latents = job
            return
        if self._holder.decoder:
            own = f"decoder@{self._holder.mesh.rank}"
            job.tensors.update({f"{own}/{name}": value for name, value in self._holder.decoder.state().items()})
        self._start(job)

    def save_film(self) -> None:
        """On the leader, behind `save_latents`, when all chunks that were finished then are handed out."""
        assert self._latents, "latents come first"
        job, self._latents = self._latents, None
        film = self._film_state()
        tensors = job.tensors | {f"decoder/{name}": value for name, value in film.decoder.items()}
        tensors["frames"] = torch.from_numpy(film.writer.open_frames)
        if film.last is not None:
            tensors["last"] = film.last
        names = {**job.names, "segments": film.writer.segments, "short": list(film.writer.short)}
        self._start(_Job(job.round, tensors, names))

    def close(self) -> None:
        """Wait for the save that is under way; for other ranks' part in it no longer than `GRACE_S`."""
        self._until = time.monotonic() + GRACE_S
        self._kv = self._latents = None
        if self._thread:
            self._thread.join()
        self._tell()

    def _start(self, job: _Job) -> None:
        self._thread = threading.Thread(target=self._save, args=(job,), name="checkpoint", daemon=True)
        self._thread.start()

    def _save(self, job: _Job) -> None:
        mesh = self._holder.mesh
        path = self._state / file_name(job.round, mesh.rank)
        try:
            size = write_tensors(path, job.tensors)
            if mesh.is_leader:
                self._commit(job, size)
                self._remove_rounds(lambda folder: folder != path.parent)
            else:
                owned: dict[str, Any] = {k: job.names[k] for k in ("latents", "solvers") if k in job.names}
                self._answer(job.round, {"bytes": size, **owned})
        except Exception as error:  # whatever it is: the render goes on, and who waits must know
            if mesh.is_leader:
                self._notices.append(_reason(error))
                self._remove_rounds(lambda folder: folder == path.parent)
            else:
                self._answer(job.round, {"error": _reason(error)})

    def _commit(self, job: _Job, own_size: int) -> None:
        """When every rank's file is there: make them the checkpoint, in place of the one before."""
        files, names = {file_name(job.round, self._holder.mesh.rank): own_size}, dict(job.names)
        for rank, answer in self._others(job.round):
            files[file_name(job.round, rank)] = answer["bytes"]
            names["latents"] = [*names["latents"], *map(tuple, answer.get("latents", ()))]
            names["solvers"] = [*names["solvers"], *answer.get("solvers", ())]
        for name, size in files.items():
            path = self._state / name
            if not path.is_file() or path.stat().st_size != size:
                raise RuntimeFailure(f"{path} was written where the leader cannot see it: ranks must share this disk")
        self._sync_film(job.names["segments"])
        manifest = Manifest(round=job.round, files=files, fingerprint=dict(self._fingerprint), **names)
        write_whole(self._state / MANIFEST, manifest.model_dump_json().encode(), durable=True)
        self._saved_at = time.monotonic()

    def _sync_film(self, segments: int) -> None:
        """The checkpoint relies on the film's segments, too."""
        for index in range(self._synced_segments, segments):
            sync(self._state.parent / segment_name(index))
        self._synced_segments = segments
        for folder in (self._state, *self._state.parents[:2]):
            sync(folder)

    def _remove_rounds(self, is_removed: Callable[[Path], bool]) -> None:
        for folder in filter(is_removed, self._state.glob("round_*")):
            shutil.rmtree(folder, ignore_errors=True)

    def _others(self, done: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """What the other ranks say of their files. Raises RuntimeFailure where one failed, or says nothing."""
        ranks = range(1, self._holder.mesh.topology.num_ranks)
        began = time.monotonic()
        while (answers := self._bulletin.wait([self._key(done, rank) for rank in ranks], 0.5)) is None:
            if time.monotonic() > min(began + self._timeout_s, self._until):
                raise RuntimeFailure("not every rank wrote its part in time")
        for rank, answer in zip(ranks, map(json.loads, answers), strict=True):
            if "error" in answer:
                raise RuntimeFailure(f"rank {rank}: {answer['error']}")
            yield rank, answer

    def _answer(self, done: int, answer: dict[str, Any]) -> None:
        self._bulletin.post(self._key(done, self._holder.mesh.rank), json.dumps(answer))

    def _key(self, done: int, rank: int) -> str:
        return f"checkpoint/{self._film}/{done}/{rank}"

    def _tell(self) -> None:
        while self._notices:
            reason = self._notices.popleft()
            if reason != self._told:
                self._on_notice(f"no new checkpoint: {reason}; the render goes on, and the one before stays")
            self._told = reason


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# --------------------------------------------------------------------------------------------------------------- files


def kv_tensors(kv: Mapping[KvVersion, KvSpan], holder: Holder) -> Tensors:
    """A rank's K/V under names that say which they are in the whole model."""
    tensors: Tensors = {}
    for version, span in kv.items():
        assert isinstance(span, list)
        for branch, layers in zip(holder.branches, span, strict=True):
            for layer, part in zip(holder.layers, layers, strict=True):
                name = _kv_name(version, branch, layer, holder)
                place = torch.tensor([part.offset, *part.lengths])
                tensors |= {f"{name}/key": part.key, f"{name}/value": part.value, f"{name}/place": place}
    return tensors


def _kv_name(version: KvVersion, branch: int, layer: int, holder: Holder) -> str:
    seq = holder.mesh.place.seq
    return f"kv/{version.chunk}/{version.round}/{version.edge}/branch_{branch}/layer_{layer}/seq_{seq}"


def memory_tensors(holder: Holder, chunks: range) -> Tensors:
    """What the attention's policy and the cache remember of some chunks on a rank."""
    tensors: Tensors = {}
    for kind, owner in (("memory", holder.attention), ("cached", holder.cache)):
        for (chunk, branch, layer), kept in owner.state().items() if owner else ():
            if chunk not in chunks:
                continue
            place = f"{kind}/{chunk - chunks.start}/{branch}/{layer}/{holder.mesh.place.seq}"
            tensors |= {f"{place}/{name}": x for name, x in kept.items()}
    return tensors


def _memory(wanted: str, tensors: Tensors) -> dict[tuple[int, int, int], Memory]:
    found: dict[tuple[int, int, int], Memory] = {}
    for path, value in tensors.items():
        kind, _, rest = path.partition("/")
        if kind == wanted:
            chunk, branch, layer, _, name = rest.split("/")
            found.setdefault((int(chunk), int(branch), int(layer)), {})[name] = value
    return found


def write_tensors(path: Path, tensors: Tensors) -> int:
    """Write a safetensors file that is whole whenever it is there. Returns its bytes. Raises OSError, SafetensorError.

    Strides are kept: how kernels round may depend on them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    packed, strides = _pack(tensors)
    try:
        save_file(packed, temporary, {"strides": json.dumps(strides)})
        size = temporary.stat().st_size
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)
    return size


def _pack(tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
    """Contiguous tensors on the CPU that share no memory; and [shape, stride] of those that were not contiguous."""
    packed: Tensors = {}
    strides: dict[str, Any] = {}
    storages = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu()
        is_dense = value.untyped_storage().nbytes() == value.nbytes
        if is_dense and value.stride() != torch.empty(value.shape, device="meta").stride():
            strides[name] = [value.shape, value.stride()]
            value = value.as_strided((value.numel(),), (1,))
        is_shared = value.untyped_storage().data_ptr() in storages
        packed[name] = value.clone(memory_format=torch.contiguous_format) if is_shared else value.contiguous()
        storages.add(value.untyped_storage().data_ptr())
    return packed, strides


def read_tensors(path: Path, is_wanted: Callable[[str], bool], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Some tensors of a file, and no more of its bytes. Raises InputError where it is damaged."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            strides = json.loads(file.metadata()["strides"])
            for name in filter(is_wanted, file.keys()):
                value = file.get_tensor(name).clone()  # not a view of the file, which goes with the next checkpoint
                yield name, value.as_strided(*strides[name]) if name in strides else value
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is damaged ({error}); {ANEW}") from None


# ------------------------------------------------------------------------------------------------------------- loading


def load_checkpoint(film: Path, manifest: Manifest, holder: Holder, device: torch.device) -> Saved:
    """What a rank needs to go on, its tensors on `device`; it may have other layers and branches than whoever saved.

    Raises InputError where the checkpoint is damaged.
    """
    mesh = holder.mesh
    versions = [KvVersion(*version) for version in manifest.kv]
    places = [(branch, layer) for branch in holder.branches for layer in holder.layers]
    own_kv = {_kv_name(version, *place, holder) for version in versions for place in places}

    def is_wanted(name: str) -> bool:
        kind, _, rest = name.partition("/")
        match kind.partition("@")[0]:
            case "memory" | "cached":
                chunk, branch, layer, seq = map(int, rest.split("/")[:4])
                is_here = branch in holder.branches and layer in holder.layers and seq == mesh.place.seq
                return is_here and holder.has(chunk)
            case "latents":
                return holder.sees(LatentVersion(*map(int, rest.split("/"))))
            case "solver":
                return mesh.is_owner and holder.has(int(rest.partition("/")[0]))
            case "decoder":
                return mesh.is_leader or holder.decodes or holder.decoder is not None
            case "frames" | "last":
                return mesh.is_leader
        return name.rpartition("/")[0] in own_kv

    tensors: Tensors = {}
    for name in manifest.files:
        tensors |= read_tensors(state_folder(film) / name, is_wanted, device)
    try:
        kv: dict[KvVersion, KvSpan] = {version: _kv_span(version, tensors, holder) for version in versions}
        memory, cached = _memory("memory", tensors), _memory("cached", tensors)
        seen = [version for version in (LatentVersion(*v) for v in manifest.latents) if holder.sees(version)]
        latents = {v: tensors[f"latents/{v.chunk}/{v.version}"] for v in seen}
        own = [chunk for chunk in manifest.solvers if mesh.is_owner and holder.has(chunk)]
        return Saved(
            manifest.round,
            {v: value for v, value in latents.items() if holder.has(v.chunk)},
            kv,
            borders={v: value for v, value in latents.items() if not holder.has(v.chunk)},
            solvers={chunk: _under(f"solver/{chunk}", tensors) for chunk in own},
            film=_film(manifest, tensors) if mesh.is_leader else None,
            decoder=_decoder(tensors),
            memory=memory,
            cached=cached,
        )
    except KeyError as error:
        raise InputError(f"{film}: its checkpoint lacks {error}; {ANEW}") from None


def _decoder(tensors: Tensors) -> Tensors:
    """The state of the whole decoder, of which the leader and others may have saved a part each."""
    kinds = dict.fromkeys(name.partition("/")[0] for name in tensors if name.startswith("decoder"))
    return join_states(_under(kind, tensors) for kind in kinds)


def _film(manifest: Manifest, tensors: Tensors) -> FilmState:
    writer = WriterState(manifest.segments, tensors["frames"].cpu().numpy(), tuple(manifest.short))
    return FilmState(_decoder(tensors), writer, tensors.get("last"))


def _kv_span(version: KvVersion, tensors: Tensors, holder: Holder) -> list[list[KvPart]]:
    """K/V [branch][layer] of a span, as the stage keeps them."""

    def part(branch: int, layer: int) -> KvPart:
        name = _kv_name(version, branch, layer, holder)
        offset, *lengths = tensors[f"{name}/place"].tolist()
        return KvPart(tensors[f"{name}/key"], tensors[f"{name}/value"], offset, tuple(lengths))

    return [[part(branch, layer) for layer in holder.layers] for branch in holder.branches]


def _under(folder: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(f"{folder}/"): value for name, value in tensors.items() if name.startswith(f"{folder}/")}


# ------------------------------------------------------------------------------------------------------------- endings


@dataclass(frozen=True)
class Ended:
    """What a film goes on from: its last latents fp32 [C, as many as left context, h, w], the decoder's state, and the
    frames uint8 [T, H, W, 3] that its last latent held behind the film's end.
    """

    last: Tensor
    decoder: Mapping[str, Tensor]
    frames: Tensor


def save_ending(film: Path, ended: Ended, *, frames: int, **said: Any) -> None:
    """Keep how a film of so many frames ended, in place of an earlier ending and of checkpoints; see `Ending`."""
    state, name = state_folder(film), f"ending_{frames:06d}.safetensors"
    tensors = {"last": ended.last, "frames": ended.frames, **{f"decoder/{x}": y for x, y in ended.decoder.items()}}
    size = write_tensors(state / name, tensors)
    ending = Ending(frames=frames, tensors=name, bytes=size, **said)
    write_whole(state / ENDING, ending.model_dump_json().encode(), durable=True)
    (state / MANIFEST).unlink(missing_ok=True)
    for folder in state.glob("round_*"):
        shutil.rmtree(folder, ignore_errors=True)
    for file in state.glob("ending_*.safetensors"):
        if file.name != name:
            file.unlink()


def load_ending(film: Path, ending: Ending, device: torch.device) -> Ended:
    """What was kept, its tensors on `device` but for the frames. Raises InputError where it is damaged."""
    path = state_folder(film) / ending.tensors
    tensors = dict(read_tensors(path, lambda name: True, device))
    try:
        return Ended(tensors["last"], _under("decoder", tensors), tensors["frames"].cpu())
    except KeyError as error:
        raise InputError(f"{path}: lacks {error}: {film} cannot go on") from None


def copy_ending(film: Path, to: Path, ending: Ending) -> None:
    """Give another film the segments and the ending of this one; what was in its folder goes."""
    shutil.rmtree(working_folder(to), ignore_errors=True)
    state_folder(to).mkdir(parents=True)
    for index in range(ending.segments):
        _link(working_folder(film) / segment_name(index), working_folder(to) / segment_name(index))
    for name in (ending.tensors, ENDING):
        _link(state_folder(film) / name, state_folder(to) / name)


def _link(source: Path, target: Path) -> None:
    """A second name for a file that is never written in place; a copy where the disk has none."""
    try:
        target.hardlink_to(source)
    except FileNotFoundError:
        raise InputError(f"{source}: is missing: the film cannot go on") from None
    except OSError:
        shutil.copyfile(source, target)
