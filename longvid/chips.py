"""Accelerators that a render can be planned for: what their makers state, and how much of it is attained.

Rates are dense (without structured sparsity) and one way. `attained` is the share of the bf16 rate that a transformer's
layers get with torch's own attention, all told: derived from published times of these models, as each comment says.
docs/plan.md has the pages that the figures were checked against.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

from longvid.document import nearest
from longvid.errors import InputError
from longvid.settings import Settings

FP32_ATTAINED = 0.7
"""Of the plain fp32 rate: torch multiplies fp32 matrices without tensor cores, which power does not hold back."""
DRIVER = Path("/proc/driver/nvidia/gpus")
"""Where NVIDIA's driver says which GPUs it has."""


@dataclass(frozen=True)
class Chip:
    """An accelerator, and how it is usually joined to others.

    `tflops`: bf16 on tensor cores, 10^12 FLOPs a second; `tops` int8 on them, `fp32` without them. `memory_gb` and
    `bandwidth`: 10^9 bytes, and a second. `link`: 10^9 bytes a second from one to another in a machine of `node` of
    them, `network` to one in another machine, `host` from the machine's memory (PCIe). `marks` are in the name that
    the driver has for it.
    """

    name: str
    marks: tuple[str, ...]
    tflops: float
    tops: float
    fp32: float
    memory_gb: float
    bandwidth: float
    link: float
    network: float
    host: float
    attained: float
    node: int = 8
    latency: float = 20e-6
    """Seconds until the first byte of a message is there."""
    fp32_attained: float = FP32_ATTAINED


CHIPS = (
    # NVIDIA H100 data sheet, SXM: 1,979 TFLOPS bf16 and 3,958 TOPS int8 with sparsity, 67 TFLOPS fp32, 80 GB at 3.35
    # TB/s, NVLink 900 GB/s and PCIe 5.0 128 GB/s both ways. DGX H100: one 400 Gb/s port a GPU. Attained: HunyuanVideo,
    # 720p, 129 frames, 50 steps is 603 PFLOP (`hunyuan_sizes`) in 1,904 s (xDiT's table): 0.32; Wan2.1-I2V-14B, 480p,
    # 81 frames is 3.4 PFLOP a step in 9.77 s (diffusers, in LightX2V's table): 0.35.
    Chip("h100-80g", ("H100", "80GB HBM3"), 989, 1979, 67, 80, 3350, 450, 50, 64, 0.35),
    # NVIDIA H200 data sheet, SXM: the same chip with 141 GB at 4.8 TB/s.
    Chip("h200-141g", ("H200",), 989, 1979, 67, 141, 4800, 450, 50, 64, 0.35),
    # NVIDIA A100 data sheet, SXM: 312 TFLOPS, 624 TOPS, 19.5 TFLOPS fp32, 80 GB at 2,039 GB/s or 40 GB at 1,555 GB/s,
    # NVLink 600 GB/s and PCIe 4.0 64 GB/s both ways. DGX A100: one 200 Gb/s port a GPU. Attained: FlashAttention-2
    # (arXiv 2307.08691) reaches 0.5 to 0.73 of the rate in attention; between that and Hopper's.
    Chip("a100-80g", ("A100-SXM4", "80GB"), 312, 624, 19.5, 80, 2039, 300, 25, 32, 0.5),
    Chip("a100-40g", ("A100-SXM4", "40GB"), 312, 624, 19.5, 40, 1555, 300, 25, 32, 0.5),
    # NVIDIA L40S data sheet: 362 TFLOPS bf16, 733 TOPS int8, 91.6 TFLOPS fp32, 48 GB at 864 GB/s, PCIe 4.0 x16, 64 GB/s
    # both ways. Attained: between Hopper's and its sibling's, the RTX 4090, for it has twice the rate at less power.
    Chip("l40s-48g", ("L40S",), 362, 733, 91.6, 48, 864, 32, 12.5, 32, 0.4),
    # NVIDIA Ada GPU architecture whitepaper: 165.2 TFLOPS bf16 with fp32 sums, 660.6 TOPS int8, 82.6 TFLOPS fp32, 24 GB
    # at 1,008 GB/s, PCIe 4.0 x16 (32 GB/s one way, to another through the host: half of it). Attained: Wan2.1-T2V-1.3B,
    # 480p, 81 frames, 50 steps is 28 PFLOP in about 240 s (Wan2.1's README).
    Chip("rtx4090-24g", ("RTX 4090",), 165.2, 660.6, 82.6, 24, 1008, 16, 1.25, 32, 0.7),
    # NVIDIA RTX Blackwell architecture whitepaper: 209.5 TFLOPS bf16 with fp32 sums, 838 TOPS int8, 104.8 TFLOPS fp32,
    # 32 GB at 1,792 GB/s, PCIe 5.0 x16 (64 GB/s one way, to another through the host: half of it). Attained: as the
    # RTX 4090.
    Chip("rtx5090-32g", ("RTX 5090",), 209.5, 838, 104.8, 32, 1792, 32, 1.25, 64, 0.7),
    # NVIDIA DGX B200 data sheet: 8 GPUs with 36 PFLOPS bf16 and 72 POPS int8 with sparsity, 80 TFLOPS fp32 each, 1,440
    # GB at 64 TB/s, NVLink 1.8 TB/s a GPU and PCIe 5.0 128 GB/s both ways; one 400 Gb/s port a GPU. Attained: as
    # Hopper.
    Chip("b200-180g", ("B200",), 2250, 4500, 80, 180, 8000, 900, 50, 64, 0.35),
    # AMD Instinct MI300X data sheet: 1,307 TFLOPS bf16, 2,615 TOPS int8, 163.4 TFLOPS fp32, 192 GB at 5.3 TB/s,
    # Infinity Fabric 128 GB/s to each of 7 others and PCIe 5.0 128 GB/s, both ways; one 400 Gb/s port a GPU. Attained:
    # as Hopper.
    Chip("mi300x-192g", ("MI300X",), 1307, 2615, 163.4, 192, 5300, 64, 50, 64, 0.35),
)

CPU = Chip(
    "cpu", (), 0.1, 0.1, 0.1, inf, 10, 1, 1, inf, attained=0.5, fp32_attained=0.5, latency=200e-6
)  # a few cores, with gloo over the loopback: for comparing meshes, not for times
UNKNOWN = replace(next(chip for chip in CHIPS if chip.name == "l40s-48g"), name="an unknown GPU", memory_gb=inf)
"""What a GPU that is not in the table is taken for."""


def find_chip(name: str) -> Chip:
    """A chip by its name. Raises InputError that names the nearest."""
    chips = {chip.name: chip for chip in CHIPS}
    if name not in chips:
        raise InputError(f"--gpu {name}: no such chip, {nearest(name, sorted(chips))}")
    return chips[name]


def chip_of(device_name: str) -> Chip:
    """The chip that the driver names so."""
    return next((chip for chip in CHIPS if all(mark in device_name for mark in chip.marks)), UNKNOWN)


def chip_here(settings: Settings, driver: Path = DRIVER) -> Chip:
    """What a render with these settings would run on here, as far as can be told without torch."""
    lines = [] if settings.runtime.device == "cpu" else _read_driver(driver)
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return chip_of(names[0]) if names else CPU


def _read_driver(driver: Path) -> list[str]:
    return [line for file in sorted(driver.glob("*/information")) for line in file.read_text().splitlines()]
