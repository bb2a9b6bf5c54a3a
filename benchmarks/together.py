"""Several films through one pipe side by side, and the same films one after the other, on the same ranks.

python benchmarks/together.py --ranks 2 --steps 2 --films 6 --seconds 6 --out benchmarks/results/together-cpu.json

Repeats are interleaved, and the ratio is that of medians. `sim` has the share of the ranks' time without work that the
rehearsal predicts for more stages, with layers that cost the same and nothing else that costs anything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from longvid.doctor import cpu_facts, package_version
from longvid.films import first_rounds, join, num_lanes
from longvid.parallel.partition import Costs, split_layers
from longvid.parallel.rehearsal import rehearse_schedule, stage_costs
from longvid.parallel.rules import QueueRules
from longvid.parallel.schedule import make_schedule
from longvid.parallel.topology import Topology
from longvid.plan import ModelFacts, Plan
from longvid.settings import load_settings

STORY = 'seed: %d\nscenes:\n  - {prompt: "a large red circle moving left over a blue background", for: %gs}\n'
SIM_LAYERS = 40


def measure(args: argparse.Namespace) -> None:
    """On every rank: render both ways; the leader writes seconds of each repeat, and the plans' predictions."""
    from longvid.engine import Engine
    from longvid.script import parse_script

    engine = Engine.load("mini", overrides=overrides_of(args))
    stories = [parse_script(STORY % (seed, args.seconds), "story.yaml") for seed in range(args.films)]
    one_by_one, together = [], []
    with tempfile.TemporaryDirectory() as folder:
        films = [Path(folder) / f"{i}.mp4" for i in range(args.films)]
        for repeat in range(args.repeats + 1):
            start = time.perf_counter()
            for story, film in zip(stories, films, strict=True):
                engine.render(story, film)
            alone = [film.read_bytes() for film in films] if engine.mesh.is_leader else []
            middle = time.perf_counter()
            engine.render_films(stories, films)
            end = time.perf_counter()
            if engine.mesh.is_leader:
                assert [film.read_bytes() for film in films] == alone, "the films differ"
            if repeat:  # the first warms up
                one_by_one.append(middle - start)
                together.append(end - middle)
    plans = [engine.plan(story) for story in stories]
    if engine.mesh.is_leader:
        sim = [predict(plans, engine.facts, stages, args.steps) for stages in (2, 4, 8, 16)]
        args.worker.write_text(json.dumps({"one_by_one_s": one_by_one, "together_s": together, "sim": sim}))
    engine.leave()


def predict(plans: list[Plan], facts: ModelFacts, stages: int, steps: int) -> dict[str, Any]:
    settings = load_settings(overrides=[f"sampler.steps={steps}"])
    rules, costs = QueueRules.of(settings), Costs((1.0,) * SIM_LAYERS)
    topology = Topology(stage=stages)
    cost = stage_costs(costs, topology, split_layers(costs, stages), steps)
    lanes = num_lanes("auto", stages, steps, rules)
    plan = join(plans, first_rounds(plans, [-1] * len(plans), lanes, rules)[1])

    def makespan(plan: Plan) -> float:
        return rehearse_schedule(lambda: make_schedule(plan, settings), topology, 4, cost).makespan

    alone = sum(map(makespan, plans))
    return {"stages": stages, "lanes": lanes, "speedup": alone / makespan(plan)}


def overrides_of(args: argparse.Namespace) -> list[str]:
    return [f"sampler.steps={args.steps}", "runtime.threads=1", "runtime.checkpoint_s=1e9", *args.overrides]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--films", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        measure(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
        subprocess.run([*launcher, __file__, *sys.argv[1:], "--worker", str(found)], check=True)
        times = json.loads(found.read_text())
    result = {
        "speedup": statistics.median(times["one_by_one_s"]) / statistics.median(times["together_s"]),
        **times,
        **{name: getattr(args, name) for name in ("ranks", "steps", "films", "seconds")},
        "settings": args.overrides,
        "machine": {"cpu": cpu_facts()["name"], "torch": package_version("torch")},
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
