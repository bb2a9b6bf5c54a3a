"""`longvid bench attention`: block-sparse attention on the CPU beside torch's dense attention, in one run.

Shapes: B batch, H heads, L tokens, D of a head.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from longvid.doctor import cpu_facts, package_version
from longvid.errors import RuntimeFailure
from longvid.kernels import cpu, score
from longvid.kernels.dense import attend, attend_lse
from longvid.kernels.layout import BlockLayout, Blocks, even_blocks, make_layout, one_group

Rows = Literal["uniform", "ragged"]
ROWS: tuple[Rows, ...] = ("uniform", "ragged")
Shape = tuple[int, int, int, int]
SHAPES: tuple[Shape, ...] = ((1, 8, 8192, 64), (1, 8, 4096, 128))
"""[B, H, L, D]."""
DENSITIES = (0.1, 0.25, 1.0)
TILES = (64, 128)
SAMPLE_EVERY = (1, 4)


@dataclass(frozen=True)
class AttentionBench:
    """What is measured: each time is one of `repeats`, of which the median counts."""

    shapes: tuple[Shape, ...] = SHAPES
    densities: tuple[float, ...] = DENSITIES
    tiles: tuple[int, ...] = TILES
    repeats: int = 5


def bench_attention(bench: AttentionBench, say: Callable[[str], None]) -> dict[str, Any]:
    """Speed-ups over dense attention, fp32; a case's dense and sparse calls take turns, so both meet the same noise.

    `efficiency` is speed-up x density: 1 says that a score costs what it costs dense. `spread` is the interquartile
    range of the speed-up over its median. `error` is the largest difference, of output and LSE, from softmax in fp64
    on some rows. `search` holds block mass: its time over that of dense attention. Raises RuntimeFailure where the C++
    kernels were not built.
    """
    best = cpu.isa()
    if best is None:
        raise RuntimeFailure("bench attention: the C++ kernels are not there: install longvid where a C++ compiler is")
    isas = cpu.ISAS[cpu.ISAS.index(best) :: -1]
    cases: list[dict[str, Any]] = []
    search: list[dict[str, Any]] = []
    for shape in bench.shapes:
        batch, num_heads, num_tokens, dim = shape
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(batch, num_tokens, num_heads, dim, generator=generator) for _ in range(3))
        for density, tile, rows in product(bench.densities, bench.tiles, ROWS):
            layout = random_layout(num_tokens, num_heads, tile, density, rows)
            for found in _time_case(q, k, v, layout, isas, bench.repeats):
                cases.append({"shape": list(shape), "tile": tile, "rows": rows, **found})
                say(_case_line(cases[-1]))
        for every in SAMPLE_EVERY:
            cost = _time_search(q, k, v, every, bench.repeats)
            search.append({"shape": list(shape), "sample_every": every, "cost": cost})
    return {
        "cases": cases,
        "search": search,
        "repeats": bench.repeats,
        "machine": {
            **{key: cpu_facts()[key] for key in ("name", "cores", "flags")},
            "isa": best,
            "threads": torch.get_num_threads(),
            "torch": package_version("torch"),
            "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        },
    }


def random_layout(num_tokens: int, num_heads: int, tile: int, density: float, rows: Rows) -> BlockLayout:
    """A layout of about a density. Ragged: blocks of 0.5 to 1.5 tiles, rows of 0.2 to 1.8 times the mean in tiles."""
    generator = torch.Generator().manual_seed(0)
    q, k = (_cut(num_tokens, tile, rows, generator) for _ in range(2))
    wanted = torch.full((q.num_blocks, 1), density * k.num_blocks)
    if rows == "ragged" and density < 1:
        wanted = wanted * (0.2 + 1.6 * torch.rand(wanted.shape, generator=generator))
    rank = torch.rand(q.num_blocks, k.num_blocks, generator=generator).argsort(-1).argsort(-1)
    return make_layout(q, k, (rank < wanted.round().clamp(min=1))[None], one_group(num_heads))


def as_text(result: dict[str, Any]) -> str:
    """The result of `bench_attention` for people."""
    machine = result["machine"]
    lines = [f"fp32, {machine['threads']} threads of {machine['name']}, torch with {machine['torch_cpu_capability']}"]
    lines += [_case_line(case) for case in result["cases"]]
    lines += [
        f"{case['shape']} block mass of every {case['sample_every']}. query: {case['cost']:.3f} of dense attention"
        for case in result["search"]
    ]
    return "\n".join(lines)


def _case_line(case: dict[str, Any]) -> str:
    return (
        f"{case['shape']} tile {case['tile']:<4} density {case['density']:.3f} {case['rows']:8}{case['isa']:9}"
        f"{case['speedup']:6.2f}x, efficiency {case['efficiency']:.2f} (spread {case['spread']:.0%}),"
        f" error {case['error']:.1e}"
    )


def _cut(num_tokens: int, tile: int, rows: Rows, generator: torch.Generator) -> Blocks:
    if rows == "uniform":
        return even_blocks(num_tokens, tile)
    shares = (0.5 + torch.rand(max(1, num_tokens // tile), generator=generator)).cumsum(0)
    ends = (shares / shares[-1] * num_tokens).round().int()
    return Blocks(torch.cat([ends.new_zeros(1), ends])[None])


def _time_case(
    q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, isas: tuple[cpu.Isa, ...], repeats: int
) -> list[dict[str, Any]]:
    """The figures of every variant of the kernels on one layout."""
    scale, density = 1 / math.sqrt(q.shape[-1]), layout.density()
    found = [(isa, cpu.forward(q, k, v, layout, scale, None, isa=isa)) for isa in isas]
    errors = {isa: _error(q, k, v, layout, *partial) for isa, partial in found}
    ratios: dict[cpu.Isa, list[float]] = {isa: [] for isa in isas}
    for _ in range(repeats):
        dense_s = _seconds(lambda: attend(q, k, v))
        for isa in isas:
            sparse_s = _seconds(lambda isa=isa: cpu.forward(q, k, v, layout, scale, None, isa=isa))  # type: ignore[misc]
            ratios[isa].append(dense_s / sparse_s)
    return [
        {
            "density": density,
            "isa": isa,
            "speedup": median(of_isa),
            "efficiency": median(of_isa) * density,
            "spread": _spread(of_isa),
            "error": errors[isa],
        }
        for isa, of_isa in ratios.items()
    ]


def _time_search(q: Tensor, k: Tensor, v: Tensor, every: int, repeats: int) -> float:
    """The time of block mass over that of dense attention."""
    _, lse = attend_lse(q, k, v)
    blocks = even_blocks(q.shape[1], TILES[0])
    costs = []
    for _ in range(repeats):
        dense_s = _seconds(lambda: attend(q, k, v))
        costs.append(_seconds(lambda: score.block_mass(q, k, lse, blocks, blocks, sample_every=every)) / dense_s)
    return median(costs)


def _error(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, out: Tensor, lse: Tensor) -> float:
    """The largest difference from softmax in fp64, on 64 queries of all heads."""
    tokens = torch.linspace(0, q.shape[1] - 1, 64).long()
    sees = layout.mask()[0, layout.q.block_of(q.shape[1])[0][tokens]][:, layout.k.block_of(k.shape[1])[0]]
    scores = torch.einsum("blhd,bthd->bhlt", q[:, tokens].double(), k.double()) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~sees, -math.inf)
    exact = torch.einsum("bhlt,bthd->blhd", scores.softmax(-1), v.double())
    exact_lse = scores.logsumexp(-1).transpose(1, 2)
    return float(torch.maximum((out[:, tokens] - exact).abs().max(), (lse[:, tokens] - exact_lse).abs().max()))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _spread(values: list[float]) -> float:
    ordered = sorted(values)
    return (ordered[len(ordered) * 3 // 4] - ordered[len(ordered) // 4]) / median(ordered)
