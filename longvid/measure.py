"""`longvid measure`: a film against its storyboard, its plan and a reference, and the result in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longvid.errors import InputError
from longvid.metrics.film import measure_film
from longvid.metrics.reader import FilmReader
from longvid.models.facts import facts_of
from longvid.plan import ModelFacts, Plan, make_plan
from longvid.script import Script
from longvid.settings import Settings


def measure_render(film: Path, script: Script, settings: Settings, reference: Path | None) -> dict[str, Any]:
    """What `measure_film` says, with the chunk borders and the scale of the render that `settings` describe.

    Raises InputError for a film that this render cannot have made.
    """
    facts = facts_of(settings.model.path)
    plan = make_plan(script, settings, facts)
    scale = _scale(film, plan)
    return measure_film(film, script, reference, chunk_borders=chunk_borders(plan, facts), scale=scale)


def chunk_borders(plan: Plan, facts: ModelFacts) -> list[int]:
    """Frames of the film at which a chunk begins that goes on with a shot."""
    return [
        plan.shots[chunk.shot].first_frame + facts.grid.num_frames(chunk.start)
        for chunk in plan.chunks
        if chunk.start > 0
    ]


def _scale(path: Path, plan: Plan) -> int:
    """By how much the film was upscaled when it was written."""
    with FilmReader(path) as film:
        scale = film.width // plan.width
        if scale < 1 or (film.width, film.height) != (scale * plan.width, scale * plan.height):
            made = f"is {film.width} x {film.height} pixels"
            planned = f"the storyboard and the settings make {plan.width} x {plan.height}"
        # A file holds its rate as a fraction.
        elif abs(film.fps - plan.fps) > 0.01:
            made, planned = f"has {film.fps:g} fps", f"the storyboard and the settings make {plan.fps:g}"
        else:
            return scale
    raise InputError(f"{path}: {made}, but {planned}; give the --model and the settings that it was rendered with")


def as_text(result: dict[str, Any]) -> str:
    """The measures for people; what was not measured is left out."""
    size = f"{result['width']} x {result['height']}"
    lines = [f"film       {result['seconds']:.1f} s, {result['frames']} frames of {size} at {result['fps']:g} fps"]
    for scene in result["scenes"]:
        verdict = {True: "ok", False: "WRONG", None: "-"}[scene["ok"]]
        lines.append(f"  frame {scene['first_frame']:>6}  {verdict:6}{scene['prompt']}")
        lines += [
            f"{'':24}{name}: asked for {scene['expected'][name]}, shows {scene[name] or 'none'}"
            for name, matches in scene["matches"].items()
            if not matches
        ]
    if result["adherence"]:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in result["adherence"].items() if share is not None)
        lines.append(f"adherence  joint {result['joint_adherence']:.0%} ({shares})")
    numbers = (
        ("seams", "seam_ratio", "change at chunk borders over change elsewhere"),
        ("flicker", "flicker", ""),
        ("PSNR", "psnr", "dB"),
        ("SSIM", "ssim", ""),
    )
    lines += [f"{name:10} {result[key]:.3f} {what}".rstrip() for name, key, what in numbers if result[key] is not None]
    if result["drift"]:
        lines.append(f"drift      {_drift(result['drift'])}")
    if result["loop"]:
        lines.append(f"loop       {_loop(result['loop'])}")
    return "\n".join(lines)


def _drift(drift: dict[str, Any]) -> str:
    colour = max(drift["rgb_quarters"])
    return f"colour {colour:.1f} and contrast {drift['std_quarters']:.1f} levels between the first and last quarter"


def _loop(loop: dict[str, Any]) -> str:
    return f"repeats itself after {loop['lag_s']:.1f} s" if loop["found"] else "none"
