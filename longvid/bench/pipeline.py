"""`longvid bench pipeline`: one film on one rank and on two, a thread each, and what many ranks would make of it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from longvid.doctor import cpu_facts, package_version
from longvid.errors import InputError, RuntimeFailure
from longvid.parallel.decode_program import StageDecoding
from longvid.parallel.decoding import Decoding, deal_work
from longvid.parallel.partition import Costs
from longvid.parallel.rehearsal import rehearse_schedule, stage_costs
from longvid.parallel.rules import QueueRules
from longvid.parallel.schedule import queue_schedule
from longvid.parallel.topology import Topology
from longvid.plan import Chunk, FilmSpan

Left = Literal["recompute", "cached"]
LEFT: tuple[Left, ...] = ("recompute", "cached")
PROMPT = "a large red circle moving left over a blue background"
SIM_CHUNKS, SIM_STEPS, SIM_LAYERS = 33, 50, 40
"""The film of DualParal's longest measurement, by a model as deep as Wan 14B."""
SIM_LATENTS = 6
"""Of a chunk."""
MESHES = (Topology(stage=8), Topology(stage=8, guidance=2, seq=4), Topology(stage=16, guidance=2, seq=32))


@dataclass(frozen=True)
class PipelineBench:
    """What both sides render: `seconds` of one scene in `steps` steps. `overrides` are settings of both.

    `size` is (width, height) in pixels; None: the model's own.
    """

    seconds: float = 30.0
    ranks: int = 2
    steps: int = 50
    overrides: tuple[str, ...] = ()
    size: tuple[int, int] | None = None


def bench_pipeline(bench: PipelineBench, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure both sides in turn, so many times: seconds from the first forward to the last frame written.

    The films must be equal to the last byte. `speedup` is that of the medians, `speedups` those of each pair; what else
    is said of the ranks is of the pair in the middle. `speedup_of_copies` is what the machine gives to as many
    processes that have nothing to do with each other: films a second of that many one-rank renders at once over those
    of one; a machine whose cores share memory and clock gives less than their number. `bubble_` is the share of the
    ranks' time without work, `comm_wait_fraction` that in which they wait for messages. `sim` holds the efficiency of a
    longer film (33 chunks of 50 steps, 40 layers) by a rehearsal with the measured costs; what the exchange of tokens
    on `seq`
    costs is not in it.
    """
    with tempfile.TemporaryDirectory() as folder:
        pairs = render_pairs(bench, bench, repeats, Path(folder), say)
        say(f"{bench.ranks} films at once, of one rank each")
        slowest = max(copy["wall_s"] for copy in render_copies(bench, Path(folder)))
    alone, together = medians(pairs)
    _, many = sorted(pairs, key=speedup_of)[len(pairs) // 2]
    costs = Costs(**{**many["costs"], "layers": tuple(many["costs"]["layers"])})
    return {
        "speedup": alone / together,
        "speedups": [speedup_of(pair) for pair in pairs],
        "speedup_of_copies": bench.ranks * alone / slowest,
        "seconds_1": alone,
        f"seconds_{bench.ranks}": together,
        "bubble_measured": many["bubble"],
        "bubble_predicted": many["predicted_bubble"],
        "comm_wait_fraction": many["comm_wait_fraction"],
        "ranks": many["ranks"],
        "costs": many["costs"],
        "sim": [simulate_mesh(costs, bench.steps, topology, left) for topology in MESHES for left in LEFT],
        "machine": machine(),
        "settings": list(bench.overrides),
        "steps": bench.steps,
        "film_s": bench.seconds,
        "size": bench.size,
    }


Side = dict[str, Any]
"""What `render` found."""


def render_pairs(
    one: PipelineBench, many: PipelineBench, repeats: int, folder: Path, say: Callable[[str], None]
) -> list[tuple[Side, Side]]:
    """Render the film on one rank and on several in turn. Raises RuntimeFailure where the films differ."""
    pairs = []
    for turn in range(repeats):
        say(f"{turn + 1} of {repeats}: {one.seconds:g} s of film on 1 rank and on {many.ranks}")
        pair = render(one, 1, folder), render(many, many.ranks, folder)
        if pair[0]["digest"] != pair[1]["digest"]:
            raise RuntimeFailure("bench: the films differ")
        pairs.append(pair)
    return pairs


def medians(pairs: Sequence[tuple[Side, Side]]) -> tuple[float, float]:
    """Seconds on one rank and on several."""
    alone, together = (median(side["wall_s"] for side in sides) for sides in zip(*pairs, strict=True))
    return alone, together


def speedup_of(pair: tuple[Side, Side]) -> float:
    """Of several ranks over one."""
    one, many = pair
    return float(one["wall_s"] / many["wall_s"])


def simulate_mesh(costs: Costs, steps: int, topology: Topology, left: Left) -> dict[str, Any]:
    """The efficiency of a mesh, with the measured cost of a layer in a model of 40: with decoding, and without.

    `costs` are of films of `steps`. Decoding is dealt out over stages; by the leader alone, it would weigh the more the
    more ranks there are.
    """
    decode = costs.decode * steps / SIM_STEPS
    return {
        "ranks": topology.num_ranks,
        "mesh": {"stage": topology.stage, "guidance": topology.guidance, "seq": topology.seq},
        "left": left,
        "efficiency": _efficiency(costs, 0.0, topology, left),
        "efficiency_with_decode": _efficiency(costs, decode, topology, left),
        "efficiency_with_leader": _efficiency(costs, decode, topology, left, "leader"),
    }


def _efficiency(
    costs: Costs, decode: float, topology: Topology, left: Left, mode: Literal["stages", "leader"] = "stages"
) -> float:
    deep = Costs(costs.layers[:1] * SIM_LAYERS, costs.first, costs.last, decode)
    branches = topology.guidance
    alone = (deep.total - decode) * branches + decode
    split = Costs(
        tuple(layer / topology.seq for layer in deep.layers),
        deep.first / topology.seq,
        deep.last / topology.seq,
        decode,
    )
    n = SIM_LATENTS
    chunks = [Chunk(i, 0, n * i, n, 2 * (i > 0), 2 * (i + 1 < SIM_CHUNKS), (), (), (0, 0)) for i in range(SIM_CHUNKS)]
    # Ranks of one stage do the same at the same time, so a rank a stage stands for all of them.
    stages = Topology(stage=topology.stage)
    bounds, shares = deal_work(split, topology.stage, mode)
    cost = stage_costs(split, stages, bounds, SIM_STEPS, chunk_work=n if shares else None)
    films = (FilmSpan(range(SIM_CHUNKS), range(1)),)
    decoding = StageDecoding(Decoding(shares, chunks, films)) if shares else None
    rules = QueueRules(left=left)
    found = rehearse_schedule(lambda: queue_schedule(chunks, SIM_STEPS, rules), stages, 4, cost, decoding)
    return alone * SIM_CHUNKS * SIM_STEPS / (topology.num_ranks * found.makespan)


def render(bench: PipelineBench, ranks: int, folder: Path) -> dict[str, Any]:
    """Render in processes of their own; what their trace says, and the film's digest."""
    story, film, trace = folder / "story.yaml", folder / f"film{ranks}.mp4", folder / f"trace{ranks}.json"
    size = f"size: {list(bench.size)}\n" if bench.size else ""
    story.write_text(f'{size}scenes:\n  - {{prompt: "{PROMPT}", for: {bench.seconds}s}}\n')
    settings = [f"sampler.steps={bench.steps}", "runtime.threads=1", "runtime.checkpoint_s=1e9", *bench.overrides]
    command = [sys.executable, "-P", "-m", "longvid", "render", str(story), "-o", str(film), "--trace", str(trace)]
    command += [part for setting in settings for part in ("--set", setting)]
    if ranks > 1:
        command += ["--ranks", str(ranks)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        kind = InputError if done.returncode == InputError.exit_code else RuntimeFailure
        raise kind(f"bench: {ranks} ranks failed:\n{done.stderr.strip()}")
    found: dict[str, Any] = json.loads(trace.read_text())["otherData"]
    return {**found, "digest": hashlib.sha256(film.read_bytes()).hexdigest()}


def render_copies(bench: PipelineBench, folder: Path) -> list[dict[str, Any]]:
    """Render the film as many times at once as there are ranks, a rank each."""
    folders = [folder / f"copy{i}" for i in range(bench.ranks)]
    for own in folders:
        own.mkdir()
    with ThreadPoolExecutor(bench.ranks) as pool:
        return list(pool.map(lambda own: render(bench, 1, own), folders))


def machine() -> dict[str, Any]:
    """What the figures are of."""
    return {**{key: cpu_facts()[key] for key in ("name", "cores")}, "torch": package_version("torch")}


def as_text(result: dict[str, Any]) -> str:
    """The result of `bench_pipeline` for people."""
    many = len(result["ranks"])
    bubble = f"{result['bubble_measured'] * 100:.1f} % measured, {result['bubble_predicted'] * 100:.1f} % predicted"
    each = ", ".join(f"{speedup:.2f}" for speedup in result["speedups"])
    times = f"1 rank {result['seconds_1']:.2f} s, {many} ranks {result[f'seconds_{many}']:.2f} s"
    lines = [
        f"{times}: {result['speedup']:.2f}x ({each})",
        f"as many films at once, a rank each: {result['speedup_of_copies']:.2f}x",
        f"bubble {bubble}; waiting for messages {result['comm_wait_fraction'] * 100:.1f} %",
        f"predicted for {SIM_CHUNKS} chunks of {SIM_STEPS} steps through {SIM_LAYERS} layers:",
    ]
    lines += [_sim_line(row) for row in result["sim"]]
    return "\n".join(lines)


def _sim_line(row: dict[str, Any]) -> str:
    parts: Sequence[str] = [f"{axis} {size}" for axis, size in row["mesh"].items()]
    shares = f"{row['efficiency'] * 100:.1f} %, with decoding {row['efficiency_with_decode'] * 100:.1f} %"
    shares += f" (by the leader alone {row['efficiency_with_leader'] * 100:.1f} %)"
    return f"{row['ranks']:>6} ranks ({' x '.join(parts)}), left {row['left']}: {shares}"
