"""Kernels of block-sparse attention on one GPU: held to fp64 oracles, then timed beside every dense kernel at hand.

python benchmarks/gpu.py                       # writes benchmarks/results/gpu-<device>.json
python benchmarks/gpu.py --films               # and films end to end, dense beside each policy
python benchmarks/gpu.py --device cpu --quick  # the same code on small shapes, through the CPU's kernels

Needs torch, Triton on a GPU, and longvid without its requirements (`pip install --no-deps --no-build-isolation .`).
Whatever else is absent is named in the result. What fails is named there, too, and the rest goes on: parts run in
processes of their own, for an illegal access or a kernel that never ends takes its process with it, and another goes on
behind the case. The file is written anew after every case, so a run that is cut short leaves what it has; after
--budget-s nothing else is begun.
Shapes: B batch, L queries, T keys, H heads, D of a head, R query blocks, C key blocks.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import itertools
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from longvid.kernels import reference
from longvid.kernels.dense import attend_lse
from longvid.kernels.dispatch import backend_for, sparse_attention
from longvid.kernels.layout import BlockLayout, Blocks, even_blocks, make_layout, one_group, own_groups
from longvid.kernels.pool import pool
from longvid.kernels.score import block_mass
from longvid.kernels.select import top_k, top_p

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
POLICIES = ("radial", "sta", "adaspa", "svg2")
LOST = 70
"""The exit code of a process whose device no longer answers: another may go on."""
MARK = "found: "
"""What lines begin with that a part's process has found something."""
CASE_S, GRACE_S = 150.0, 20.0
"""A case may take so long, and what is under way when the budget is over."""
STORY = 'scenes:\n  - {prompt: "a large red circle moving left", for: 5s}\n'


@dataclass(frozen=True)
class Plan:
    """What is timed."""

    lengths: tuple[int, ...]
    heads: int
    head_dim: int
    dtype: torch.dtype
    tiles: tuple[int, ...] = (64, 128)
    densities: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1, 0.05)
    flex: frozenset[tuple[int, int, float]] = frozenset()
    """Lengths, tiles and densities of FlexAttention, which compiles for each: that takes longer than all the rest."""


# Those that say most come first.
FULL = Plan(
    (16384, 4096, 32760, 8192, 2048, 1024),
    24,
    128,
    torch.bfloat16,
    flex=frozenset((length, 128, density) for length in (16384, 32760) for density in (0.25, 0.1)),
)
QUICK = Plan((256, 500), 2, 64, torch.float32, densities=(1.0, 0.25))


class Clock:
    """How long may go on what begins."""

    def __init__(self, budget_s: float) -> None:
        self._end = time.monotonic() + budget_s

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()

    @property
    def is_over(self) -> bool:
        return self.left_s < 0


@dataclass(frozen=True)
class Case:
    """Something to be found out on its own; `said` is what is known of it beforehand."""

    kind: Literal["gate", "point", "films"]
    said: dict[str, Any]
    work: Callable[[], dict[str, Any]]


def why(error: BaseException) -> str:
    """What went wrong, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# What the machine is.


def machine(device: torch.device) -> dict[str, Any]:
    facts = {name: _version(name) for name in ("torch", "triton", "flash-attn", "diffusers")}
    facts |= {"python": platform.python_version(), "cuda": torch.version.cuda, "hip": torch.version.hip}
    if device.type != "cuda":
        return facts | {"device": "cpu", "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    facts |= {"device": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
    return facts | {"capability": [properties.major, properties.minor], "driver": _driver()}


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        return f"unknown: {error}"


# Correctness, before anything is timed.


Check = tuple[str, Callable[[], tuple[Any, Any]]]
"""A kernel on some input: its name, and what it found beside what its oracle did."""


def gate_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Every kernel against its oracle: the largest error beside its bound. One that fails is wrong, too."""
    torch.manual_seed(0)
    for name, check in checks(device, dtype):
        yield Case("gate", {"gate": name, "dtype": _name(dtype)}, functools.partial(gate, dtype, check))
    if dtype == torch.float32:
        for name, select in select_gates(device):
            yield Case("gate", {"gate": name, "dtype": _name(dtype)}, select)


def checks(device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """Attention, dense and on every layout, block mass and pooling."""
    for head_dim in (64, 80, 256):
        for name, layout in test_layouts(device):
            q, k, v = random_qkv(device, dtype, 2, 400, 500, 3, head_dim)
            bias = torch.randn(1, 3, 500, device=device) if "bias" in name else None
            if bias is not None:
                bias[..., ::5] = -math.inf
            inputs = (q, k, v, layout)
            yield f"attention, {name}, D {head_dim}", functools.partial(both, "attention", *inputs, k_bias=bias)
    q, k, v = random_qkv(device, dtype, 2, 400, 500, 3, 64)
    yield "dense attention", functools.partial(both, "dense", q, k, v)
    if has_descriptors(device) and dtype != torch.float32:
        for size in (64, 128):
            layout = random_layout(even_blocks(400, size), even_blocks(500, size), one_group(3)).to(device)
            described_inputs = random_qkv(device, dtype, 2, 400, 500, 3, 128)
            yield f"attention by descriptors, {size}", functools.partial(both, "described", *described_inputs, layout)
    lse = torch.einsum("blhd,bthd->blht", q.double(), k.double()).div(8).logsumexp(-1).float()
    for name, layout in test_layouts(device):
        if layout.num_groups == 1:
            yield f"block mass, {name}", functools.partial(both, "mass", q, k, lse, layout.q, layout.k)
            yield f"pool, {name}", functools.partial(both, "pool", q, layout.q)


def has_descriptors(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    from longvid.kernels import block_sparse

    return block_sparse.chip_of(device) in block_sparse.DESCRIPTOR_CHIPS


def described(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> tuple[Tensor, Tensor]:
    """Attention with keys and values read by the copy engine; raises where the chip or the tensors do not suit."""
    from longvid.kernels import block_sparse

    if not block_sparse.suits_descriptors(k, v):
        raise RuntimeError("descriptors do not serve this chip")
    return block_sparse.forward(q, k, v, layout, 1 / math.sqrt(q.shape[3]), None, "descriptors")


def both(kernel: str, *inputs: Any, **options: Any) -> tuple[Any, Any]:
    """What a kernel and its oracle make of the same inputs."""
    if kernel == "attention":
        return sparse_attention(*inputs, **options), reference.sparse_attention(*inputs, **options)
    if kernel == "dense":
        q, k, v = inputs
        whole = make_layout(*(even_blocks(x.shape[1], 64) for x in (q, k)), torch.ones(1, 7, 8) > 0, one_group(3))
        return attend_lse(q, k, v), reference.sparse_attention(q, k, v, whole.to(q.device))
    if kernel == "described":
        return described(*inputs), reference.sparse_attention(*inputs)
    if kernel == "mass":
        return [block_mass(*inputs)], [reference.block_mass(*inputs)]
    return pool(*inputs), reference.pool(*inputs)


def gate(dtype: torch.dtype, check: Callable[[], tuple[Any, Any]]) -> dict[str, Any]:
    """Errors are relative to values over 1. What is infinite must be so in both."""
    errors = [0.0]
    for one, other in zip(*check(), strict=True):
        finite = other.isfinite()
        same = torch.equal(one.isfinite(), finite)
        error = (one.double() - other)[finite].abs() / other[finite].abs().clamp(min=1)
        errors.append(float(error.amax()) if same and error.numel() else 0.0 if same else math.inf)
    bound = TOLERANCE[dtype]
    return {"error": max(errors), "bound": bound, "ok": max(errors) <= bound}


def select_gates(device: torch.device) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """On a GPU the fused selection against torch's sort on the CPU; ties and infinities are among the scores."""
    scores = torch.randint(0, 50, (4, 64, 700), device=device).float()
    scores[0, :, ::7] = math.inf

    def compare(select: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Any]:
        wrong = int((select(x).cpu() != select(x.cpu())).sum())
        return {"error": wrong, "bound": 0, "ok": wrong == 0}

    yield "top-k", functools.partial(compare, lambda x: top_k(x, 70), scores)
    yield "top-p", functools.partial(compare, lambda x: top_p(x, 0.9), scores[1:])


def test_layouts(device: torch.device) -> list[tuple[str, BlockLayout]]:
    """Layouts of 400 queries and 500 keys of 2 × 3 heads."""
    cuts = torch.tensor([[0, 3, 3, 130, 400]], dtype=torch.int32)
    ragged_q = Blocks(cuts, torch.randperm(400)[None].int())
    own = Blocks(
        torch.cat([torch.zeros(6, 1), torch.randint(0, 501, (6, 8)).sort(-1).values, torch.full((6, 1), 500)], 1).int(),
        torch.stack([torch.randperm(500) for _ in range(6)]).int(),
    )
    skipping = own_groups(2, 3)
    skipping[0, 1] = -1
    cases = {
        "64": (even_blocks(400, 64), even_blocks(500, 64), one_group(3)),
        "128, bias": (even_blocks(400, 128), even_blocks(500, 128), one_group(3)),
        "ragged": (ragged_q, Blocks(torch.tensor([[0, 100, 100, 101, 500]], dtype=torch.int32)), one_group(3)),
        "every head its own, one skipped, bias": (ragged_q, own, skipping),
    }
    return [(name, random_layout(*case).to(device)) for name, case in cases.items()]


def random_layout(q: Blocks, k: Blocks, group: Tensor) -> BlockLayout:
    mask = torch.rand(int(group.max()) + 1, q.num_blocks, k.num_blocks) < 0.5
    mask[0, 0] = False
    return make_layout(q, k, mask, group)


def random_qkv(
    device: torch.device, dtype: torch.dtype, batch: int, queries: int, keys: int, heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(batch, n, heads, head_dim, device=device).to(dtype) for n in (queries, keys, keys))
    return q, k, v


def check_rows(out: Tensor, q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, tile: int) -> float:
    """The largest error of a few queries, all heads, in a layout of one group a head and blocks of one size."""
    rows = torch.randint(0, q.shape[1], (4,), device=q.device)
    mask_HnT = layout.mask()[:, rows // tile].repeat_interleave(tile, -1)[..., : k.shape[1]]
    errors = []
    for head in range(q.shape[2]):
        scores = q[0, rows, head].double() @ k[0, :, head].double().T / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(~mask_HnT[head], -math.inf).softmax(-1)
        errors.append((weights @ v[0, :, head].double() - out[0, rows, head].double()).abs().amax())
    return float(torch.stack(errors).amax())


# Time.


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median of repeated runs that fill half a second, after two to warm up."""
    for _ in range(2):
        work()
    started = time.perf_counter()
    _once(work, device)
    repeats = max(3, min(50, int(0.5 / max(time.perf_counter() - started, 1e-4))))
    return statistics.median(_once(work, device) for _ in range(repeats))


def _once(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1000


def dense_kernels(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], object]]:
    """Dense attention, by every library; whether one is there shows when it is called."""
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]

    def sdpa(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*heads_first)

    def flash_attn() -> object:
        from flash_attn import flash_attn_func

        return flash_attn_func(q, k, v)

    def flash_attn_3() -> object:
        from flash_attn_interface import flash_attn_func

        return flash_attn_func(q, k, v)

    names = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    fused = {f"SDPA {name}": functools.partial(sdpa, backend) for name, backend in names.items()}
    return {**fused, "flash-attn": flash_attn, "flash-attn 3": flash_attn_3}


def flex_kernel(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, tile: int) -> Callable[[], Tensor]:
    """FlexAttention with the same tiles; its output is [B, H, L, D]."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    mask = layout.mask()[None]
    counts = mask.sum(-1, dtype=torch.int32)
    columns = mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True).int()
    # All its tiles are full ones, whose scores need no look at the mask; without compilation there is only the mask.
    block_mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        torch.zeros_like(columns),
        counts,
        columns,
        BLOCK_SIZE=tile,
        mask_mod=lambda b, h, i, j: mask[b, h, i // tile, j // tile],
        seq_lengths=(q.shape[1], k.shape[1]),
        compute_q_blocks=False,  # for gradients alone
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    return lambda: compiled(*heads_first, block_mask=block_mask)


def try_seconds(work: Callable[[], object], device: torch.device) -> float | str:
    """Seconds, or why there are none: a library is absent, or does not do this."""
    try:
        return seconds(work, device)
    except Exception as error:
        return why(error)


# What is timed.


def point_cases(plan: Plan, length: int, device: torch.device) -> Iterator[Case]:
    """All tiles and densities of one length, beside the fastest dense kernel."""

    @functools.cache
    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        return random_qkv(device, plan.dtype, 1, length, length, plan.heads, plan.head_dim)

    @functools.cache
    def dense() -> dict[str, float | str]:
        return {name: try_seconds(kernel, device) for name, kernel in dense_kernels(*inputs()).items()}

    def work(tile: int, density: float) -> dict[str, Any]:
        q, k, v = inputs()
        fastest = min((value for value in dense().values() if isinstance(value, float)), default=math.nan)
        blocks = even_blocks(length, tile, device)
        find = functools.partial(find_layout, q, k, dense_lse(q, k, v, blocks), blocks, density)
        with_flex = (length, tile, density) in plan.flex
        return {"dense_s": dense(), **time_point(q, k, v, find, tile, fastest, with_flex=with_flex)}

    for tile, density in itertools.product(plan.tiles, plan.densities):
        said = {"length": length, "tile": tile, "wanted_density": density}
        yield Case("point", said, functools.partial(work, tile, density))


def dense_lse(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks) -> Tensor:
    """The LSE over all tiles, by our kernel, fp32 [B, L, H]."""
    everything = torch.ones(1, blocks.num_blocks, blocks.num_blocks, dtype=torch.bool, device=q.device)
    return sparse_attention(q, k, v, make_layout(blocks, blocks, everything, one_group(q.shape[2], q.device)))[1]


def find_layout(q: Tensor, k: Tensor, lse: Tensor, blocks: Blocks, density: float) -> BlockLayout:
    """Planning as AdaSpa does it: mass by a cached LSE of every fourth query, top-k, compressed rows."""
    mass = block_mass(q, k, lse, blocks, blocks, sample_every=4)
    mask = top_k(mass.flatten(0, 1), round(density * blocks.num_blocks))
    return make_layout(blocks, blocks, mask, own_groups(q.shape[0], q.shape[2], q.device))


def time_point(
    q: Tensor, k: Tensor, v: Tensor, find: Callable[[], BlockLayout], tile: int, dense_s: float, *, with_flex: bool
) -> dict[str, Any]:
    layout = find()
    out, _ = sparse_attention(q, k, v, layout)
    error = check_rows(out, q, k, v, layout, tile)
    attention_s = seconds(lambda: sparse_attention(q, k, v, layout), q.device)
    planning_s = seconds(find, q.device)
    return {
        **figures(layout.density(), attention_s, planning_s, dense_s, num_scores(q, k), q.shape[3]),
        **time_described(q, k, v, layout, out),
        **(time_flex(q, k, v, layout, tile, out) if with_flex else {"flex_s": "not timed here"}),
        "error": error,
        "ok": error <= TOLERANCE[q.dtype],
    }


def time_described(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, out: Tensor) -> dict[str, Any]:
    """Seconds with descriptors in place of pointers, or why there are none, and how far the output is from theirs."""
    try:
        difference = float((described(q, k, v, layout)[0] - out).abs().amax())
        return {
            "described_s": seconds(lambda: described(q, k, v, layout), q.device),
            "described_difference": difference,
        }
    except Exception as error:
        return {"described_s": why(error), "described_difference": None}


def time_flex(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, tile: int, out: Tensor) -> dict[str, Any]:
    """FlexAttention's seconds, or why there are none, and how far its output is from ours."""
    torch.compiler.reset()  # it stops to compile after some shapes
    try:
        kernel = flex_kernel(q, k, v, layout, tile)
        difference = float((kernel().transpose(1, 2) - out).abs().amax())
        return {"flex_s": seconds(kernel, q.device), "flex_difference": difference}
    except Exception as error:
        return {"flex_s": why(error), "flex_difference": None}


def num_scores(q: Tensor, k: Tensor) -> int:
    return q.shape[0] * q.shape[1] * k.shape[1] * q.shape[2]


def figures(
    density: float, attention_s: float, planning_s: float, dense_s: float, scores: int, head_dim: int
) -> dict[str, float]:
    """What follows from the times. Only computed scores count as work: 4 · D operations each."""
    return {
        "density": density,
        "attention_s": attention_s,
        "planning_s": planning_s,
        "sum_s": attention_s + planning_s,
        "speedup": dense_s / attention_s,
        "speedup_with_planning": dense_s / (attention_s + planning_s),
        "efficiency": dense_s / attention_s * density,
        "tflops": 4 * head_dim * density * scores / attention_s / 1e12,
    }


def crossovers(points: list[dict[str, Any]], key: str) -> dict[str, int | None]:
    """For each tile and density the shortest length from which on sparse is faster at every longer one too."""
    found: dict[str, int | None] = {}
    for point in sorted((point for point in points if key in point), key=lambda point: point["length"]):
        case = f"tile {point['tile']}, density {point['wanted_density']}"
        faster = point[key] > 1
        found[case] = (found.get(case) or point["length"]) if faster else None
    return found


def as_line(point: dict[str, Any]) -> str:
    if "failed" in point:
        return (
            f"{point['length']:6} tokens, tile {point['tile']:3}, density {point['wanted_density']}: {point['failed']}"
        )
    flex = f"{point['flex_s'] * 1e3:.3f} ms" if isinstance(point["flex_s"], float) else "-"
    return (
        f"{point['length']:6} tokens, tile {point['tile']:3}, density {point['density']:.3f}:"
        f" {point['attention_s'] * 1e3:8.3f} ms, planning {point['planning_s'] * 1e3:7.3f} ms,"
        f" {point['speedup']:5.2f}x dense, {point['tflops']:6.1f} TFLOP/s, flex {flex}"
        + ("" if point["ok"] else f"  WRONG by {point['error']:.2g}")
    )


# Films.


def time_films(model: str, device: torch.device, clock: Clock) -> dict[str, Any]:
    """Films end to end, dense and by policy, and how near to the dense film they are; without diffusers, why not."""
    results: dict[str, Any] = {}
    try:
        _time_films(model, device, clock, results)
    except Exception as error:
        results["failed"] = why(error)
    return results


def _time_films(model: str, device: torch.device, clock: Clock, results: dict[str, Any]) -> None:
    from longvid.engine import Engine

    with tempfile.TemporaryDirectory() as folder:
        story = Path(folder) / "story.yaml"
        story.write_text(STORY)
        for policy in ("dense", *POLICIES):
            if clock.is_over:
                return
            engine = Engine.load(model, overrides=[f"runtime.device={device.type}", f"attention.policy={policy}"])
            film = Path(folder) / f"{policy}.mp4"
            times = []
            for _ in range(2):  # the first render compiles and warms up
                film.unlink(missing_ok=True)
                started = time.perf_counter()
                engine.render(story, film)
                times.append(time.perf_counter() - started)
            psnr = psnr_of(film, film.with_name("dense.mp4"))
            speedup = results["dense"]["seconds"] / times[1] if results else 1.0
            results[policy] = {"first_s": times[0], "seconds": times[1], "speedup": speedup, "psnr_db": psnr}


def psnr_of(film: Path, dense: Path) -> float:
    from longvid.metrics.fidelity import Fidelity
    from longvid.metrics.reader import FilmReader

    fidelity = Fidelity()
    with FilmReader(film) as one, FilmReader(dense) as other:
        for image, expected in zip(one.frames(), other.frames(), strict=True):
            fidelity.push(image, expected)
    return fidelity.psnr()


# Parts: each a process.


def parts(plan: Plan, device: torch.device, *, films: bool) -> list[str]:
    """Those that say most come first."""
    dtypes = (torch.bfloat16, torch.float32, torch.float16)[: 3 if device.type == "cuda" else 2]
    gates = [f"gates {_name(dtype)}" for dtype in dtypes]
    lengths = [f"{length} tokens" for length in plan.lengths]
    return [*gates[:2], lengths[0], *gates[2:], *lengths[1:], *(["films"] if films else [])]


def cases(part: str, plan: Plan, device: torch.device, clock: Clock, model: str) -> Iterator[Case]:
    first, _, second = part.partition(" ")
    if first == "gates":
        return gate_cases(device, getattr(torch, second))
    if first == "films":
        return iter([Case("films", {}, lambda: time_films(model, device, clock))])
    return point_cases(plan, int(first), device)


def run_cases(some: Iterator[Case], first: int, device: torch.device, clock: Clock) -> None:
    """In a part's own process: the cases from one on, each told as a line."""
    for number, case in enumerate(some):
        if number < first:
            continue
        if clock.is_over:
            return
        try:
            found = case.work()
        except Exception as error:
            found = {"failed": why(error), "ok": False}
        print(MARK + json.dumps({"number": number, "kind": case.kind, **case.said, **found}), flush=True)
        if "failed" in found and is_lost(device):
            sys.exit(LOST)


def is_lost(device: torch.device) -> bool:
    """Whether the device no longer answers this process, as after an illegal access."""
    if device.type != "cuda":
        return False
    try:
        torch.zeros(1, device=device).cpu()
    except Exception:
        return True
    return False


def run_part(command: Sequence[str], clock: Clock, take: Callable[[dict[str, Any]], None]) -> bool:
    """Have a part's cases run by processes, one behind the other where one ends early; whether all cases were."""
    first = 0
    while not clock.is_over:
        options = ["--first", str(first), "--budget-s", str(clock.left_s)]
        with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            guard = _guard(process, clock)
            for line in process.stdout:
                guard.cancel()
                guard = _guard(process, clock)
                if line.startswith(MARK):
                    found = json.loads(line.removeprefix(MARK))
                    first = found.pop("number") + 1
                    take(found)
            guard.cancel()
        if process.returncode == 0:
            return not clock.is_over
        if process.returncode != LOST:  # in the midst of a case
            take({"kind": "lost", "case": first, "failed": f"its process ended with code {process.returncode}"})
            first += 1
    return False


def _guard(process: subprocess.Popen[str], clock: Clock) -> threading.Timer:
    """Ends a process whose case takes too long."""
    timer = threading.Timer(min(CASE_S, max(clock.left_s, 0) + GRACE_S), process.kill)
    timer.daemon = True
    timer.start()
    return timer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--films", action="store_true", help="render films too")
    parser.add_argument("--model", default="mini", help="of the films; a small one stays dense, below the crossover")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu-<device>.json; none with --quick")
    parser.add_argument("--budget-s", type=float, default=540.0, help="seconds after which nothing else is begun")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device, plan, clock = torch.device(args.device), QUICK if args.quick else FULL, Clock(args.budget_s)
    if args.part:
        run_cases(cases(args.part, plan, device, clock, args.model), args.first, device, clock)
        return
    facts = machine(device)
    name = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    out = args.out or (None if args.quick else Path(__file__).parent / "results" / f"gpu-{name}.json")
    shape = {"heads": plan.heads, "head_dim": plan.head_dim, "dtype": _name(plan.dtype)}
    result: dict[str, Any] = {"machine": facts, "backend": backend_for(device), "shape": shape, "is_complete": False}
    result |= {"gates": [], "points": [], "lost": []}
    command = [sys.executable, "-P", __file__, "--device", args.device, "--model", args.model]
    command += ["--quick"] if args.quick else []
    ends = [measure(result, part, command, clock, out) for part in parts(plan, device, films=args.films)]
    result["is_complete"] = all(ends)
    write(result, out)
    print(json.dumps({key: value for key, value in result.items() if key not in ("gates", "points")}, indent=1))
    found = [*result["gates"], *result["points"]]
    sys.exit(bool(result["lost"]) or not found or not all(each["ok"] for each in found))


def measure(result: dict[str, Any], part: str, command: Sequence[str], clock: Clock, out: Path | None) -> bool:
    """Adds what a part finds to the result, case by case; whether all its cases were run."""

    def take(found: dict[str, Any]) -> None:
        kind = found.pop("kind")
        if kind == "films":
            result["films"] = found
        else:
            result[f"{kind}s" if kind != "lost" else kind].append({"part": part, **found})
        if kind == "point":
            print(as_line(found), file=sys.stderr, flush=True)
            result["crossover"] = crossovers(result["points"], "speedup")
            result["crossover_with_planning"] = crossovers(result["points"], "speedup_with_planning")
        elif not found.get("ok", kind == "films"):
            print(f"WRONG: {part}: {found}", file=sys.stderr, flush=True)
        write(result, out)

    is_whole = run_part([*command, "--part", part], clock, take)
    print(f"{part}: {'done' if is_whole else 'cut short'}", file=sys.stderr, flush=True)
    return is_whole


def write(result: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
