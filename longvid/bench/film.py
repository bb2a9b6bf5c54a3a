"""`longvid bench film`: stock diffusers (the whole clip at once) and longvid on the same film, one after the other.

Both have the same weights, steps, dtype, threads, prompt and number of frames, no guidance, and end with the same
writer. This side starts a process for each and loads no torch, so that their peaks are their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from longvid.doctor import cpu_facts, package_version
from longvid.errors import InputError, RuntimeFailure

Side = Literal["longvid", "diffusers"]


@dataclass(frozen=True)
class FilmBench:
    """What both sides do. `seconds` of film (rounded up to whole latents); `threads` 0: torch decides.

    `size` is (width, height) in pixels; None: the model's own. `settings` (A.B=C) are longvid's alone.
    """

    model: str = "mini"
    seconds: float = 60.0
    steps: int = 8
    dtype: str = "float32"
    threads: int = 0
    size: tuple[int, int] | None = None
    settings: tuple[str, ...] = ()

    def overrides(self) -> list[str]:
        """The same as settings."""
        return [
            *self.settings,
            f"sampler.steps={self.steps}",
            "sampler.guidance=1.0",
            f"runtime.dtype={self.dtype}",
            f"runtime.threads={self.threads}",
            f"model.path={self.model}",
        ]


def bench_film(bench: FilmBench, *, with_10min: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure both sides. Times (`_s`) leave loading the model out; peaks (`_mb`, 10^6 bytes) do not.

    `ours_peak_mb_10min` is of a film ten times as long (None when it was skipped). Raises InputError for a wrong model
    or setting, RuntimeFailure when a side fails.
    """
    say(f"longvid: {bench.seconds:g} s of film")
    ours = run_side("longvid", bench)
    say(f"longvid took {ours['total_s']:.1f} s; diffusers: the same film")
    stock = run_side("diffusers", bench)
    say(f"diffusers took {stock['total_s']:.1f} s")
    long = None
    if with_10min:
        say(f"longvid: {bench.seconds * 10:g} s of film")
        long = run_side("longvid", replace(bench, seconds=bench.seconds * 10))
    return {
        "ours_s": ours["total_s"],
        "diffusers_s": stock["total_s"],
        "speedup": stock["total_s"] / ours["total_s"],
        "ours_peak_mb": ours["peak_mb"],
        "diffusers_peak_mb": stock["peak_mb"],
        "ours_peak_mb_10min": long["peak_mb"] if long else None,
        "ours_s_10min": long["total_s"] if long else None,
        "ours": ours,
        "diffusers": stock,
        **asdict(bench),
        **{key: ours[key] for key in ("frames", "width", "height")},
        "machine": {
            "cpu": cpu_facts()["name"],
            "cores": cpu_facts()["cores"],
            "threads": ours["threads"],
            "device": ours["device"],
            **{name: package_version(name) for name in ("torch", "diffusers", "longvid")},
        },
    }


def run_side(side: Side, bench: FilmBench) -> dict[str, Any]:
    """Run one side in a fresh process and return what it measured."""
    # -P: nothing of the current folder may stand in for an installed package.
    command = [sys.executable, "-P", "-m", "longvid.bench.sides", side, json.dumps(asdict(bench))]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        raise RuntimeFailure(f"bench film: the {side} side was killed by signal {-done.returncode} (out of memory?)")
    try:
        measured: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise RuntimeFailure(f"bench film: the {side} side failed:\n{done.stderr.strip()}") from None
    if "error" in measured:
        kind = InputError if done.returncode == InputError.exit_code else RuntimeFailure
        raise kind(measured["error"])
    return measured


def as_text(result: dict[str, Any]) -> str:
    """The result of `bench_film` for people."""
    machine = result["machine"]
    threads = f"{machine['threads']} threads of {machine['cpu']}"
    size = f"{result['width']} x {result['height']} pixels"
    lines = [
        f"{result['frames']} frames of {size}, {result['steps']} steps, {result['dtype']}, {threads}",
        f"{'':10}{'total':>10}{'denoise':>10}{'decode':>10}{'write':>10}{'peak':>12}",
    ]
    for name, side in (("longvid", result["ours"]), ("diffusers", result["diffusers"])):
        times = "".join(f"{side[key]:8.1f} s" for key in ("total_s", "denoise_s", "decode_s", "write_s"))
        lines.append(f"{name:10}{times}{side['peak_mb']:9.0f} MB")
    lines.append(f"speedup {result['speedup']:.2f}x")
    if result["ours_peak_mb_10min"] is not None:
        growth = result["ours_peak_mb_10min"] / result["ours_peak_mb"]
        lines.append(f"ten times the film: peak {result['ours_peak_mb_10min']:.0f} MB, {growth:.3f}x")
    return "\n".join(lines)
