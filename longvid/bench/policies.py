"""Policies of sparse attention and of caches beside the whole computation, on the same films of the embedded model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longvid.engine import Engine
from longvid.errors import InputError
from longvid.kernels.layout import BlockLayout
from longvid.metrics.adherence import read_clip, score
from longvid.metrics.fidelity import Fidelity
from longvid.script import Duration, Scene, Script
from longvid.sparsity.tokens import largest_tokens
from longvid.training import world

Frames = NDArray[np.uint8]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """A policy and its settings. `published` is what its paper reports, and `title` what it is called, in the table."""

    name: str
    overrides: tuple[str, ...]
    published: str = ""
    preset: str | None = None
    title: str = ""


@dataclass
class _Side:
    """One case at work, and what was measured of it."""

    case: Case
    engine: Engine
    denoise_s: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)
    densities: list[float] = field(default_factory=list)
    verdicts: list[bool] = field(default_factory=list)
    scores: list[dict[str, bool]] = field(default_factory=list)
    fidelity: Fidelity = field(default_factory=Fidelity)

    def render(self, look: world.Look, seed: int, num_frames: int) -> Frames:
        """A film of one scene, timed."""
        scene = Scene(world.caption(look, np.random.default_rng(seed)), Duration(num_frames, "f"))
        plan = self.engine.plan(Script((scene,), seed=seed))
        start = time.perf_counter()
        finished = list(self.engine.denoise(plan))
        self.denoise_s.append(time.perf_counter() - start)
        frames = np.concatenate([self.engine.decode(plan, chunk) for chunk in finished])
        self.total_s.append(time.perf_counter() - start)
        self.scores.append(score(read_clip(frames), look.attributes()))
        return frames

    def count(self, layout: BlockLayout | None) -> None:
        self.densities.append(1.0 if layout is None else layout.density())

    def count_verdicts(self) -> None:
        """Take down what the cache's gate decides, in all films to come."""
        runtime = self.engine.cache
        if runtime is None:
            return
        note = runtime.note

        def listen(chunk: int, *, is_left_out: bool) -> None:
            self.verdicts.append(is_left_out)
            note(chunk, is_left_out=is_left_out)

        runtime.note = listen  # type: ignore[method-assign]

    def forget(self) -> None:
        """Films from now on count alone."""
        self.denoise_s, self.total_s, self.scores = [], [], []

    @property
    def compute(self) -> float:
        """The share of layers that were computed."""
        plan, layers = self.engine.cache_plan, range(self.engine.facts.num_layers)
        left_out = statistics.mean(self.verdicts) if self.verdicts else 0.0

        def share(step: int) -> float:
            found = statistics.mean(plan.share(layer, step) for layer in layers)
            if plan.steps[step].treatment != "gated":
                return found
            assert plan.gate is not None
            behind = len(plan.steps[step].span) or len(layers) - plan.gate.layers
            return found - left_out * behind / len(layers)

        return statistics.mean(map(share, range(len(plan.steps))))


DENSE = Case("dense", ())


def measure_policies(
    cases: Sequence[Case],
    common: Sequence[str],
    *,
    films: int,
    frames: int,
    reference: Case = DENSE,
    model: str = "mini",
    together: int | None = None,
    before: dict[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
    say: Say,
) -> dict[str, Any]:
    """Times as medians of ratios to the reference on the same film, PSNR (dB) and SSIM to its frames, adherence.

    `density` is the mean over all attentions, the dense ones of warm-up included; it is counted in a film that is not
    timed. `compute` is the share of layers that ran. `together` cases (None: all) and the reference render a film
    before the next film begins, so that they see the same machine; `keep` is given the result after each of these
    groups. What `before`, such a result, has of these cases is not measured again. Raises InputError where it is of
    other films or settings.
    """
    dense = _Side(reference, _load(model, common, reference))
    plan = dense.engine.plan(Script((Scene("a red circle", Duration(frames, "f")),)))
    tokens = largest_tokens(plan, dense.engine.settings, dense.engine.facts)
    head = {
        "films": films,
        "frames": frames,
        "settings": list(common),
        "queries": tokens.num_queries,
        "keys": tokens.num_keys,
    }
    if before and (changed := [name for name, value in head.items() if before.get(name) != value]):
        raise InputError(f"the results to go on with have other {', '.join(changed)}: name another file, or start anew")
    rows = {row["name"]: row for row in before["policies"]} if before else {}
    first = before["dense"] if before else None
    missing = [case for case in cases if rows.get(case.name, {}).get("overrides") != list(case.overrides)]
    size = together or max(1, len(missing))
    for start in range(0, len(missing), size):
        sides = [_Side(case, _load(model, common, case)) for case in missing[start : start + size]]
        _render_in_turns(dense, sides, films, frames, say)
        rows |= {side.case.name: _result(side, dense) for side in sides}
        first = first or _result(dense, dense)
        keep({**head, "dense": first, "policies": [rows[case.name] for case in cases if case.name in rows]})
    return {**head, "dense": first or {}, "policies": [rows[case.name] for case in cases]}


def _render_in_turns(dense: _Side, sides: Sequence[_Side], films: int, frames: int, say: Say) -> None:
    """The same films by each side, one film of all behind the other."""
    names = ", ".join(side.case.name for side in sides)
    rng = np.random.default_rng(7)
    for seed in range(films + 1):
        look = world.sample_look(rng)
        if seed == 0:
            _warm_up(dense, sides, look, frames)
            continue
        originals = dense.render(look, seed, frames)
        for side in sides:
            for image, original in zip(side.render(look, seed, frames), originals, strict=True):
                side.fidelity.push(image, original)
        say(f"{names}: film {seed} of {films}")


def _load(model: str, common: Sequence[str], case: Case) -> Engine:
    is_sparse = any(override.startswith("attention.") for override in case.overrides)
    always = ["attention.crossover=always"] if is_sparse else []
    return Engine.load(model, preset=case.preset, overrides=[*common, *always, *case.overrides])


def _warm_up(dense: _Side, sides: Sequence[_Side], look: world.Look, frames: int) -> None:
    """A film of each that does not count, in which densities are counted."""
    for side in (dense, *sides):
        runtime = side.engine.attention
        if runtime:
            runtime.on_layout = side.count
        side.render(look, 0, frames)
        side.forget()
        if runtime:
            runtime.on_layout = None
        side.count_verdicts()


def _result(side: _Side, dense: _Side) -> dict[str, Any]:
    joint = [all(shown[name] for name in world.ATTRIBUTES) for shown in side.scores]
    compared = side.fidelity.num_frames > 0
    return {
        "name": side.case.name,
        "overrides": list(side.case.overrides),
        "published": side.case.published,
        "title": side.case.title or f"`{side.case.name}`",
        "denoise_s": statistics.median(side.denoise_s),
        "dense_denoise_s": statistics.median(dense.denoise_s),
        "denoise_speedup": _ratio(dense.denoise_s, side.denoise_s),
        "speedup": _ratio(dense.total_s, side.total_s),
        "compute": side.compute,
        "density": statistics.mean(side.densities) if side.densities else 1.0,
        "sparse_density": statistics.mean([d for d in side.densities if d < 1] or [1.0]),
        "psnr": side.fidelity.psnr() if compared else None,
        "ssim": side.fidelity.ssim() if compared else None,
        "joint_adherence": statistics.mean(joint),
        "adherence": {name: statistics.mean(shown[name] for shown in side.scores) for name in world.ATTRIBUTES},
    }


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def as_text(result: dict[str, Any]) -> str:
    """The table for people."""
    lines = [
        f"{result['films']} films of {result['frames']} frames, {result['queries']} x {result['keys']} tokens",
        f"{'':24}{'denoise':>9}{'film':>8}{'compute':>9}{'density':>9}{'PSNR':>8}{'SSIM':>8}{'joint':>7}",
    ]
    for row in (result["dense"], *result["policies"]):
        fidelity = f"{row['psnr']:8.2f}{row['ssim']:8.4f}" if row["psnr"] is not None else " " * 16
        times = f"{row['denoise_speedup']:8.2f}x{row['speedup']:7.2f}x{row['compute']:9.3f}{row['density']:9.3f}"
        lines.append(f"{row['name']:24}{times}{fidelity}{row['joint_adherence']:7.0%}")
    return "\n".join(lines)


def as_markdown(result: dict[str, Any]) -> str:
    """The table of sparse attention as the README has it."""
    lines = [
        "| policy | density | denoising | film | PSNR | SSIM | prompts obeyed | its paper |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["policies"]:
        times = f"{row['density']:.2f} | {row['denoise_speedup']:.2f}x | {row['speedup']:.2f}x"
        fidelity = f"{row['psnr']:.1f} dB | {row['ssim']:.3f} | {row['joint_adherence']:.0%}"
        lines.append(f"| {row['title']} | {times} | {fidelity} | {row['published'] or '-'} |")
    return "\n".join(lines)
