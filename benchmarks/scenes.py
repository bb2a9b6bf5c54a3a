"""Scene changes on the embedded model, one kind beside the other: how soon the new prompt shows, how smooth the change
is, and whether both prompts are obeyed; and prompts that change as the film streams. With a contact sheet.

Every film is kept in the result as soon as it is measured, and what is there is not made again, but for the sheet.

python benchmarks/scenes.py --out benchmarks/results/scenes.json
python benchmarks/scenes.py --out benchmarks/results/scenes.json --sheet benchmarks/results/scenes.png --films 16
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from longvid.engine import Engine
from longvid.events import Event, PromptChanged
from longvid.metrics.adherence import expected, read_clip, score
from longvid.script import Duration, Scene, Script, Transition
from longvid.training import world

KINDS = {
    "cut": Transition("cut"),
    "blend": Transition("blend", Duration(1, "s")),
    "blend of one latent": Transition("blend", Duration(1, "f")),
    "share": Transition("share"),
}
SCENE, LATENT, WINDOW = 128, 4, 8
"""Frames of a scene (of two), of a latent, and of those that are read together to find when a change has come."""
SETTLED = 24
"""Frames after the change that belong to neither prompt."""
EARLY_STEPS, LIVE_FRAMES = (0, 2, 4), 320
SEEN_AT = (-8, -1, 1, 4, 8, 12, 16, 24, 40, 64, 96)
"""Frames of the contact sheet, from the change."""
Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Change:
    """Two prompts of one background."""

    before: str
    after: str

    def script(self, transition: Transition, seed: int) -> Script:
        length = Duration(SCENE, "f")
        return Script((Scene(self.before, length), Scene(self.after, length, transition)), seed=seed)


def changes(count: int) -> list[Change]:
    """Every other one changes the motion alone, the others the object."""
    rng = np.random.default_rng(0)
    found = []
    for index in range(count):
        looks = world.all_looks()
        look = looks[rng.integers(len(looks))]
        if index % 2:
            motions = [motion for motion in world.MOTIONS if motion != look.motion]
            other = replace(look, motion=motions[rng.integers(len(motions))])
        else:
            others = [
                x
                for x in looks
                if (x.background, x.size, x.motion) == (look.background, look.size, look.motion)
                and x.colour != look.colour
                and x.shape != look.shape
            ]
            other = others[rng.integers(len(others))]
        found.append(Change(world.caption(look), world.caption(other)))
    return found


def obeys(frames: Frames, prompt: str, names: set[str] | None = None) -> bool:
    """Whether frames show what a prompt says; `names` are the attributes that count."""
    wanted = {name: value for name, value in expected(prompt).items() if names is None or name in names}
    return score(read_clip(frames), wanted)["ok"]


def lag(frames: Frames, change: Change) -> int | None:
    """Latents of the new scene until what changed shows, for half a second; None: it never does.

    A motion takes many frames to be read, so only what is seen in single ones counts.
    """
    before, after = expected(change.before), expected(change.after)
    names = {name for name in after if name != "motion" and after[name] != before[name]}
    if not names:
        return None
    for start in range(SCENE, 2 * SCENE - WINDOW, LATENT):
        if obeys(frames[start : start + WINDOW], change.after, names):
            return (start - SCENE) // LATENT
    return SCENE // LATENT


def jump(frames: Frames) -> float:
    """The largest step from frame to frame around the change, as a multiple of the median elsewhere."""
    steps = np.array([np.abs(b.astype(int) - a).mean() for a, b in pairwise(frames)])
    around = slice(SCENE - LATENT, SCENE + SETTLED)
    return float(steps[around].max() / np.median(np.delete(steps, np.arange(around.start, around.stop))))


def measure(engine: Engine, kind: str, change: Change, seed: int) -> tuple[dict[str, Any], Frames]:
    frames = np.concatenate(list(engine.stream(change.script(KINDS[kind], seed))))
    found = {
        "kind": kind,
        "before": change.before,
        "after": change.after,
        "lag": lag(frames, change),
        "obeys_before": obeys(frames[SCENE // 2 : SCENE], change.before),
        "obeys_after": obeys(frames[SCENE + SETTLED :], change.after),
        "jump": jump(frames),
    }
    return found, frames


def measure_live(engine: Engine, change: Change, seed: int, early_steps: int) -> dict[str, Any]:
    """A film whose prompt is changed when its first frames are there: how many frames later it shows, and how well."""
    script = Script((Scene(change.before, Duration(LIVE_FRAMES, "f")),), seed=seed)
    events: list[Event] = []
    stream = engine.stream(script, events.append, early_steps=early_steps)
    pieces = [next(stream)]
    stream.prompt(change.after)
    frames = np.concatenate([*pieces, *stream])
    [event] = [event for event in events if isinstance(event, PromptChanged)]
    return {
        "early_steps": early_steps,
        "before": change.before,
        "after": change.after,
        "frames_later": event.first_frame - len(pieces[0]),
        "obeys_before": obeys(frames[len(pieces[0]) : event.first_frame], change.before),
        "obeys_after": obeys(frames[event.first_frame + SETTLED :], change.after),
    }


def table(rows: list[dict[str, Any]]) -> str:
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
    lines = [
        "| transition | latents until it shows: median, most | obeyed before | after | largest jump |",
        "|---|---|---|---|---|",
    ]
    for kind in kinds:
        own = [row for row in rows if row["kind"] == kind]
        lags = [row["lag"] for row in own if row["lag"] is not None]
        before, after = (sum(row[f"obeys_{when}"] for row in own) for when in ("before", "after"))
        jumps = np.median([row["jump"] for row in own])
        obeyed = f"{before} of {len(own)} | {after} of {len(own)}"
        shows = f"{np.median(lags):g}, {max(lags)}" if lags else ""
        lines.append(f"| `{kind}` | {shows} | {obeyed} | {jumps:.1f}x |")
    return "\n".join(lines)


def live_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| `early_steps` | frames from the asking to the change | obeyed before | after |", "|---|---|---|---|"]
    for early_steps in EARLY_STEPS:
        own = [row for row in rows if row["early_steps"] == early_steps]
        if not own:
            continue
        before, after = (sum(row[f"obeys_{when}"] for row in own) for when in ("before", "after"))
        later = np.median([row["frames_later"] for row in own])
        lines.append(f"| {early_steps} | {later:.0f} | {before} of {len(own)} | {after} of {len(own)} |")
    return "\n".join(lines)


def sheet(films: list[tuple[str, Change, Frames]], path: Path) -> None:
    """A row a film: frames around the change, labelled by their distance from it."""
    side, left, top, gap = 64, 128, 16, 2
    width, height = left + len(SEEN_AT) * (side + gap), top + len(films) * (side + gap)
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    for column, at in enumerate(SEEN_AT):
        draw.text((left + column * (side + gap) + 4, 2), f"{at:+d}", fill="black")
    for row, (kind, change, frames) in enumerate(films):
        y = top + row * (side + gap)
        for line, text in enumerate([kind, *_in_lines(change.before), "to", *_in_lines(change.after)][:6]):
            draw.text((2, y + 10 * line), text, fill="black" if line else "darkred")
        for column, at in enumerate(SEEN_AT):
            page.paste(Image.fromarray(frames[SCENE + at]), (left + column * (side + gap), y))
    page.quantize(128).save(path, optimize=True)


def _in_lines(prompt: str) -> list[str]:
    """Two short lines of a prompt."""
    words = prompt.removeprefix("a ").split(" over ")[0].split()
    return [" ".join(words[:3]), " ".join(words[3:])]


def is_there(rows: list[dict[str, Any]], change: Change, **facts: Any) -> bool:
    """Whether a film was measured before."""
    wanted = {"before": change.before, "after": change.after, **facts}
    return any(wanted.items() <= row.items() for row in rows)


def open_result(path: Path | None, overrides: list[str]) -> dict[str, Any]:
    """What was measured before with these settings."""
    empty: dict[str, Any] = {"frames": 2 * SCENE, "settings": overrides, "rows": [], "live": []}
    if path is None or not path.exists():
        return empty
    result: dict[str, Any] = json.loads(path.read_text())
    return result if all(result[name] == empty[name] for name in ("frames", "settings")) else empty


@dataclass
class Bench:
    """Measures what is not there yet, for so many minutes."""

    engine: Engine
    result: dict[str, Any]
    out: Path | None
    minutes: float
    began: float = field(default_factory=time.monotonic)

    @property
    def is_over(self) -> bool:
        return time.monotonic() - self.began > 60 * self.minutes

    def keep(self, name: str, found: dict[str, Any]) -> None:
        self.result[name].append(found)
        print(json.dumps(found), file=sys.stderr, flush=True)
        if self.out:
            self.out.write_text(json.dumps(self.result, indent=1) + "\n")

    def transitions(self, count: int, shown: int) -> list[tuple[str, Change, Frames]]:
        """So many films of each kind. Returns those of the first changes, which are to be shown."""
        films = []
        for index, change in enumerate(changes(count)):
            for kind in KINDS:
                is_known = is_there(self.result["rows"], change, kind=kind)
                if (is_known and index >= shown) or self.is_over:
                    continue
                found, frames = measure(self.engine, kind, change, seed=index)
                if not is_known:
                    self.keep("rows", found)
                if index < shown:
                    films.append((kind, change, frames))
        return films

    def live(self, count: int) -> None:
        """So many films of each `early_steps`."""
        for index, change in enumerate(changes(count)):
            for early_steps in EARLY_STEPS:
                if not is_there(self.result["live"], change, early_steps=early_steps) and not self.is_over:
                    self.keep("live", measure_live(self.engine, change, index, early_steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=int, default=12, help="of each kind")
    parser.add_argument("--live", type=int, default=8, help="films of each `early_steps`")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="A.B=C")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no film after so many")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sheet", type=Path)
    args = parser.parse_args()
    engine, result = Engine.load("mini", overrides=args.overrides), open_result(args.out, args.overrides)
    bench = Bench(engine, result, args.out, args.minutes)
    films = bench.transitions(args.films, 3 if args.sheet else 0)
    bench.live(args.live)
    if films:
        sheet(films, args.sheet)
    print(table(result["rows"]))
    print(f"\n{live_table(result['live'])}")


if __name__ == "__main__":
    main()
