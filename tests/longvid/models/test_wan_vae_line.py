"""A decoder whose layers are dealt out is the whole decoder, to the last bit."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import longvid
from longvid.decode import join_states
from longvid.models.wan_vae import WanStreamDecoder
from longvid.models.wan_vae_line import PartDecoder, most_even

LAYOUTS: dict[str, dict[str, Any]] = {
    "2.1": {"base_dim": 8, "dim_mult": [1, 2, 4, 4]},
    "2.2": {"base_dim": 8, "dim_mult": [1, 2, 4, 4], "is_residual": True, "patch_size": 2, "scale_factor_spatial": 16},
    "2.2 narrow": {"base_dim": 8, "dim_mult": [1, 2, 2], "is_residual": True, "temperal_downsample": [True, True]},
}


def make_vae(layout: str) -> AutoencoderKLWan:
    torch.manual_seed(0)
    options = LAYOUTS[layout]
    if options.get("patch_size"):
        options = options | {"in_channels": 12, "out_channels": 12}
    return AutoencoderKLWan(z_dim=4, num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[1.5] * 4, **options).eval()


def make_line(vae: AutoencoderKLWan, count: int) -> list[WanStreamDecoder]:
    line = [WanStreamDecoder(vae) for _ in range(count)]
    for index, decoder in enumerate(line):
        decoder.take_part(index, count)
    return line


def hand_through(line: list[WanStreamDecoder], latents: Tensor, *, begins_shot: bool) -> Tensor:
    """Frames; what goes from part to part has the shape that the next one expects."""
    x = line[0].hand_on(latents)
    for decoder in line[1:]:
        shape, dtype = decoder.handed_shape(*latents.shape[1:])
        assert (x.shape[1:], x.dtype) == (torch.Size(shape[1:]), dtype)
        assert len(x) == shape[0] or (begins_shot and len(x) < shape[0])
        x = decoder.hand_on(x)
    return x


@pytest.mark.parametrize(("layout", "count"), [("2.1", 2), ("2.1", 5), ("2.2", 3), ("2.2", 5), ("2.2 narrow", 2)])
def test_a_line_gives_the_frames_of_a_whole_decode_and_goes_on_as_a_line_of_any_length(layout: str, count: int) -> None:
    vae, latents = make_vae(layout), torch.randn(4, 6, 6, 4, generator=torch.Generator().manual_seed(1))
    whole, line = WanStreamDecoder(vae), make_line(vae, count)
    before, state, after = whole.push(latents[:, :4]), whole.state(), whole.push(latents[:, 4:])
    assert torch.equal(hand_through(line, latents[:, :4], begins_shot=True), before)
    joined = join_states([decoder.state() for decoder in line])
    assert joined.keys() == state.keys()
    assert all(torch.equal(joined[name], state[name]) for name in state)
    assert all(joined[name].stride() == state[name].stride() for name in state)
    other = make_line(vae, count - 1)
    for decoder in other:
        decoder.load_state(joined)
    assert torch.equal(hand_through(other, latents[:, 4:], begins_shot=False), after)
    kept = [len(decoder.state()) - 1 for decoder in other]
    assert sum(kept) == len(state) - 1  # each keeps no more than its own


def test_the_embedded_decoder_has_two_even_halves() -> None:
    vae = AutoencoderKLWan.from_pretrained(Path(longvid.__file__).parent / "assets" / "mini", subfolder="vae")
    parts = [PartDecoder(vae, index, 2) for index in range(2)]
    assert [(part.scale, part.frames) for part in parts] == [(1, 1), (4, 4)]
    last = parts[1].up[-1].resnets[-1]
    assert parts[1].channels == last.num_inputs  # with what encodes the film, the last block alone is half of it


@given(works=st.lists(st.integers(1, 100), min_size=1, max_size=7), data=st.data())
def test_runs_are_as_even_as_they_go(works: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(works)))
    bounds = most_even(works, count)
    assert bounds[0] == 0 and bounds[-1] == len(works) and len(bounds) == count + 1
    runs = [works[a:b] for a, b in pairwise(bounds)]
    assert all(runs)
    assert max(map(sum, runs)) <= -(-sum(works) // count) + max(works)
