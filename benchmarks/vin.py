"""Films of one scene by every schedule, with and without global tokens, on the embedded model: looks and costs.

Every film is kept in the result as soon as it is measured, and what is there is not made again: the command can be
stopped, run in pieces (`--minutes`), and run again with more films.

python benchmarks/vin.py --out benchmarks/results/vin-cpu.json
python benchmarks/vin.py --out benchmarks/results/vin-cpu.json --seconds 60 300 --films 8 --kinds "queue" "queue + VIN"

All kinds are judged at the chunk borders of the queue; a whole clip has none of its own. Consistency has VBench's
formula over pixels of the subject, cut out by its matte, and over the background (`longvid.metrics.subject`). A jolt is
the mean change of the subject's velocity from frame to frame, of 64 pixels a side. Drift is how far the film's last
quarter lies from its first, wander how far all that follows its first quarter does, three seconds at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from longvid.engine import Engine
from longvid.kernels import dense
from longvid.measure import chunk_borders
from longvid.metrics.film import measure_film
from longvid.models.facts import facts_of, find_model
from longvid.models.vin_config import FOLDER, WEIGHTS_FILE
from longvid.plan import make_plan
from longvid.script import Script, parse_script
from longvid.settings import load_settings
from longvid.training import world

KINDS = {
    "chunks": ("schedule=chunks",),
    "chunks + VIN": ("schedule=chunks", "vin.policy=on"),
    "chunks fused + VIN": ("schedule=chunks", "vin.policy=on", "chunks.fuse=1"),
    "queue": (),
    "queue + VIN": ("vin.policy=on",),
    "whole clip": ("schedule=sequential",),
}
FILMS = {24.0: 8, 60.0: 8, 300.0: 10}
"""Films of each length."""
FITS = 60.0
"""Seconds up to which a whole clip fits the model's positions."""
FIGURES = {
    "seam_ratio": "seam ratio",
    "joint_adherence": "joint adherence",
    "subject_consistency": "subject consistency",
    "drift_background": "drift of background, levels",
    "jolt": "jolt, px",
    "drift_size": "drift of size, %",
    "drift_speed": "of speed, %",
    "drift_path": "of path, px",
    "wander_size": "wander of size, %",
    "wander_speed": "of speed, %",
    "wander_path": "of path, px",
}
PAIRS = (("chunks", "chunks + VIN"), ("queue", "queue + VIN"))
LESS_IS_BETTER = ("seam_ratio", "jolt", "drift_background", "drift_size", "drift_speed", "drift_path")
LESS_IS_BETTER += ("wander_size", "wander_speed", "wander_path")


def story(index: int, seconds: float) -> Script:
    """A storyboard of one scene; the looks are the world's, in a fixed order."""
    rng = np.random.default_rng(5)
    caption = [world.caption(world.sample_look(rng)) for _ in range(index + 1)][-1]
    text = f'seed: {100 + index}\nscenes:\n  - {{prompt: "{caption}", for: {seconds}s}}\n'
    return parse_script(text, "story.yaml")


def measure(engine: Engine, script: Script) -> dict[str, Any]:
    """What one film shows."""
    settings = load_settings(None, [])
    facts = facts_of(settings.model.path)
    borders = chunk_borders(make_plan(script, settings, facts), facts)
    with tempfile.TemporaryDirectory() as folder:
        film, began = Path(folder) / "film.mp4", time.monotonic()
        engine.render(script, film)
        rendered = time.monotonic() - began
        found = measure_film(film, script, chunk_borders=borders)
    subject = found["scenes"][0]["subject"] or {}
    row = {"prompt": script.scenes[0].prompt, "render_s": round(rendered, 1)}
    row |= {name: found[name] for name in ("joint_adherence", "seam_ratio", "seam_second_ratio", "flicker")}
    row |= {name: subject.get(name) for name in ("subject_consistency", "background_consistency", "jolt")}
    for kind in ("drift", "wander"):
        row |= {f"{kind}_{name}": value for name, value in subject.get(kind, {}).items()}
    return row | {
        "drift_background": max(found["drift"]["rgb_quarters"]),
        "drift_contrast": found["drift"]["std_quarters"],
        "loop": found["loop"]["found"],
    }


def attention_flops(query: list[int], key: list[int], value: list[int], *_: Any, **__: Any) -> int:
    """Of one call of torch's attention for a CPU, which its counter does not know."""
    batch, heads, queries, width = query
    return 4 * batch * heads * queries * key[2] * width


def count_flops(engine: Engine, script: Script) -> float:
    """What denoising a film takes, counted as it is done: decoding is the same for all."""
    cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={cpu: attention_flops})
    own, dense.MIN_KEYS = dense.MIN_KEYS, {}  # torch counts its own attention alone
    try:
        with counter:
            for _ in engine.denoise(engine.plan(script)):
                pass
    finally:
        dense.MIN_KEYS = own
    return float(counter.get_total_flops())


# ------------------------------------------------------------------------------------------------------------ the table


def compared(films: dict[str, Any], seconds: float, one: str, other: str, figure: str) -> str | None:
    """By how much two kinds differ in a figure, on the films that both have: mean, its standard error, how many won."""
    rows = films.get(f"{seconds:g}", {})
    shared = sorted(set(rows.get(one, {})) & set(rows.get(other, {})))
    pairs = [(rows[one][i][figure], rows[other][i][figure]) for i in shared]
    gaps = np.array([b - a for a, b in pairs if a is not None and b is not None])
    if len(gaps) < 2:
        return None
    won = int(np.sum(gaps < 0 if figure in LESS_IS_BETTER else gaps > 0))
    error = gaps.std(ddof=1) / len(gaps) ** 0.5
    return f"{gaps.mean():+.2g} ± {error:.2g} ({won} of {len(gaps)})"


def table(result: dict[str, Any]) -> str:
    """Means, each with the standard deviation over films; then what global tokens change, film by film."""
    films, lines = result["films"], []
    for length, kinds in sorted(films.items(), key=lambda item: float(item[0])):
        counts = result["flops"].get(length, {})
        lines += [f"\n{length} s", "", "| | films | TFLOP | " + " | ".join(FIGURES.values()) + " |"]
        lines.append("|---" * (len(FIGURES) + 3) + "|")
        for kind in (kind for kind in KINDS if kinds.get(kind)):
            rows = list(kinds[kind].values())
            flops = f"{counts[kind] / 1e12:.2f}" if kind in counts else ""
            cells = [_cell([row[name] for row in rows if row[name] is not None]) for name in FIGURES]
            lines.append(f"| {kind} | {len(rows)} | {flops} | " + " | ".join(cells) + " |")
        for one, other in PAIRS:
            gaps = [compared(films, float(length), one, other, name) for name in FIGURES]
            if any(gaps):
                lines.append(f"| {other} - {one} | | | " + " | ".join(gap or "" for gap in gaps) + " |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    return f"{np.mean(values):#.3g} ± {np.std(values):.2g}" if values else ""


# ------------------------------------------------------------------------------------------------------------- the runs


def digest(adapter: Path) -> str:
    return hashlib.sha256((adapter / WEIGHTS_FILE).read_bytes()).hexdigest()[:16]


def open_result(path: Path | None, adapter: str) -> dict[str, Any]:
    """What was measured before; not the films of another adapter."""
    empty: dict[str, Any] = {"adapter": adapter, "flops": {}, "films": {}}
    if path is None or not path.exists():
        return empty
    result: dict[str, Any] = json.loads(path.read_text())
    if result["adapter"] != adapter:
        for kinds in result["films"].values():
            for kind in [kind for kind in kinds if kind.endswith("VIN")]:
                del kinds[kind]
    return result | {"adapter": adapter}


def wanted(options: argparse.Namespace) -> Iterator[tuple[int, float, str]]:
    """Films to make, in an order in which every kind has as many at any time."""
    counts = {seconds: options.films or FILMS[seconds] for seconds in options.seconds}
    for index in range(max(counts.values())):
        for seconds in (seconds for seconds, count in counts.items() if index < count):
            for kind in options.kinds:
                if kind != "whole clip" or seconds <= FITS:
                    yield index, seconds, kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, nargs="*", choices=FILMS, default=list(FILMS))
    parser.add_argument("--films", type=int, help="of each length and kind")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--adapter", type=Path, help="its directory, for another than the model's own")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no film after so many")
    parser.add_argument("--flops", action="store_true", help="count operations, too: of one film of each kind")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    adapter = options.adapter or find_model("mini") / FOLDER
    result, engines, began = open_result(options.out, digest(adapter)), {}, time.monotonic()
    for index, seconds, kind in wanted(options):
        films = result["films"].setdefault(f"{seconds:g}", {}).setdefault(kind, {})
        counts = result["flops"].setdefault(f"{seconds:g}", {})
        is_counted = not options.flops or kind in counts or seconds > FITS
        if (str(index) in films and is_counted) or time.monotonic() - began > 60 * options.minutes:
            continue
        overrides = ["runtime.threads=1", f"vin.path={adapter}", *KINDS[kind]]
        if kind not in engines:
            engines[kind] = Engine.load("mini", overrides=overrides)
        script = story(index, seconds)
        if not is_counted:  # torch counts its own linear layers alone
            counts[kind] = count_flops(Engine.load("mini", overrides=[*overrides, "runtime.linear=torch"]), script)
        if str(index) not in films:
            films[str(index)] = measure(engines[kind], script)
            print(f"{seconds:g} s", kind, index, json.dumps(films[str(index)]), file=sys.stderr, flush=True)
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
