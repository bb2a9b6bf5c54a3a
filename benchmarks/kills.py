"""Kill a random rank of a render at random moments, resume it, and compare the film with one that was never killed.

python benchmarks/kills.py --kills 20 --ranks 2 --out benchmarks/results/kills.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STORY = 'scenes:\n  - {prompt: "a large red circle moving left over a blue background", for: 20s}\n'
SETTINGS = ["runtime.threads=1", "runtime.checkpoint_s=1", "sampler.steps=16"]


def command(story: Path, film: Path, ranks: int, *options: str) -> list[str]:
    sets = [part for setting in SETTINGS for part in ("--set", setting)]
    base = [sys.executable, "-P", "-m", "longvid", "render", str(story), "-o", str(film), "--ranks", str(ranks)]
    return [*base, *sets, *options]


def digest(film: Path) -> str:
    return hashlib.sha256(film.read_bytes()).hexdigest()


def kill_once(story: Path, film: Path, ranks: int, delay_s: float, rng: random.Random) -> tuple[str, float] | None:
    """Render until a random rank is killed, so long after the first checkpoint.

    Returns what the supervisor said, and the seconds until all ranks were gone; None where the film was done before.
    """
    process = subprocess.Popen(command(story, film, ranks), stderr=subprocess.PIPE, text=True, start_new_session=True)
    manifest = film.with_name(f"{film.name}.longvid") / "state" / "manifest.json"
    while not manifest.exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(delay_s)
    killed = time.monotonic()
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(rng.choice(children)), signal.SIGKILL)
    except (OSError, IndexError):  # it has ended, or its ranks have
        children = []
    _, errors = process.communicate(timeout=60)
    if process.returncode == 0 or not manifest.exists():  # the film was complete before the kill
        return None
    assert process.returncode == 3, f"exit code {process.returncode}: {errors}"
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    return errors.strip().splitlines()[-1], time.monotonic() - killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rng, results = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as folder:
        story, film = Path(folder) / "story.yaml", Path(folder) / "film.mp4"
        story.write_text(STORY)
        began = time.monotonic()
        subprocess.run(command(story, film, args.ranks), check=True, capture_output=True)
        whole_s, expected = time.monotonic() - began, digest(film)
        for number in range(args.kills):
            killed = None
            while killed is None:
                film.unlink()
                killed = kill_once(story, film, args.ranks, rng.random() * whole_s / 2, rng)
            message, seconds = killed
            on_ranks = rng.choice([1, 2, 3])
            subprocess.run(command(story, film, on_ranks, "--resume"), check=True, capture_output=True)
            same = digest(film) == expected
            results.append({"gone_s": round(seconds, 2), "resumed_on": on_ranks, "same": same})
            print(f"{number + 1}: {'the same film' if same else 'ANOTHER FILM'} after: {message}", flush=True)
    summary = {
        "kills": args.kills,
        "ranks": args.ranks,
        "same": sum(result["same"] for result in results),
        "slowest_end_s": max(result["gone_s"] for result in results),
        "runs": results,
    }
    if args.out:
        args.out.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps({key: value for key, value in summary.items() if key != "runs"}))
    sys.exit(summary["same"] != args.kills)


if __name__ == "__main__":
    main()
