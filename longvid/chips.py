"""Accelerators that a render can be planned for: what their makers state, and how much of it is attained.

Rates are dense (without structured sparsity) and one way. `attained` is the share of the bf16 rate that a transformer's
layers get with torch's own attention, all told: derived from published times of these models, as each comment says.
"""

from __future__ import annotations

from dataclasses import dataclass

from longvid.document import nearest
from longvid.errors import InputError


@dataclass(frozen=True)
class Chip:
    """An accelerator, and how it is usually joined to others.

    `tflops`: bf16 on tensor cores, 10^12 FLOPs a second. `memory_gb` and `bandwidth`: 10^9 bytes, and a second. `link`:
    10^9 bytes a second from one to another in a machine of `node` of them, `network` to one in another machine.
    """

    name: str
    tflops: float
    memory_gb: float
    bandwidth: float
    link: float
    network: float
    attained: float
    node: int = 8
    fp32_share: float = 0.5
    """The fp32 rate, as a share of bf16: TF32 where there is one."""


CHIPS = (
    # NVIDIA H100 data sheet, SXM: 1,979 TFLOPS bf16 with sparsity, 80 GB at 3.35 TB/s, NVLink 900 GB/s both ways. DGX
    # H100: one 400 Gb/s port a GPU. Attained: HunyuanVideo, 720p, 129 frames, 50 steps is 603 PFLOP (`hunyuan_sizes`)
    # in 1,904 s (xDiT's table): 0.32; Wan2.1-I2V-14B, 480p, 81 frames is 3.4 PFLOP a step in 9.77 s (diffusers, in
    # LightX2V's table): 0.35.
    Chip("h100-80g", 989, 80, 3350, 450, 50, 0.35),
    # NVIDIA H200 data sheet, SXM: the same chip with 141 GB at 4.8 TB/s.
    Chip("h200-141g", 989, 141, 4800, 450, 50, 0.35),
    # NVIDIA A100 data sheet, SXM: 312 TFLOPS, 80 GB at 2,039 GB/s or 40 GB at 1,555 GB/s, NVLink 600 GB/s both ways.
    # DGX A100: one 200 Gb/s port a GPU. Attained: FlashAttention-2 (arXiv 2307.08691) reaches 0.5 to 0.73 of the rate
    # in attention; between that and Hopper's.
    Chip("a100-80g", 312, 80, 2039, 300, 25, 0.5),
    Chip("a100-40g", 312, 40, 1555, 300, 25, 0.5),
    # NVIDIA L40S data sheet: 362 TFLOPS bf16, 48 GB at 864 GB/s, PCIe 4.0 x16, 64 GB/s both ways. Attained: between
    # Hopper's and its sibling's, the RTX 4090, for it has twice the rate at less power.
    Chip("l40s-48g", 362, 48, 864, 32, 12.5, 0.4),
    # NVIDIA Ada GPU architecture whitepaper: 165.2 TFLOPS bf16 with fp32 sums, 24 GB at 1,008 GB/s, PCIe 4.0 x16 (32
    # GB/s one way, through the host: half of it). Attained: Wan2.1-T2V-1.3B, 480p, 81 frames, 50 steps is 28 PFLOP in
    # about 240 s (Wan2.1's README).
    Chip("rtx4090-24g", 165.2, 24, 1008, 16, 1.25, 0.7),
    # NVIDIA RTX Blackwell architecture whitepaper: 209.5 TFLOPS bf16 with fp32 sums, 32 GB at 1,792 GB/s, PCIe 5.0
    # x16 (64 GB/s one way, through the host: half of it). Attained: as the RTX 4090.
    Chip("rtx5090-32g", 209.5, 32, 1792, 32, 1.25, 0.7),
    # NVIDIA HGX B200 data sheet: 8 GPUs with 36 PFLOPS bf16 with sparsity, 1.44 TB at 62 TB/s, NVLink 1.8 TB/s a GPU
    # both ways; one 400 Gb/s port a GPU. Attained: as Hopper.
    Chip("b200-180g", 2250, 180, 7700, 900, 50, 0.35),
    # AMD Instinct MI300X data sheet: 1,307 TFLOPS bf16, 192 GB at 5.3 TB/s, Infinity Fabric 128 GB/s both ways to
    # each of 7 others; one 400 Gb/s port a GPU. Attained: as Hopper.
    Chip("mi300x-192g", 1307, 192, 5300, 64, 50, 0.35),
)


def find_chip(name: str) -> Chip:
    """A chip by its name. Raises InputError that names the nearest."""
    chips = {chip.name: chip for chip in CHIPS}
    if name not in chips:
        raise InputError(f"--gpu {name}: no such chip, {nearest(name, sorted(chips))}")
    return chips[name]
