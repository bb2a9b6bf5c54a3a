"""The command line: what it prints where, and its exit codes."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from typer.testing import CliRunner

from longvid.cli import app
from longvid.errors import Interrupted, Preempted, RuntimeFailure
from longvid.settings import OutputSettings
from longvid.writer import FilmWriter

COMMAND = [sys.executable, "-P", "-m", "longvid"]


def run(*arguments: str | Path):
    """A command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def frames_of(film: Path) -> int:
    with av.open(str(film)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_the_version_is_that_of_the_package() -> None:
    assert run("--version").stdout.startswith("longvid 0.")


def test_render_writes_the_whole_film_and_nothing_on_stdout(story: Path, tiny_model: Path, tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    result = run("render", story, "-o", film, "--model", tiny_model, "--set", "sampler.steps=2")
    assert result.exit_code == 0, result.output
    assert frames_of(film) == 29
    assert result.stdout == ""
    first, second, *_, last = result.stderr.splitlines()
    assert first == "note: line 5: the model does not know 'up'"
    assert second.startswith("rendering 3.6 s of film, 29 frames of 32 x 48 at 8 fps")
    assert last.startswith(f"{film}: 29 frames in")


def test_plan_as_json_is_one_object_that_holds_the_whole_film(story: Path, tiny_model: Path) -> None:
    result = run("plan", story, "--model", tiny_model, "--set", "sampler.steps=3", "--json")
    assert result.exit_code == 0 and result.stderr == ""
    overview = json.loads(result.stdout)
    assert (overview["frames"], overview["fps"], overview["chunks"]) == (29, 8.0, 2)
    assert overview["units"] == 2 * 3 and overview["rounds"] == 4
    scenes = [scene for shot in overview["shots"] for scene in shot["scenes"]]
    assert [scene["num_frames"] for scene in scenes] == [21, 8]
    assert scenes[1]["prompt"] == "a blue square moving up over a blue background"


def test_plan_shows_the_film_and_the_grid(story: Path, tiny_model: Path) -> None:
    text = run("plan", story, "--model", tiny_model, "--grid").stdout
    assert "29 frames of 32 x 48 at 8 fps" in text
    assert "2 chunks × 8 steps = 16 units in 9 rounds" in text
    assert "    8   .   7   finish c1" in text


def test_plan_shows_only_the_beginning_of_a_long_grid(tiny_model: Path, tmp_path: Path) -> None:
    story = tmp_path / "long.yaml"
    story.write_text("scenes: [{prompt: a red circle, for: 3m}]")
    text = run("plan", story, "--model", tiny_model, "--grid").stdout
    assert text.splitlines()[-1] == "and so on, to round 66"
    assert "finish c16" in text and "finish c17" not in text


def test_measure_reads_a_film_by_its_storyboard(story: Path, tiny_model: Path, tmp_path: Path) -> None:
    film = drawn_film(tmp_path / "film.mp4", num_frames=29, scale=2)
    options = ["--script", story, "--model", tiny_model, "--set", "queue.chunk_latents=2", "--reference", film]
    measured = json.loads(run("measure", film, *options, "--json").stdout)
    assert (measured["frames"], measured["fps"], measured["seconds"]) == (29, 8.0, 3.625)
    assert (measured["width"], measured["height"]) == (64, 96)
    assert [scene["frames"] for scene in measured["scenes"]] == [21, 8]
    assert {"joint_adherence", "seam_ratio", "flicker", "drift"} <= measured.keys()
    assert measured["seam_ratio"] is not None
    text = run("measure", film, *options).stdout
    assert "film       3.6 s, 29 frames of 64 x 96 at 8 fps" in text
    assert "frame     21" in text and "a blue square moving up" in text


def test_measure_needs_no_storyboard(tmp_path: Path) -> None:
    film = drawn_film(tmp_path / "film.mp4", num_frames=12, scale=1)
    measured = json.loads(run("measure", film, "--json").stdout)
    assert measured["frames"] == 12 and measured["scenes"] == [] and measured["seam_ratio"] is None


def test_measure_refuses_a_film_of_another_render(story: Path, tiny_model: Path, tmp_path: Path) -> None:
    film = drawn_film(tmp_path / "film.mp4", num_frames=12, scale=1)
    story.write_text(f"fps: 12\n{story.read_text()}")
    result = run("measure", film, "--script", story, "--model", tiny_model)
    assert result.exit_code == 2
    assert "has 8 fps, but the storyboard and the settings make 12" in result.stderr


def drawn_film(path: Path, *, num_frames: int, scale: int) -> Path:
    """A film of 32 x 48 pixels, upscaled, of a gradient that moves."""
    row = np.linspace(0, 200, 32, dtype=np.uint8)[None, :, None]
    frames = [np.broadcast_to(np.roll(row, t, axis=1), (48, 32, 3)) for t in range(num_frames)]
    with FilmWriter(path, width=32, height=48, fps=8, output=OutputSettings(scale=scale)) as writer:
        writer.append(np.stack(frames))
        return writer.finish()


@pytest.mark.parametrize("command", ["plan", "render"])
def test_a_wrong_storyboard_ends_with_2_and_one_line_that_names_the_place(command: str, tmp_path: Path) -> None:
    story = tmp_path / "story.yaml"
    story.write_text("scenes:\n  - {promt: a cat, for: 1s}\n")
    result = run(command, story, *(["-o", tmp_path / "film.mp4"] if command == "render" else []))
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"longvid: error: {story}:2: ") and "did you mean 'prompt'?" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["--set", "sampler.steps=0"],
        ["--set", "sampler.stops=4"],
        ["--preset", "nope"],
        ["--model", "nope"],
        ["--model", "~nobody/model"],
        ["--model", "m" * 300],
        ["--model", "2024"],
        ["--lora", "~nobody/lora.safetensors"],
        ["-o", "film.avi"],
        ["-o", f"{'f' * 300}.mp4"],
    ],
)
def test_wrong_options_end_with_2_and_one_line(arguments: list[str], story: Path, tiny_model: Path) -> None:
    before = list(story.parent.iterdir())
    defaults = ["-o", story.parent / "film.mp4", "--model", tiny_model]
    result = run("render", story, *defaults, *arguments)
    assert result.exit_code == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("longvid: error: ")
    assert list(story.parent.iterdir()) == before


def test_a_model_may_have_any_name(story: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(story.parent)
    for name in ("2024", "null", "[1] mini", '"quoted"'):
        (story.parent / name).symlink_to(tiny_model)
        result = run("plan", story, "--model", name)
        assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("command", [["tune"], ["train", "cache"]])
def test_a_file_that_cannot_be_written_is_told_before_the_work(command: list[str], story: Path, tmp_path: Path) -> None:
    result = run(*command, story, "-o", tmp_path / "nowhere" / "found.json", "--model", "nope")
    assert result.exit_code == 2
    assert "there is no folder" in result.stderr


def test_wrong_usage_ends_with_2() -> None:
    assert run("render").exit_code == 2
    assert run("rendr").exit_code == 2
    assert run("plan", "story.yaml", "--what").exit_code == 2


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (RuntimeFailure("latents of chunk 3 are not finite"), 3, "error: latents of chunk 3 are not finite"),
        (MemoryError(), 3, "error: out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 3, "error: out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "film.mp4"), 3, "error: the disk is full: film.mp4"),
        (Interrupted("interrupted; what was finished is in x"), 130, "interrupted; what was finished is in x"),
        (Preempted("stopped, and saved after round 3"), 0, "stopped, and saved after round 3"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_each_kind_of_failure_has_its_exit_code(
    error: BaseException, code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, error)
    result = run("plan", "story.yaml")
    assert result.exit_code == code
    assert result.stderr.startswith(f"longvid: {words}") and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("error", [KeyError("a bug"), OSError(errno.EIO, "bad"), RuntimeError("a bug")])
def test_a_bug_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, error)
    assert run("plan", "story.yaml").exception is error


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(path: Path) -> None:
        raise error

    monkeypatch.setattr("longvid.script.load_script", fail)


def test_an_interruption_leaves_a_playable_film_and_says_where(tiny_model: Path, tmp_path: Path) -> None:
    story, film = tmp_path / "long.yaml", tmp_path / "film.mp4"
    story.write_text("scenes: [{prompt: a red circle, for: 2h}]")
    options = ["--model", tiny_model, "--set", "sampler.steps=1", "--set", "runtime.threads=1"]
    with subprocess.Popen(
        [*COMMAND, "render", story, "-o", film, *options],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        try:
            wait_for(tmp_path / "film.mp4.longvid" / "seg_00002.ts", process)
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=120)
        finally:
            process.kill()
    partial = tmp_path / "film.partial.mp4"
    assert process.returncode == 130, stderr
    assert stdout == "" and "Traceback" not in stderr and stderr.startswith("rendering ")
    assert stderr.splitlines()[-1] == f"longvid: interrupted; what was finished is in {partial}"
    assert frames_of(partial) >= 48
    assert not film.exists()


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.05)


def test_json_is_all_that_a_process_prints_on_stdout(story: Path, tiny_model: Path, tmp_path: Path) -> None:
    command = [*COMMAND, "plan", story, "--model", tiny_model, "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["frames"] == 29
    assert done.stderr == ""
