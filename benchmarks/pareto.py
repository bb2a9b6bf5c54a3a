"""A picture of results of policies.py: PSNR over the speed-up of the whole film, with the front that nothing beats.

pip install matplotlib
python benchmarks/pareto.py benchmarks/results/cache-policies-cpu.json benchmarks/results/caches.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

MARKS = "osDv^<>PXh"


def front(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that are not beaten in both speed and fidelity, from slow to fast."""
    found: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: -row["speedup"]):
        if not found or row["psnr"] > found[-1]["psnr"]:
            found.append(row)
    return found[::-1]


def draw(result: dict[str, Any], path: Path) -> None:
    """One mark a policy, its family's in one shape; a line along the front."""
    rows = result["policies"]
    families = list(dict.fromkeys(row["name"].split()[0] for row in rows))
    figure, axes = plt.subplots(figsize=(8, 5), dpi=110)
    best = front(rows)
    axes.plot([row["speedup"] for row in best], [row["psnr"] for row in best], color="0.75", zorder=1)
    for index, family in enumerate(families):
        own = [row for row in rows if row["name"].split()[0] == family]
        points = [row["speedup"] for row in own], [row["psnr"] for row in own]
        axes.scatter(*points, marker=MARKS[index % len(MARKS)], s=45, label=family, zorder=2)
        for row in own:
            label = row["name"].removeprefix(family).strip()
            axes.annotate(label, (row["speedup"], row["psnr"]), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("whole film, times as fast as without a cache")
    axes.set_ylabel("PSNR to the film without a cache (dB)")
    axes.set_title(f"{result['films']} films of {result['frames']} frames, {' '.join(result['settings'])}", fontsize=10)
    axes.grid(color="0.92")
    axes.legend(frameon=False, fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
