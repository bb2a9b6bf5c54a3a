"""`bench film` does the same work on both sides and reports what each took."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from longvid.bench import film, sides
from longvid.bench.film import FilmBench
from longvid.errors import InputError, RuntimeFailure


def bench_of(model: Path) -> FilmBench:
    return FilmBench(str(model), seconds=1.0, steps=2, threads=1)


def test_a_side_runs_in_a_process_of_its_own(tiny_model: Path) -> None:
    measured = film.run_side("longvid", bench_of(tiny_model))
    assert measured["frames"] == 9 and measured["threads"] == 1
    assert measured["total_s"] == pytest.approx(measured["denoise_s"] + measured["decode_s"] + measured["write_s"])
    assert measured["peak_mb"] > 100


def test_stock_diffusers_makes_the_same_number_of_frames(tiny_model: Path) -> None:
    measured = sides.measure("diffusers", replace(bench_of(tiny_model), size=(48, 32)))
    assert (measured["frames"], measured["width"], measured["height"]) == (9, 48, 32)
    assert min(measured[part] for part in ("denoise_s", "decode_s", "write_s")) > 0


def test_a_sides_input_error_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_program(monkeypatch, 'print(\'{"error": "model.path: no"}\'); raise SystemExit(2)')
    with pytest.raises(InputError, match=r"^model.path: no$"):
        film.run_side("longvid", FilmBench())


def test_a_killed_side_is_a_failure_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_program(monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(RuntimeFailure, match="diffusers side was killed by signal 9"):
        film.run_side("diffusers", FilmBench())


def fake_program(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let a side's process run `code` instead."""
    run = film.subprocess.run
    monkeypatch.setattr(film.subprocess, "run", lambda command, **options: run([command[0], "-c", code], **options))


@pytest.mark.parametrize("with_10min", [True, False])
def test_the_result_compares_the_sides(monkeypatch: pytest.MonkeyPatch, with_10min: bool) -> None:
    def run_side(side: str, bench: FilmBench) -> dict[str, float | str]:
        total = {"longvid": 2.0, "diffusers": 12.0}[side] * bench.seconds / 60
        parts = {"total_s": total, "denoise_s": total, "decode_s": 0.0, "write_s": 0.0}
        return {
            **parts,
            "peak_mb": 500.0 + bench.seconds / 60,
            "frames": 961,
            "width": 64,
            "height": 64,
            "threads": 2,
            "device": "cpu",
        }

    monkeypatch.setattr(film, "run_side", run_side)
    said: list[str] = []
    result = film.bench_film(FilmBench(), with_10min=with_10min, say=said.append)
    assert (result["ours_s"], result["diffusers_s"], result["speedup"]) == (2.0, 12.0, 6.0)
    assert (result["ours_peak_mb"], result["diffusers_peak_mb"]) == (501.0, 501.0)
    assert result["ours_peak_mb_10min"] == (510.0 if with_10min else None)
    assert result["steps"] == 8 and result["dtype"] == "float32" and result["frames"] == 961
    assert "speedup 6.00x" in film.as_text(result)
    assert len(said) == 3 + with_10min
