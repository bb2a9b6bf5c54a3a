"""A decode whose rows are dealt out to ranks is the whole decode: groups of two, three and four gloo processes.

The file is its own worker: with a folder it forks the ranks, each of which runs all cases and writes what it found.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longvid.decode import join_states
from longvid.kernels import convolve
from longvid.models.wan_vae import WanStreamDecoder
from longvid.models.wan_vae_layers import ChannelsLastDecoder
from longvid.models.wan_vae_shared import Bands
from longvid.parallel.collectives import Group, new_group

NUM_RANKS = 4
LAYOUTS: dict[str, dict[str, Any]] = {
    "2.1": {"base_dim": 8, "dim_mult": [1, 2, 4, 4]},
    "2.2": {"base_dim": 8, "dim_mult": [1, 2, 4, 4], "is_residual": True, "patch_size": 2, "scale_factor_spatial": 16},
}


def make_vae(layout: str, dtype: torch.dtype = torch.float32) -> AutoencoderKLWan:
    torch.manual_seed(0)
    options = LAYOUTS[layout]
    if options.get("patch_size"):
        options = options | {"in_channels": 12, "out_channels": 12}
    means, stds = [0.1, -0.2, 0.3, 0.0], [1.5, 0.5, 2.0, 1.0]
    vae = AutoencoderKLWan(z_dim=4, num_res_blocks=1, latents_mean=means, latents_std=stds, **options)
    return vae.eval().to(dtype)


def make_latents(height: int, count: int = 4) -> Tensor:
    return torch.randn(4, count, height, 3, generator=torch.Generator().manual_seed(1))


# ----------------------------------------------------------------------------------------------------------- the ranks


def difference(one: Tensor, other: Tensor) -> float:
    """Infinite where the shapes differ."""
    return (one.float() - other.float()).abs().max().item() if one.shape == other.shape else float("inf")


def shared_error(group: Group, layout: str, height: int, dtype: torch.dtype = torch.float32) -> float:
    """How far the first member's frames, uint8, are from a whole decode's; the others have their rows of them."""
    vae, latents = make_vae(layout, dtype), make_latents(height)
    whole = WanStreamDecoder(vae).push(latents)
    decoder = WanStreamDecoder(vae)
    decoder.share_rows(group)
    given = latents if group.index == 0 else torch.full_like(latents, torch.nan)
    pushes = [decoder.push(part) for part in given.split([1, 2, 1], dim=1)]
    if not Bands(group, height).own:
        return float(sum(len(frames) for frames in pushes))
    frames, scale = torch.cat(pushes), whole.shape[1] // height
    own = Bands(group, height).own if group.index else range(height)
    return difference(frames, whole[:, own.start * scale : own.stop * scale])


def float_error(group: Group, layout: str, height: int) -> float:
    """The same before rounding to uint8."""
    vae, latents = make_vae(layout), make_latents(height)
    decoder = WanStreamDecoder(vae)
    decoder.share_rows(group)
    shared = decoder._shared
    assert shared is not None
    bands, rows = shared.share(height), Bands(group, height).own
    states: list[list[Any]] = [[None] * vae._cached_conv_counts["decoder"] for _ in range(2)]
    whole, error = ChannelsLastDecoder(vae), 0.0
    with torch.no_grad():
        for i in range(latents.shape[1]):
            x = latents[None, :, i : i + 1]
            expected = whole(x, states[0], i == 0)
            scale = expected.shape[3] // height
            got = shared(x[..., rows.start : rows.stop, :], states[1], i == 0)
            error = max(error, difference(got, expected[..., rows.start * scale : rows.stop * scale, :]))
    assert bands.own == rows
    return error


def error_without_units(group: Group, layout: str, height: int) -> float:
    """The same where torch's convolutions serve."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolve, "suits", lambda x: False)
        return float_error(group, layout, height)


def resumed_error(group: Group, layout: str, height: int, folder: Path) -> float:
    """A shot that one rank began and the group goes on with. Every member leaves its part of the state in a folder."""
    vae, latents = make_vae(layout), make_latents(height, 6)
    whole = WanStreamDecoder(vae)
    whole.push(latents[:, :3])
    before = {name: value.clone() for name, value in whole.state().items()}
    after = whole.push(latents[:, 3:])
    decoder = WanStreamDecoder(vae)
    decoder.share_rows(group)
    decoder.load_state(before)
    frames = decoder.push(latents[:, 3:])
    decoder.reset()
    decoder.push(latents[:, :3])
    own = decoder.state()
    torch.save(own, folder / f"part_{group.size}_{group.index}")
    decoder.load_state(own)
    again = decoder.push(latents[:, 3:])
    return max(difference(frames, again), difference(frames, after) if group.index == 0 else 0.0)


def cases(rank: int, folder: Path) -> Iterator[tuple[str, Callable[[], float]]]:
    for size in (2, 3, 4):
        group = new_group(range(size), rank)
        if group is None:
            continue
        for layout in LAYOUTS:
            yield f"float {layout} {size}", partial(float_error, group, layout, 5)
            yield f"uint8 {layout} {size}", partial(shared_error, group, layout, 6)
        yield f"fewer rows {size}", partial(shared_error, group, "2.1", size - 1)
        yield f"resumed {size}", partial(resumed_error, group, "2.2", 5, folder)
        if size == 3:
            yield f"without units {size}", partial(error_without_units, group, "2.2", 5)
            yield f"bfloat16 {size}", partial(shared_error, group, "2.2", 7, torch.bfloat16)


def run_rank(rank: int, folder: Path) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), NUM_RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS, timeout=timedelta(seconds=120))
    found: dict[str, Any] = {}
    for name, case in cases(rank, folder):
        try:
            found[name] = case()
        except Exception:
            found[name] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run_rank, args=(rank, Path(sys.argv[1]))) for rank in range(NUM_RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()


# ------------------------------------------------------------------------------------------------ tests with processes


@pytest.fixture(scope="module")
def folder(run_worker: Callable[[str, Path, float], int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks wrote what they found."""
    folder = tmp_path_factory.mktemp("ranks")
    run_worker(__file__, folder, 240)
    return folder


def worst(folder: Path, name: str, size: int) -> float:
    """The largest error that a member of the group of that size found in a case."""
    errors = []
    for rank in range(size):
        file = folder / f"{rank}.json"
        found = json.loads(file.read_text()) if file.exists() else {"": (folder / "log").read_text()}
        error = found.get(f"{name} {size}", found)
        assert isinstance(error, float), error
        errors.append(error)
    return max(errors)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shared_rows_are_those_of_a_whole_decode_to_the_last_bit(folder: Path, layout: str, size: int) -> None:
    assert worst(folder, f"float {layout}", size) == 0
    assert worst(folder, f"uint8 {layout}", size) == 0


def test_so_are_those_of_torch_s_convolutions(folder: Path) -> None:
    assert worst(folder, "without units", 3) == 0


def test_shared_rows_in_half_precision_round_alike(folder: Path) -> None:
    assert worst(folder, "bfloat16", 3) <= 1


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_without_rows_are_idle(folder: Path, size: int) -> None:
    assert worst(folder, "fewer rows", size) == 0


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_shot_goes_on_to_the_last_bit_on_another_number_of_ranks(folder: Path, size: int) -> None:
    assert worst(folder, "resumed", size) == 0
    parts = [torch.load(folder / f"part_{size}_{index}") for index in reversed(range(size))]
    latents, decoder, resumed = make_latents(5, 6), *(WanStreamDecoder(make_vae("2.2")) for _ in range(2))
    decoder.push(latents[:, :3])
    joined, state = join_states(parts), decoder.state()
    assert joined.keys() == state.keys()
    assert all(torch.equal(joined[name], value) for name, value in state.items())
    assert all(joined[name].stride() == value.stride() for name, value in state.items())
    resumed.load_state(joined)
    assert torch.equal(resumed.push(latents[:, 3:]), decoder.push(latents[:, 3:]))


def test_memory_of_a_rank_falls_with_the_number_of_ranks(folder: Path) -> None:
    parts = [torch.load(folder / f"part_4_{index}") for index in range(4)]
    sizes = [sum(value.nbytes for name, value in part.items() if name.startswith("conv")) for part in parts]
    assert max(sizes) <= sum(sizes) * 2 / 5  # of five rows


# ------------------------------------------------------------------------------------------------------ pure arithmetic


@given(height=st.integers(1, 200), size=st.integers(1, 20))
def test_bands_are_in_order_without_gaps_and_as_even_as_they_go(height: int, size: int) -> None:
    bands = [Bands(Group(tuple(range(size)), index), height) for index in range(size)]
    rows = [band.own for band in bands]
    assert [row for band in rows for row in band] == list(range(height))
    busy = [len(band) for band in rows[: bands[0].num_busy]]
    assert max(busy) - min(busy) <= 1
    assert not any(rows[bands[0].num_busy :])
