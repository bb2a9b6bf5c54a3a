"""What checkpoints cost: seconds of the render's own thread, and CPU time of the writing one, a checkpoint.

python benchmarks/checkpoints.py --out benchmarks/results/checkpoints-cpu.json

Differences of whole runs drown in a machine's noise at 1 %, so what is spent on saving is counted, in one run that
saves every `--every` seconds; `overhead` is its share of the default interval of 30 s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longvid.checkpoint import CheckpointSaver
from longvid.doctor import cpu_facts, package_version
from longvid.engine import Engine
from longvid.script import parse_script
from longvid.settings import RuntimeSettings

STORY = 'seed: 3\nscenes:\n  - {prompt: "a large red circle moving left over a blue background", for: %ds}\n'


class Spent:
    """Times of calls of a method, by a clock, as if it stood in the class."""

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self.times: list[float] = []
        method = getattr(CheckpointSaver, name)

        def timed(saver: CheckpointSaver, *args: Any) -> None:
            start = clock()
            method(saver, *args)
            self.times.append(clock() - start)

        setattr(CheckpointSaver, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--every", type=float, default=1.0)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    kv, latents = Spent("save_kv", time.perf_counter), Spent("save_latents", time.perf_counter)
    writing = Spent("_save", time.thread_time)
    engine = Engine.load("mini", overrides=[f"runtime.checkpoint_s={args.every}", *args.overrides])
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        engine.render(parse_script(STORY % args.seconds, "story.yaml"), Path(folder) / "film.mp4")
        wall = time.perf_counter() - start
    ours = [a + b for a, b in zip(kv.times, latents.times, strict=False)]
    result = {
        "checkpoints": len(ours),
        "film_s": args.seconds,
        "wall_s": wall,
        "own_ms": 1e3 * statistics.mean(ours),
        "writing_cpu_ms": 1e3 * statistics.mean(writing.times),
        "overhead": (statistics.mean(ours) + statistics.mean(writing.times)) / RuntimeSettings().checkpoint_s,
        "settings": args.overrides,
        "machine": {"cpu": cpu_facts()["name"], "torch": package_version("torch")},
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
