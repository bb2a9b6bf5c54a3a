"""The streaming decoder against diffusers' decode."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from longvid.kernels import convolve
from longvid.models.wan_vae import WanStreamDecoder, to_uint8
from longvid.models.wan_vae_bands import BandedDecoder
from longvid.models.wan_vae_layers import ChannelsLastDecoder, State

LAYOUTS: dict[str, dict[str, Any]] = {
    "2.1": {"base_dim": 3, "dim_mult": [1, 1, 1, 1]},
    "2.1 widening": {"base_dim": 16, "dim_mult": [1, 2, 4, 4]},
    "2.2": {"base_dim": 8, "dim_mult": [1, 2, 4, 4], "is_residual": True, "patch_size": 2, "scale_factor_spatial": 16},
    "2.2 narrow": {"base_dim": 8, "dim_mult": [1, 2, 2], "is_residual": True, "temperal_downsample": [True, True]},
}


@pytest.fixture(params=["matrix units", "oneDNN"])
def units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With convolutions of ours, where the processor has matrix units, and with torch's."""
    if request.param == "oneDNN":
        monkeypatch.setattr(convolve, "suits", lambda x: False)


def make_vae(layout: str, dtype: torch.dtype = torch.float32) -> AutoencoderKLWan:
    torch.manual_seed(0)
    options = LAYOUTS[layout]
    if options.get("patch_size"):
        options = options | {"in_channels": 12, "out_channels": 12}
    means, stds = [0.1, -0.2, 0.3, 0.0], [1.5, 0.5, 2.0, 1.0]
    vae = AutoencoderKLWan(z_dim=4, num_res_blocks=1, latents_mean=means, latents_std=stds, **options)
    for name, parameter in vae.named_parameters():
        if name.endswith("gamma"):
            parameter.data.uniform_(0.5, 1.5)
    return vae.eval().to(dtype)


def make_latents(count: int = 6) -> Tensor:
    return torch.randn(4, count, 6, 4, generator=torch.Generator().manual_seed(1))


def whole_decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Frames uint8 of diffusers' decode."""
    shape = (1, 4, 1, 1, 1)
    std, mean = (torch.tensor(values).view(shape) for values in (vae.config.latents_std, vae.config.latents_mean))
    with torch.no_grad():
        return to_uint8(vae.decode((latents[None] * std + mean).to(vae.dtype)).sample[0])


def push_in(decoder: WanStreamDecoder, latents: Tensor, counts: Sequence[int]) -> Tensor:
    decoder.reset()
    return torch.cat([decoder.push(part) for part in latents.split(list(counts), dim=1)])


def decode(decoder: ChannelsLastDecoder, latents: Tensor, counts: Sequence[int], state: State) -> Tensor:
    """Latents [C, F, h, w], in passes of these sizes, to [C, T, H, W]."""
    parts = latents[None].split(list(counts), dim=2)
    with torch.no_grad():
        return torch.cat([decoder(part, state, first_chunk=i == 0) for i, part in enumerate(parts)], dim=2)[0]


@pytest.mark.usefixtures("units")
@pytest.mark.parametrize("counts", [(1, 1, 1, 1, 1, 1), (1, 2, 3)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_compute_what_the_stock_decoder_computes(layout: str, counts: tuple[int, ...]) -> None:
    vae, latents = make_vae(layout), make_latents()
    caches: list[State] = [[None] * vae._cached_conv_counts["decoder"] for _ in range(2)]
    parts = []
    with torch.no_grad():
        for i in range(6):
            x = vae.post_quant_conv(latents[None, :, i : i + 1])
            parts.append(vae.decoder(x, feat_cache=caches[0], feat_idx=[0], first_chunk=i == 0)[0])
    expected = torch.cat(parts, dim=1)
    got = decode(ChannelsLastDecoder(vae), latents, counts, caches[1])
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= 1e-5
    for ours, stock in zip(*reversed(caches), strict=True):
        if isinstance(stock, Tensor):
            torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bits_do_not_depend_on_the_pushes(layout: str, dtype: torch.dtype) -> None:
    decoder, latents = WanStreamDecoder(make_vae(layout, dtype)), make_latents(9)
    whole = push_in(decoder, latents, (9,))
    for counts in ((2, 1, 3, 3), (1,) * 9):
        assert torch.equal(push_in(decoder, latents, counts), whole)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_streamed_decode_is_the_stock_decode_but_for_rounding(layout: str) -> None:
    vae, latents = make_vae(layout), make_latents()
    whole = whole_decode(vae, latents)
    streamed = push_in(WanStreamDecoder(vae), latents, (2, 1, 3))
    assert streamed.shape == whole.shape
    assert (streamed.int() - whole.int()).abs().max() <= 1
    assert (streamed != whole).float().mean() < 1e-3


def test_matrix_units_give_the_bits_however_many_latents_go_together() -> None:
    vae, latents = make_vae("2.2"), make_latents()
    count = vae._cached_conv_counts["decoder"]
    if not convolve.suits(vae.post_quant_conv.weight.detach()):
        pytest.skip("needs matrix units")
    states: list[State] = [[None] * count for _ in range(2)]
    one_by_one = decode(ChannelsLastDecoder(vae), latents, (1,) * 6, states[0])
    assert torch.equal(decode(ChannelsLastDecoder(vae), latents, (1, 2, 3), states[1]), one_by_one)
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other


def test_a_resumed_decode_goes_on_to_the_last_bit() -> None:
    latents = make_latents(9)
    decoder, resumed = (WanStreamDecoder(make_vae("2.1 widening")) for _ in range(2))
    decoder.push(latents[:, :5])
    resumed.load_state({name: values.clone() for name, values in decoder.state().items()})
    assert torch.equal(decoder.push(latents[:, 5:]), resumed.push(latents[:, 5:]))


def test_bfloat16_errs_as_little_as_the_stock_decoder_in_bfloat16() -> None:
    latents = make_latents()
    exact = whole_decode(make_vae("2.1 widening"), latents).float()
    stock = whole_decode(make_vae("2.1 widening", torch.bfloat16), latents).float()
    ours = WanStreamDecoder(make_vae("2.1 widening", torch.bfloat16)).push(latents).float()
    assert (ours - exact).square().mean() <= 1.5 * (stock - exact).square().mean() + 0.1


@pytest.mark.usefixtures("units")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bands_of_rows_give_the_whole_decode(layout: str) -> None:
    vae, latents = make_vae(layout), make_latents(4)
    count = vae._cached_conv_counts["decoder"]
    whole = decode(ChannelsLastDecoder(vae), latents, (1,) * 4, [None] * count)
    for rows in (1, 2, 4, 6):
        banded = decode(BandedDecoder(vae, rows), latents, (1,) * 4, [None] * count)
        assert banded.shape == whole.shape
        assert (banded - whole).abs().max() <= 1e-5


def test_a_resumed_decode_in_bands_goes_on_to_the_last_bit() -> None:
    latents = make_latents(6)
    decoder, resumed = (WanStreamDecoder(make_vae("2.2")) for _ in range(2))
    for one in (decoder, resumed):
        one.split_rows(2)
    decoder.push(latents[:, :3])
    resumed.load_state({name: values.clone() for name, values in decoder.state().items()})
    assert torch.equal(decoder.push(latents[:, 3:]), resumed.push(latents[:, 3:]))


def test_bands_of_rows_take_less_memory() -> None:
    """Beyond what both must keep from latent to latent: in a process each, the peak while a film is decoded."""
    whole, banded = (peak_of_decode(rows) for rows in (0, 4))
    assert banded[1] == pytest.approx(whole[1], rel=0.05)
    assert banded[0] - banded[1] < 0.5 * (whole[0] - whole[1])


def peak_of_decode(rows: int) -> tuple[int, int]:
    """Bytes by which memory grew at the peak, and those of the state that stays."""
    code = f"""
import json, torch
from pathlib import Path
from diffusers import AutoencoderKLWan
from longvid.models.wan_vae import WanStreamDecoder
def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
torch.set_num_threads(1)
options = dict(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
decoder = WanStreamDecoder(AutoencoderKLWan(base_dim=32, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **options))
latents = torch.randn(4, 2, 64, 20)
decoder.push(latents[:, :1, :2, :2])
decoder.split_rows({rows}) if {rows} else decoder.reset()
before = peak()
decoder.push(latents)
print(json.dumps([peak() - before, sum(value.nbytes for value in decoder.state().values())]))
"""
    # Each tensor a mapping of its own, so that what is freed is given back and the peak is that of live tensors.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    grown, kept = json.loads(done.stdout)
    return grown, kept
