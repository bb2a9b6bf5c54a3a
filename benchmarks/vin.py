"""Films of one scene with and without global tokens, on the embedded model: seams, drift and adherence of each.

python benchmarks/vin.py --seconds 24 --films 5
python benchmarks/vin.py --seconds 24 --films 5 --only chunks "chunks + VIN"
python benchmarks/vin.py --seconds 60 --films 4 --first 5
python benchmarks/vin.py --seconds 300 --films 1 --first 9
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longvid.engine import Engine
from longvid.measure import measure_render
from longvid.script import parse_script
from longvid.training import world

KINDS = {
    "queue": (),
    "queue + VIN": ("vin.policy=on",),
    "chunks": ("schedule=chunks",),
    "chunks + VIN": ("schedule=chunks", "vin.policy=on"),
}


def stories(count: int, first: int, seconds: float) -> list[str]:
    """Storyboards of a scene each; the looks are the world's, in a fixed order."""
    rng = np.random.default_rng(5)
    captions = [world.caption(world.sample_look(rng)) for _ in range(first + count)]
    return [
        f'seed: {100 + i}\nscenes:\n  - {{prompt: "{captions[i]}", for: {seconds}s}}\n'
        for i in range(first, first + count)
    ]


def measure(engine: Engine, story: str, folder: Path) -> dict[str, Any]:
    """What one film shows."""
    script, film = parse_script(story, "story.yaml"), folder / "film.mp4"
    engine.render(script, film)
    found = measure_render(film, script, engine.settings, None)
    drift = found["drift"]
    return {
        "prompt": script.scenes[0].prompt,
        "joint_adherence": found["joint_adherence"],
        "seam_ratio": found["seam_ratio"],
        "seam_second_ratio": found["seam_second_ratio"],
        "colour_drift": max(drift["rgb_quarters"]),
        "contrast_drift": drift["std_quarters"],
        "loop": found["loop"]["found"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=24.0)
    parser.add_argument("--films", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="number of the first film")
    parser.add_argument("--only", nargs="*", choices=KINDS, default=["queue", "queue + VIN"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"seconds": options.seconds, "first": options.first}
    for kind, overrides in ((name, KINDS[name]) for name in options.only):
        engine = Engine.load("mini", overrides=["runtime.threads=1", *overrides])
        films = []
        for story in stories(options.films, options.first, options.seconds):
            with tempfile.TemporaryDirectory() as folder:
                films.append(measure(engine, story, Path(folder)))
            print(kind, films[-1], file=sys.stderr)
        numbers = [name for name in films[0] if name not in ("prompt", "loop")]
        means = {name: round(float(np.mean([film[name] or 0.0 for film in films])), 4) for name in numbers}
        result[kind] = {"mean": means, "films": films}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
