"""Memory of each rank by kind, measured beside planned for the layers that it got, as the number of stages grows.

python benchmarks/memory.py --stages 1 2 4 --out benchmarks/results/memory-cpu.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from longvid.bench.memory import MemoryWatch
from longvid.doctor import cpu_facts, package_version
from longvid.engine import Engine
from longvid.launch.local import run_local
from longvid.memory import Dealt, stage_memory
from longvid.models.facts import facts_of, weight_bytes
from longvid.parallel.collectives import gather
from longvid.parallel.rules import QueueRules
from longvid.parallel.schedule import make_schedule
from longvid.parallel.topology import Topology
from longvid.parallel.verify import simulate
from longvid.plan import make_plan
from longvid.script import parse_script
from longvid.settings import load_settings

STORY = 'seed: 3\nscenes:\n  - {prompt: "a large red circle moving left over a blue background", for: 10s}\n'
KINDS = ("weights", "kv", "latents", "cache")


def rank(out: Path, model: str, overrides: list[str]) -> None:
    """One rank of a run; the leader writes everybody's figures."""
    engine = Engine.load(model, overrides=overrides)
    script = parse_script(STORY, "story.yaml")
    found = MemoryWatch(engine).run(script)
    own = {"measured": found, "layers": [engine.layers.start, engine.layers.stop]}
    everybody = [own] if engine.mesh.topology.num_ranks == 1 else gather(own)
    if engine.mesh.is_leader:
        out.write_text(json.dumps(everybody))
    engine.leave()


def planned(model: str, overrides: list[str], layers: list[range]) -> list[dict[str, float]]:
    """What `longvid plan` would say of stages with these layers."""
    settings, facts = load_settings(overrides=[*overrides, f"model.path={model}"]), facts_of(model)
    plan = make_plan(parse_script(STORY, "story.yaml"), settings, facts)
    rules = QueueRules.of(settings)
    report = simulate(make_schedule(plan, settings), plan.chunks, settings.sampler.steps, rules)
    topology = Topology(stage=len(layers))
    stages = stage_memory(plan, settings, facts, report, Dealt(topology, layers), partial(weight_bytes, model))
    return [asdict(stage) for stage in stages]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        rank(args.rank, args.model, args.overrides)
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for stages in args.stages:
            out = Path(folder) / f"{stages}.json"
            overrides = ["runtime.threads=1", f"mesh.stage={stages}", *args.overrides]
            sets = [part for override in overrides for part in ("--set", override)]
            code = run_local([sys.executable, "-P", __file__, "--model", args.model, "--rank", str(out), *sets], stages)
            if code:
                sys.exit(code)
            ranks = json.loads(out.read_text())
            plans = planned(args.model, overrides, [range(*found["layers"]) for found in ranks])
            for index, (found, plan) in enumerate(zip(ranks, plans, strict=True)):
                rows.append({"stages": stages, "rank": index, **found, "planned": plan})
    machine = {"cpu": cpu_facts()["name"], "torch": package_version("torch")}
    result = {"model": args.model, "settings": args.overrides, "machine": machine, "rows": rows}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print("MB, measured (planned)" + "".join(f"{kind:>20}" for kind in KINDS) + f"{'resident':>12}")
    for row in rows:
        cells = (f"{row['measured'][f'{kind}_mb']:.2f} ({row['planned'][f'{kind}_mb']:.2f})" for kind in KINDS)
        rss = row["measured"]["rss_mb"]
        print(
            f"{row['stages']} stages, rank {row['rank']}".ljust(22)
            + "".join(f"{c:>20}" for c in cells)
            + f"{rss:12.0f}"
        )


if __name__ == "__main__":
    main()
