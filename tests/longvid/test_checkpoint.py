"""Checkpoints: what is saved comes back, a crash leaves a whole one, and a resumed film has the same bytes."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longvid import checkpoint
from longvid.cache.make import make_cache, make_caching
from longvid.cache.settings import plan_cache
from longvid.checkpoint import CheckpointSaver, FilmState, Holder, LocalBulletin, Saved, load_checkpoint
from longvid.errors import InputError
from longvid.geometry import LatentGrid
from longvid.manifest import Manifest, find_manifest, state_folder
from longvid.models.solvers import make_sampler
from longvid.models.wan import WanStage
from longvid.models.wan_vae import WanStreamDecoder
from longvid.noise import chunk_noise
from longvid.parallel.actions import KvVersion, LatentVersion
from longvid.parallel.around import KvPart
from longvid.parallel.collectives import Group
from longvid.parallel.comm import LoneComm
from longvid.parallel.executor import Executor
from longvid.parallel.mesh import Mesh
from longvid.parallel.run_state import Live
from longvid.parallel.schedule import last_round, make_schedule
from longvid.parallel.topology import Topology
from longvid.plan import ModelFacts, make_plan
from longvid.sampler import EulerSampler
from longvid.script import parse_script
from longvid.settings import load_settings
from longvid.together import FilmSavers
from longvid.writer import FilmWriter, WriterState

NUM_LAYERS = 5
CPU = torch.device("cpu")


def holders(stage: int = 1, guidance: int = 1, seq: int = 1, branches: int = 2) -> list[Holder]:
    """The ranks of a mesh, and what of a model with five layers each holds."""
    topology = Topology(stage=stage, guidance=guidance, seq=seq)
    alone, edges = Group((0,), 0), [NUM_LAYERS * i // stage for i in range(stage + 1)]
    found = []
    for rank in range(topology.num_ranks):
        place = topology.coordinate(rank)
        layers = range(edges[place.stage], edges[place.stage + 1])
        own = range(branches) if guidance == 1 else [place.guidance]
        found.append(Holder(Mesh(topology, rank, LoneComm(), alone, alone, alone), layers, tuple(own)))
    return found


def value(*key: object, shape: tuple[int, ...] = (2, 3)) -> Tensor:
    """Numbers that only this key has."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(repr(key).encode())))


def kv_of(holder: Holder, done: int) -> dict[KvVersion, Any]:
    seq = holder.mesh.place.seq

    def part(version: KvVersion, branch: int, layer: int) -> KvPart:
        names = (version.chunk, version.round, branch, layer, seq)
        return KvPart(value(*names, 0).bfloat16(), value(*names, 1).bfloat16(), 7 * seq, (7, 2 + layer))

    versions = [KvVersion(3, done, "last"), KvVersion(4, done - 1, "last")]
    return {v: [[part(v, branch, layer) for layer in holder.layers] for branch in holder.branches] for v in versions}


def latents_of(done: int) -> dict[LatentVersion, Tensor]:
    return {LatentVersion(3, 4): value("z3", done), LatentVersion(4, 3): value("z4", done)}


@dataclass
class OneValueSolver:
    """A solver whose history is one tensor."""

    kept: Tensor

    def step(self, velocity: Tensor, step: int, sample: Tensor) -> Tensor:
        self.kept = velocity
        return sample + velocity

    def state(self) -> dict[str, Tensor]:
        return {"kept": self.kept}

    def load_state(self, state: Any) -> None:
        self.kept = state["kept"]


def film_state(done: int) -> FilmState:
    return FilmState({"conv_1": value("conv", done)}, WriterState(done, np.full((3, 4, 6, 3), done, np.uint8)))


def saver_of(film: Path, holder: Holder, bulletin: LocalBulletin, **options: Any) -> CheckpointSaver:
    options = {
        "fingerprint": {"a": 1},
        "chunks": range(1000),
        "film_state": lambda: film_state(0),
        "on_notice": pytest.fail,
        **options,
    }
    return CheckpointSaver(film, holder, bulletin, **options)


def save(film: Path, ranks: list[Holder], done: int, **options: Any) -> None:
    """Let every rank of a film save the state after a round; the leader comes last."""
    bulletin = LocalBulletin()
    options = {"film_state": lambda: film_state(done), **options}
    for holder in reversed(ranks):
        saver = saver_of(film, holder, bulletin, **options)
        saver.save_kv(done, kv_of(holder, done))
        if holder.mesh.is_leader:
            solvers: dict[int, Any] = {3: OneValueSolver(value("s3", done)), 4: EulerSampler((1.0, 0.0))}
            saver.save_latents(done, latents_of(done), solvers)
            saver.save_film()
        saver.close()


def load(film: Path, holder: Holder) -> Saved:
    manifest = find_manifest(film)
    assert manifest
    return load_checkpoint(film, manifest, holder, CPU)


def assert_saved(saved: Saved, holder: Holder, done: int) -> None:
    """It is just what `save` wrote after this round, as far as this rank needs it."""
    assert saved.round == done
    expected = kv_of(holder, done)
    assert saved.kv.keys() == expected.keys()
    for version, branches in expected.items():
        theirs: Any = saved.kv[version]
        assert len(theirs) == len(branches)
        for layers, their_layers in zip(branches, theirs, strict=True):
            for part, other in zip(layers, their_layers, strict=True):
                assert torch.equal(part.key, other.key)
                assert torch.equal(part.value, other.value)
                assert (part.offset, part.lengths) == (other.offset, other.lengths)
    latents = latents_of(done) if holder.mesh.is_first else {}
    assert saved.latents.keys() == latents.keys()
    assert all(torch.equal(latents[version], saved.latents[version]) for version in latents)
    if not holder.mesh.is_leader:
        assert (saved.solvers, saved.film) == ({}, None)
        return
    assert saved.solvers.keys() == {3, 4}
    assert torch.equal(saved.solvers[3]["kept"], value("s3", done))
    assert saved.solvers[4] == {}
    assert saved.film
    assert torch.equal(saved.film.decoder["conv_1"], value("conv", done))
    assert saved.film.writer.segments == done
    assert np.array_equal(saved.film.writer.open_frames, film_state(done).writer.open_frames)


@contextmanager
def folder_in_memory() -> Iterator[Path]:
    """Where there is such a disk, for hundreds of checkpoints are synced there."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as path:
        yield Path(path)


@pytest.fixture
def folder() -> Iterator[Path]:
    with folder_in_memory() as path:
        yield path


@pytest.fixture
def film(folder: Path) -> Path:
    """A film with as many segments as `save` may speak of."""
    (folder / "film.mp4.longvid").mkdir()
    for index in range(13):
        (folder / "film.mp4.longvid" / f"seg_{index:05d}.ts").touch()
    return folder / "film.mp4"


# ------------------------------------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("then", [(1, 1), (2, 1), (1, 2), (3, 2), (5, 1)])
@pytest.mark.parametrize("now", [(1, 1), (2, 1), (1, 2), (4, 2)])
@pytest.mark.parametrize("seq", [1, 3])
def test_any_stages_and_branches_go_on_from_any_others(
    film: Path, then: tuple[int, int], now: tuple[int, int], seq: int
) -> None:
    save(film, holders(*then, seq), 12)
    for holder in holders(*now, seq):
        assert_saved(load(film, holder), holder, 12)


def test_the_executor_gets_solvers_that_go_on(film: Path) -> None:
    [holder] = holders()
    save(film, [holder], 12)
    saved = replace(load(film, holder), solvers={4: {}})
    live = saved.live(EulerSampler((1.0, 0.0)))
    assert live.solvers.keys() == {4}
    assert (live.latents.keys(), live.kv.keys()) == (saved.latents.keys(), saved.kv.keys())


def test_a_later_checkpoint_takes_the_place_of_the_one_before(film: Path) -> None:
    ranks = holders(2)
    for done in (5, 9):
        save(film, ranks, done)
        assert sorted(path.name for path in state_folder(film).iterdir()) == ["manifest.json", f"round_{done:06d}"]
        for holder in ranks:
            assert_saved(load(film, holder), holder, done)


@given(
    st.lists(st.integers(0, 3), min_size=0, max_size=4),
    st.permutations(range(4)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool]),
)
def test_tensors_come_back_with_values_dtype_and_strides(
    shape: list[int], order: list[int], dtype: torch.dtype
) -> None:
    whole = torch.randint(0, 2, shape).to(dtype)
    turned = whole.permute([dim for dim in order if dim < whole.dim()])
    tensors = {"whole": whole, "turned": turned, "alias": whole, "sliced": whole[:1] if shape else whole}
    with folder_in_memory() as folder:
        checkpoint.write_tensors(folder / "a.safetensors", tensors)
        found = dict(checkpoint.read_tensors(folder / "a.safetensors", lambda name: name != "sliced", CPU))
    assert found.keys() == tensors.keys() - {"sliced"}
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, tensors[name])
        assert tensor.stride() == tensors[name].stride()


# ------------------------------------------------------------------------------------------------------------- crashes

_CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def crashing_at(operation: int, work: Callable[[], None]) -> bool:
    """Do work in a process of its own that is gone before its n-th change to a disk. Returns whether it got to its end.

    A file that is being written loses its second half.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    try:
        left, fsync, save_file = [operation], os.fsync, checkpoint.save_file

        def count() -> None:
            left[0] -= 1
            if left[0] < 0:
                os._exit(1)

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            if event in _CHANGES and (event != "open" or _writes(arguments)):
                count()

        def slow_fsync(number: int) -> None:
            if left[0] == 0 and os.path.isfile(path := os.readlink(f"/proc/self/fd/{number}")):
                os.truncate(path, os.path.getsize(path) // 2)
            count()
            fsync(number)

        def slow_save(tensors: Any, path: Any, metadata: Any) -> None:
            count()  # it writes from Rust, which tells no audit hook
            save_file(tensors, path, metadata)

        os.fsync, checkpoint.save_file = slow_fsync, slow_save  # type: ignore[assignment]
        sys.addaudithook(watch)
        work()
        os._exit(0)
    except BaseException:
        os._exit(2)


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    return bool(flags & (os.O_WRONLY | os.O_RDWR)) or (mode or "r")[0] in "wax"


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("before", [None, 5])
def test_a_crash_at_any_moment_leaves_one_whole_checkpoint(film: Path, before: int | None, stages: int) -> None:
    ranks, working = holders(stages), film.with_name("film.mp4.longvid")
    if before:
        save(film, ranks, before)
    original = shutil.copytree(working, film.with_name("original"))
    seen: list[int | None] = []
    finished = False
    while not finished:
        finished = crashing_at(len(seen), lambda: save(film, ranks, 9))
        found = find_manifest(film).round if (state_folder(film) / "manifest.json").exists() else None  # type: ignore[union-attr]
        seen.append(found)
        if found:
            for holder in ranks:
                assert_saved(load(film, holder), holder, found)
        save(film, ranks, 10)  # what the crash left is in nobody's way
        assert sorted(path.name for path in state_folder(film).iterdir()) == ["manifest.json", "round_000010"]
        shutil.rmtree(working)
        shutil.copytree(original, working)
    commit = seen.index(9)
    assert seen == [before] * commit + [9] * (len(seen) - commit)
    assert commit > 5 * (1 + stages)


def test_everything_is_on_the_disk_before_the_manifest_says_so(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a power cut: what was not synced may be lost, in any order."""
    ranks, synced, fsync, rename = holders(2), set[str](), os.fsync, os.replace
    names: list[str] = []

    def note_fsync(number: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{number}"))
        fsync(number)

    def note_rename(source: Any, target: Any) -> None:
        assert str(source) in synced, f"{source} gets its name before its bytes are on the disk"
        names.append(str(target))
        if str(target).endswith("manifest.json"):
            folders = {str(Path(name).parent) for name in names} | {str(state_folder(film).parent)}
            assert folders <= synced
        synced.discard(str(Path(target).parent))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_rename)
    save(film, ranks, 9)
    assert [Path(name).name for name in names] == ["rank_001.safetensors", "rank_000.safetensors", "manifest.json"]
    assert str(state_folder(film)) in synced


# ------------------------------------------------------------------------------------------------- one save at a time


def test_a_save_is_due_some_time_after_the_last_began(film: Path) -> None:
    [holder] = holders()
    assert not saver_of(film, holder, LocalBulletin(), interval_s=60).is_due()
    assert saver_of(film, holder, LocalBulletin(), interval_s=0).is_due()


def test_the_render_goes_on_while_ranks_write_and_no_second_save_begins(film: Path) -> None:
    leader, other = holders(2)
    bulletin = LocalBulletin()
    saver = saver_of(film, leader, bulletin, interval_s=0)
    saver.save_kv(3, kv_of(leader, 3))
    assert not saver.is_due()
    saver.save_latents(3, latents_of(3), {})
    assert not saver.is_due()
    saver.save_film()
    assert not saver.is_due()
    assert not (state_folder(film) / "manifest.json").exists()
    peer = saver_of(film, other, bulletin)
    peer.save_kv(3, kv_of(other, 3))
    saver.close()
    assert saver.is_due()
    assert Manifest.read(film).round == 3


def test_a_rank_that_is_not_done_with_an_earlier_save_says_so(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, other = holders(2)
    bulletin, may_write = LocalBulletin(), threading.Event()
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: may_write.wait())
    peer = saver_of(film, other, bulletin)
    peer.save_kv(3, kv_of(other, 3))
    peer.save_kv(7, kv_of(other, 7))
    [answer] = bulletin.wait([f"checkpoint/{film}/7/1"], 5) or [""]
    assert "still being written" in answer
    may_write.set()
    peer.close()


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_on_any_rank_is_a_notice_and_the_old_checkpoint_stays(
    film: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, notices = holders(2), list[str]()
    save(film, ranks, 5)
    write = checkpoint.save_file

    def fail_on_rank(tensors: Any, path: Path, metadata: Any) -> None:
        if f"rank_{rank:03d}" in path.name:
            path.write_bytes(b"half a file")
            full_disk()
        write(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", fail_on_rank)
    save(film, ranks, 9, on_notice=notices.append)
    assert len(notices) == 1
    assert "No space left" in notices[0]
    assert ("rank 1" in notices[0]) == (rank == 1)
    for holder in ranks:
        assert_saved(load(film, holder), holder, 5)
    assert not list(state_folder(film).rglob("*.tmp"))
    assert len(list(state_folder(film).glob("round_*"))) == 1
    monkeypatch.undo()
    save(film, ranks, 13)
    assert Manifest.read(film).round == 13


def test_the_same_failure_is_told_once(film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [holder] = holders()
    notices: list[str] = []
    saver = saver_of(film, holder, LocalBulletin(), on_notice=notices.append, interval_s=0)
    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    for done in (1, 2, 3):
        saver.save_kv(done, {})
        saver.save_latents(done, {}, {})
        saver.save_film()
        saver.close()
    assert len(notices) == 1


def test_a_rank_that_never_answers_is_waited_for_no_longer_than_the_timeout(film: Path) -> None:
    notices: list[str] = []
    saver = saver_of(film, holders(2)[0], LocalBulletin(), on_notice=notices.append, timeout_s=0.1)
    saver.save_kv(3, {})
    saver.save_latents(3, {}, {})
    saver.save_film()
    saver.close()
    assert "not every rank" in notices[0]
    assert not (state_folder(film) / "manifest.json").exists()


# ------------------------------------------------------------------------------------------------- what cannot resume


def test_a_film_that_was_never_begun_begins(tmp_path: Path) -> None:
    assert find_manifest(tmp_path / "film.mp4") is None


def test_without_a_checkpoint_there_is_nothing_to_resume(film: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint"):
        find_manifest(film)
    film.parent.joinpath("done.mp4").touch()
    with pytest.raises(InputError, match="complete"):
        find_manifest(film.with_name("done.mp4"))


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "[]",
        '{"format": 2}',
        '{"format": 1}',
        '{"format": 1, "files": {"../../film.mp4": 1}}',
        b"\xff\x00".decode("latin1"),
    ],
)
def test_a_damaged_manifest_is_refused(film: Path, damage: str) -> None:
    save(film, holders(), 5)
    (state_folder(film) / "manifest.json").write_text(damage)
    with pytest.raises(InputError, match=r"manifest\.json: is damaged"):
        find_manifest(film)


def test_missing_and_damaged_files_are_refused(film: Path) -> None:
    [holder] = holders()
    save(film, [holder], 5)
    file = state_folder(film) / "round_000005" / "rank_000.safetensors"
    content = file.read_bytes()
    file.write_bytes(b"\xff" * len(content))
    with pytest.raises(InputError, match=r"rank_000\.safetensors: is damaged"):
        load(film, holder)
    file.write_bytes(content[:-1])
    with pytest.raises(InputError, match="missing or damaged"):
        find_manifest(film)
    file.unlink()
    with pytest.raises(InputError, match="missing or damaged"):
        find_manifest(film)


def test_a_checkpoint_that_lacks_what_this_rank_needs_is_refused(film: Path) -> None:
    save(film, holders(), 5)
    with pytest.raises(InputError, match="lacks 'kv/"):
        load(film, holders(seq=2)[1])


def test_a_render_that_would_change_the_film_is_refused_with_all_reasons(film: Path) -> None:
    save(film, holders(), 5, fingerprint={"settings": {"sampler": {"steps": 8}, "schedule": "queue"}})
    manifest = Manifest.read(film)
    manifest.require(film, manifest.fingerprint)
    with pytest.raises(InputError) as caught:
        manifest.require(film, {"settings": {"sampler": {"steps": 10}, "schedule": "sequential"}})
    assert "sampler.steps: 8 then, 10 now\n  schedule: 'queue' then, 'sequential' now" in str(caught.value)


# --------------------------------------------------------------------------------------------------------- whole films

STORY = """\
fps: 8
size: [48, 48]
scenes:
  - {prompt: a, for: 33f}
  - {prompt: b, for: 17f, transition: {kind: blend, over: 5f}}
  - {prompt: c, for: 29f}
"""


class Film:
    """A tiny random model that renders a storyboard, or goes on with it, with a checkpoint after every round or two."""

    def __init__(self, path: Path, overrides: list[str]) -> None:
        torch.manual_seed(0)
        self.path = path
        self.settings = load_settings(
            None, ["sampler.steps=4", "queue.chunk_latents=2", "output.segment_s=1.0", *overrides]
        )
        names = {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
        }
        dit = diffusers.WanTransformer3DModel(
            **names, freq_dim=16, ffn_dim=32, num_layers=NUM_LAYERS, rope_max_seq_len=64
        )
        shape = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
        self.decoder = WanStreamDecoder(
            diffusers.AutoencoderKLWan(**shape, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
        )
        self.facts = ModelFacts("tiny", "wan", LatentGrid(), 4, NUM_LAYERS, 8.0, 48, 48, True, 64)
        self.plan = make_plan(parse_script(STORY, "story.yaml"), self.settings, self.facts)
        branches = (0,) if self.settings.sampler.guidance == 1 else (0, 1)
        steps = self.settings.sampler.steps
        plan = plan_cache(self.settings.cache, steps, NUM_LAYERS)
        self.cache = make_cache(plan, range(NUM_LAYERS), 1)
        self.stage = WanStage(dit, branches=branches, cache=self.cache)
        texts = [value("text", i, shape=(3, 16)) for i in range(2 * len(self.plan.prompts))]
        self.stage.set_prompts(texts[::2], texts[1::2])
        sampler = make_sampler(diffusers.FlowMatchEulerDiscreteScheduler(), self.settings.sampler)
        self.sampler = make_caching(sampler, plan)
        self.holder = Holder(holders()[0].mesh, range(NUM_LAYERS), branches, cache=self.cache)
        self.executor = Executor(
            self.stage,
            self.sampler,
            lambda chunk: chunk_noise(chunk, 4, 6, 6),
            self.facts,
            (6, 6),
            guidance=self.settings.sampler.guidance,
            cache=self.cache,
        )

    def render(self, *, resume: bool = False, stop_after: int | None = None) -> bool:
        """Render the film, or stop like a killed process after so many units. Returns whether it is complete."""
        size: Any = {"width": 48, "height": 48, "fps": 8, "output": self.settings.output}
        manifest = find_manifest(self.path) if resume else None
        live, done = Live(), -1
        if manifest:
            saved = load_checkpoint(self.path, manifest, self.holder, CPU)
            assert saved.film
            live, done = saved.live(self.sampler), saved.round
            if self.cache:
                self.cache.load_state(saved.cached)
            self.decoder.load_state(saved.film.decoder)
            state = saved.film.writer
            writer = FilmWriter.resume(self.path, **size, state=state)
        else:
            writer = FilmWriter(self.path, **size)
        saver = saver_of(
            self.path,
            self.holder,
            LocalBulletin(),
            film_state=lambda: FilmState(self.decoder.state(), writer.state()),
            interval_s=0,
        )
        lasts = [last_round(film, self.settings) for film in self.plan.films]
        self.executor.saver = FilmSavers(self.plan.films, lasts, [saver])
        units = 0

        def on_unit(_: object) -> None:
            nonlocal units
            if saver._thread:
                saver._thread.join()  # so that where checkpoints are does not depend on the disk's speed
            units += 1
            if units == stop_after:
                raise KeyboardInterrupt

        try:
            actions = make_schedule(self.plan, self.settings)
            for finished in self.executor.run(actions, self.plan, on_unit, live, done):
                self.write(writer, finished)
        except KeyboardInterrupt:
            writer._lock.release()  # as the kernel does when it ends a process
            return False
        saver.close()
        writer.finish()
        return True

    def write(self, writer: FilmWriter, finished: Any) -> None:
        chunk, shot = finished.chunk, self.plan.shots[finished.chunk.shot]
        if chunk.start == 0:
            self.decoder.reset()
        frames = self.decoder.push(finished.latents).numpy()
        surplus = self.facts.grid.num_frames(chunk.start + chunk.num_latents) - shot.num_frames
        writer.append(frames[: len(frames) - max(0, surplus)])


@pytest.fixture(scope="module")
def whole_films(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], tuple[bytes, int]]:
    """Bytes and units of films that were never interrupted."""

    @functools.cache
    def render(*overrides: str) -> tuple[bytes, int]:
        film = Film(tmp_path_factory.mktemp("whole") / "film.mp4", list(overrides))
        assert film.render()
        return film.path.read_bytes(), len(film.plan.chunks) * film.settings.sampler.steps

    return lambda overrides: render(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["queue.left=cached", "sampler.solver=unipc"],
        ["queue.left_level=same", "sampler.guidance=3.0", "sampler.solver=unipc"],
        ["queue.left=cached", "queue.gap=2", "sampler.guidance=3.0", "queue.chunk_latents=3"],
        ["queue.left=cached", "queue.gap=6", "sampler.steps=12", "queue.chunk_latents=3"],
        ["schedule=sequential", "sampler.solver=unipc"],
        ["cache.policy=cg_taylor", "cache.gate=0.3", "cache.max_skips=2", "sampler.steps=8"],
        [
            "cache.policy=first_block",
            "cache.threshold=0.3",
            "cache.first_steps=2",
            "sampler.steps=8",
            "queue.left=cached",
        ],
        ["cache.policy=delta_dit", "cache.negative_every=3", "sampler.guidance=3.0", "sampler.steps=8"],
        ["cache.policy=taylorseer", "cache.level=module", "cache.interval=3", "sampler.steps=8"],
        ["cache.policy=ras", "cache.first_steps=2", "sampler.guidance=3.0", "sampler.steps=8"],
    ],
    ids=" ".join,
)
def test_a_killed_render_goes_on_to_the_same_bytes(
    folder: Path, overrides: list[str], whole_films: Callable[[list[str]], tuple[bytes, int]]
) -> None:
    expected, num_units = whole_films(overrides)
    rounds = set()
    for stop_after in range(num_units // 5, num_units, num_units // 5):
        film = Film(folder / f"film_{stop_after}.mp4", overrides)
        assert not film.render(stop_after=stop_after)
        has_checkpoint = (state_folder(film.path) / "manifest.json").exists()
        rounds.add(Manifest.read(film.path).round if has_checkpoint else None)
        assert Film(film.path, overrides).render(resume=has_checkpoint)
        assert film.path.read_bytes() == expected
        assert not film.path.with_name(f"{film.path.name}.longvid").exists()
    assert len(rounds) > 1, "the cuts must lie between different checkpoints"


def test_a_render_that_is_killed_over_and_over_ends_with_the_same_bytes(
    folder: Path, whole_films: Callable[[list[str]], tuple[bytes, int]]
) -> None:
    overrides = ["queue.left=cached", "sampler.solver=unipc", "queue.chunk_latents=1", "queue.context_latents=1"]
    path, runs = folder / "film.mp4", 1
    while not Film(path, overrides).render(resume=runs > 1, stop_after=20):
        runs += 1
    assert runs > 2
    assert path.read_bytes() == whole_films(overrides)[0]
