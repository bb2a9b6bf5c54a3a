"""`longvid bench attention`: block-sparse attention on the CPU beside torch's dense attention, in one run.

Shapes: B batch, H heads, L tokens, D of a head.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from longvid.doctor import cpu_facts, package_version
from longvid.errors import RuntimeFailure
from longvid.kernels import cpu, native
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
ENVIRONMENTS: dict[native.Isa, dict[str, str]] = {
    "amx": {},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}
"""What holds torch and its libraries to an instruction set; with amx to none."""


@dataclass(frozen=True)
class AttentionBench:
    """What is measured: each time is one of `repeats`, of which the median counts."""

    shapes: tuple[Shape, ...] = SHAPES
    densities: tuple[float, ...] = DENSITIES
    tiles: tuple[int, ...] = TILES
    repeats: int = 5


def bench_attention(bench: AttentionBench, say: Callable[[str], None]) -> dict[str, Any]:
    """Speed-ups over torch's dense attention, fp32, each variant beside a torch held to the same instruction set.

    `efficiency` is speed-up x density: 1 says that a score costs what it costs dense. `of_dense` is the same beside the
    dense attention that would run, with amx ours: where sparse attention pays depends on it. `spread` is the
    interquartile range of the speed-up over its median. `error` is the largest difference, of output and LSE, from
    softmax in fp64 on some rows. `search` holds block mass: its time over that of torch's dense attention. Raises
    RuntimeFailure where the C++ kernels were not built.
    """
    best = native.isa()
    if best is None:
        raise RuntimeFailure("bench attention: the C++ kernels are not there: install longvid where a C++ compiler is")
    isas = [isa for isa in ENVIRONMENTS if native.ISAS.index(isa) <= native.ISAS.index(best)]
    measured = []
    for isa in isas:
        say(f"{isa}:")
        measured.append(run_isa(isa, bench, say))
    return {
        "cases": [case for found in measured for case in found["cases"]],
        "search": [case for found in measured for case in found["search"]],
        "repeats": bench.repeats,
        "machine": {
            **{key: cpu_facts()[key] for key in ("name", "cores", "flags")},
            "isa": best,
            "threads": torch.get_num_threads(),
            "torch": package_version("torch"),
        },
    }


def run_isa(isa: native.Isa, bench: AttentionBench, say: Callable[[str], None]) -> dict[str, Any]:
    """`measure_isa` in a process of its own: torch reads what it may use when it is loaded."""
    command = [sys.executable, "-P", "-m", "longvid.bench.attention", isa, json.dumps(asdict(bench))]
    environment = {**os.environ, **ENVIRONMENTS[isa]}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        *lines, last = _relay(process.stdout, say)
    if process.returncode:
        raise RuntimeFailure(f"bench attention: {isa} failed with exit code {process.returncode}: {lines}")
    found: dict[str, Any] = json.loads(last)
    return found


def _relay(lines: Iterable[str], say: Callable[[str], None]) -> Iterator[str]:
    """What a process prints; all but the JSON at its end is said at once."""
    for line in lines:
        if not line.startswith("{"):
            say(line.rstrip())
        yield line


def measure_isa(isa: native.Isa, bench: AttentionBench, say: Callable[[str], None]) -> dict[str, Any]:
    """All cases of one variant. A case's dense and sparse calls take turns, so both meet the same noise."""
    cases: list[dict[str, Any]] = []
    search: list[dict[str, Any]] = []
    for shape in bench.shapes:
        batch, num_heads, num_tokens, dim = shape
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(batch, num_tokens, num_heads, dim, generator=generator) for _ in range(3))
        for density, tile, rows in product(bench.densities, bench.tiles, ROWS):
            layout = random_layout(num_tokens, num_heads, tile, density, rows)
            found = _time_case(q, k, v, layout, isa, bench.repeats)
            cases.append({"shape": list(shape), "tile": tile, "rows": rows, "isa": isa, **found})
            say(_case_line(cases[-1]))
        for every in SAMPLE_EVERY:
            cost = _time_search(q, k, v, every, isa, bench.repeats)
            search.append({"shape": list(shape), "sample_every": every, "isa": isa, "cost": cost})
            say(_search_line(search[-1]))
    return {"cases": cases, "search": search}


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
    lines = [f"fp32, {machine['threads']} threads of {machine['name']}"]
    lines += [_case_line(case) for case in result["cases"]]
    return "\n".join([*lines, *(_search_line(case) for case in result["search"])])


def _search_line(case: dict[str, Any]) -> str:
    sampled = f"block mass of every {case['sample_every']}. query {case['isa']}"
    return f"{case['shape']} {sampled}: {case['cost']:.3f} of dense attention"


def _case_line(case: dict[str, Any]) -> str:
    return (
        f"{case['shape']} tile {case['tile']:<4} density {case['density']:.3f} {case['rows']:8}{case['isa']:9}"
        f"{case['speedup']:6.2f}x, efficiency {case['efficiency']:.2f} (spread {case['spread']:.0%}; beside the dense"
        f" that would run {case['of_dense']:.2f}),"
        f" error {case['error']:.1e}"
    )


def _cut(num_tokens: int, tile: int, rows: Rows, generator: torch.Generator) -> Blocks:
    if rows == "uniform":
        return even_blocks(num_tokens, tile)
    shares = (0.5 + torch.rand(max(1, num_tokens // tile), generator=generator)).cumsum(0)
    ends = (shares / shares[-1] * num_tokens).round().int()
    return Blocks(torch.cat([ends.new_zeros(1), ends])[None])


def _time_case(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, isa: native.Isa, repeats: int) -> dict[str, float]:
    """The figures of a variant of the kernels on one layout."""
    scale, density = 1 / math.sqrt(q.shape[-1]), layout.density()
    error = _error(q, k, v, layout, *cpu.forward(q, k, v, layout, scale, None, isa=isa))
    ratios, ratios_of_dense = [], []
    for _ in range(repeats):
        torch_s = _seconds(lambda: _torch_dense(q, k, v))
        sparse_s = _seconds(lambda: cpu.forward(q, k, v, layout, scale, None, isa=isa))
        ratios.append(torch_s / sparse_s)
        ratios_of_dense.append(_seconds(lambda: attend(q, k, v)) / sparse_s if isa == "amx" else ratios[-1])
    return {
        "density": density,
        "speedup": median(ratios),
        "efficiency": median(ratios) * density,
        "of_dense": median(ratios_of_dense) * density,
        "spread": _spread(ratios),
        "error": error,
    }


def _time_search(q: Tensor, k: Tensor, v: Tensor, every: int, isa: native.Isa, repeats: int) -> float:
    """The time of block mass over that of torch's dense attention."""
    _, lse = attend_lse(q, k, v)
    blocks, scale = even_blocks(q.shape[1], TILES[0]), 1 / math.sqrt(q.shape[-1])
    costs = []
    for _ in range(repeats):
        dense_s = _seconds(lambda: _torch_dense(q, k, v))
        mass_s = _seconds(lambda: cpu.block_mass(q, k, lse, blocks, blocks, scale=scale, sample_every=every, isa=isa))
        costs.append(mass_s / dense_s)
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


def _torch_dense(q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BTHD, v_BTHD))
    return F.scaled_dot_product_attention(q, k, v)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _spread(values: list[float]) -> float:
    ordered = sorted(values)
    return (ordered[len(ordered) * 3 // 4] - ordered[len(ordered) // 4]) / median(ordered)


def main() -> None:
    """One variant, as `run_isa` asks for it: lines for people, then JSON."""
    isa, text = sys.argv[1:]
    fields = json.loads(text)
    fields["shapes"] = tuple(tuple(shape) for shape in fields["shapes"])
    found = measure_isa(
        native.ISAS[native.ISAS.index(isa)], AttentionBench(**fields), lambda line: print(line, flush=True)
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
