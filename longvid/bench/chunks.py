"""`longvid bench chunks`: one film by the chunk schedule, on one rank and on several that share its chunks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from longvid.bench.pipeline import PipelineBench, machine, medians, render_pairs, speedup_of


def bench_chunks(bench: PipelineBench, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure both sides in turn, so many times: seconds from the first forward to the last frame written.

    The films must be equal to the last byte. `speedup` is that of the medians, `speedups` those of each pair.
    `comm_wait_fraction` is the share of the ranks' time in which they wait for messages.
    """
    common = replace(bench, overrides=("schedule=chunks", *bench.overrides))
    split = replace(common, overrides=(*common.overrides, f"mesh.chunk={bench.ranks}"))
    with tempfile.TemporaryDirectory() as folder:
        pairs = render_pairs(common, split, repeats, Path(folder), say)
    alone, together = medians(pairs)
    return {
        "speedup": alone / together,
        "speedups": [speedup_of(pair) for pair in pairs],
        "seconds_1": alone,
        f"seconds_{bench.ranks}": together,
        "comm_wait_fraction": median(many["comm_wait_fraction"] for _, many in pairs),
        "ranks": bench.ranks,
        "machine": machine(),
        "settings": list(common.overrides),
        "steps": bench.steps,
        "film_s": bench.seconds,
        "size": bench.size,
    }


def as_text(result: dict[str, Any]) -> str:
    """The result of `bench_chunks` for people."""
    many = result["ranks"]
    times = f"1 rank {result['seconds_1']:.2f} s, {many} ranks {result[f'seconds_{many}']:.2f} s"
    each = ", ".join(f"{speedup:.2f}" for speedup in result["speedups"])
    waiting = f"waiting for messages {result['comm_wait_fraction'] * 100:.1f} %"
    return f"{times}: {result['speedup']:.2f}x ({each}); {waiting}"
