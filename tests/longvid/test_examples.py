"""Every example script runs."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import av
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
STORY = """\
size: [32, 48]
fps: 8
scenes:
  - {prompt: "a red circle moving left", for: 9f}
"""


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs an example as a program on the tiny model, and returns the film that it was told to write."""
    path, film = tmp_path / "small.yaml", tmp_path / "film.mp4"

    def run_example(name: str, *, writes: bool = True, story: str = STORY) -> Path:
        path.write_text(story)
        arguments = [str(path), str(tiny_model), *([str(film)] if writes else [])]
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return film

    return run_example


def frames_of(film: Path) -> int:
    with av.open(str(film)) as container:
        return container.streams.video[0].frames


def test_library_stream_prints_frames_as_they_come(run, capsys: pytest.CaptureFixture[str]) -> None:
    run("library_stream.py", writes=False)
    assert "frames    0 to    8: mean colour" in capsys.readouterr().out


def test_library_render_writes_a_film_and_tells_how_far_it_is(run, capsys: pytest.CaptureFixture[str]) -> None:
    assert frames_of(run("library_render.py")) == 9
    assert "chunk 1 of 1, 9 frames" in capsys.readouterr().out


def test_own_pipeline_renders_with_a_loaded_pipeline(run, capsys: pytest.CaptureFixture[str]) -> None:
    assert frames_of(run("own_pipeline.py")) == 9
    assert "9 frames of 32 x 48 in 1 chunks" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:longvid.accelerate")
def test_accelerate_pipeline_times_a_clip_both_ways(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["accelerate_pipeline.py", "9", str(tiny_model)])
    runpy.run_path(str(EXAMPLES / "accelerate_pipeline.py"), run_name="__main__")
    assert "9 frames: dense" in capsys.readouterr().out


def test_live_prompts_says_from_which_frame_a_prompt_is_followed(run, capsys: pytest.CaptureFixture[str]) -> None:
    run("live_prompts.py", writes=False, story=STORY.replace("9f", "400f"))
    said = capsys.readouterr().out
    assert ": a large green square" in said and said.startswith("from frame ") and said.endswith("400 frames\n")
