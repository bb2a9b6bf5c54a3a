"""What a render reports to machines: lines of JSON, and figures for Prometheus."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from rich.console import Console

from longvid.errors import InputError, Interrupted, LongvidError, Preempted, RuntimeFailure
from longvid.events import ChunkDone, Event, FilmDone, Notice, RoundDone, Started
from longvid.journal import Journals, Metrics, report, sayer
from longvid.writer import check_file

EVENTS: list[Event] = [
    Started(96, 3, 5, 64, 64, 16.0),
    Notice("line 3: the model does not know 'blorp'"),
    RoundDone(1, 5, 1, 1, 9),
    ChunkDone(1, 3, 32),
    FilmDone(Path("film.mp4"), 96, 2.0),
]
ENDS: list[tuple[LongvidError, str, int]] = [
    (RuntimeFailure("the disk is full"), "failed", 3),
    (Interrupted("interrupted"), "interrupted", 130),
    (Preempted("stopped, and saved"), "preempted", 0),
]


def reported(journals: Journals, error: BaseException | None = None) -> str:
    """What stderr shows of a render."""
    stderr = io.StringIO()

    def render() -> None:
        with report(journals, Console(file=stderr, width=200)) as on_event:
            for event in EVENTS[: 4 if error else 5]:
                on_event(event)
            if error:
                raise error

    if error is None:
        render()
    else:
        with pytest.raises(type(error)):
            render()
    return stderr.getvalue()


def test_json_is_all_that_stderr_has_a_line_an_event() -> None:
    lines = [json.loads(line) for line in reported(Journals(Path("film.mp4"), log="json")).splitlines()]
    assert [line["event"] for line in lines] == ["started", "notice", "round_done", "chunk_done", "film_done"]
    assert lines[0] | {"time": ""} == {
        "time": "",
        "event": "started",
        "num_frames": 96,
        "num_chunks": 3,
        "num_rounds": 5,
        "width": 64,
        "height": 64,
        "fps": 16.0,
        "num_films": 1,
    }
    assert lines[4]["path"] == "film.mp4" and all(datetime.fromisoformat(line["time"]).tzinfo for line in lines)


@pytest.mark.parametrize(("error", "state", "code"), ENDS)
def test_how_a_render_ended_is_in_every_journal(error: LongvidError, state: str, code: int, tmp_path: Path) -> None:
    film, metrics = tmp_path / "film.mp4", tmp_path / "film.prom"
    for log in ("json", "text"):
        reported(Journals(film, log, tmp_path / log, metrics), error)
    last = json.loads((tmp_path / "json").read_text().splitlines()[-1])
    assert (last["event"], last["state"], last["exit_code"], last["message"]) == ("ended", state, code, str(error))
    assert re.search(rf"^\S+ {state}: {error}$", (tmp_path / "text").read_text(), re.MULTILINE)
    assert f'longvid_state{{film="{film}",state="{state}"}} 1' in metrics.read_text()


def test_a_bug_counts_as_a_failure(tmp_path: Path) -> None:
    log = tmp_path / "log"
    reported(Journals(tmp_path / "film.mp4", "json", log), KeyError("nowhere"))
    last = json.loads(log.read_text().splitlines()[-1])
    assert (last["state"], last["message"]) == ("failed", "KeyError: 'nowhere'")


def test_a_log_file_is_appended_to_and_leaves_stderr_as_it_is(tmp_path: Path) -> None:
    log = tmp_path / "log"
    plain = reported(Journals(tmp_path / "film.mp4"))
    for _ in range(2):
        assert reported(Journals(tmp_path / "film.mp4", "json", log)) == plain
    assert plain.startswith("rendering 6.0 s of film")
    assert [json.loads(line)["event"] for line in log.read_text().splitlines()].count("film_done") == 2


def test_figures_are_in_the_format_of_prometheus() -> None:
    seconds = iter(range(100))
    metrics = Metrics(Path("nowhere"), 'a "b"\\c\n.mp4')
    metrics.tally.clock = lambda: float(next(seconds))
    for event in EVENTS[:4]:
        metrics.tally.add(event)
    text, label = metrics.text(), r'film="a \"b\"\\c\n.mp4"'
    figures = {}
    for line in text.splitlines():
        if line.startswith("#"):
            assert re.fullmatch(r"# (HELP|TYPE) longvid_[a-z_]+ .+", line)
            continue
        name, value = line.rsplit(" ", 1)
        assert label in name and "\n" not in name
        figures[name.replace(label, "")] = float(value)
    assert figures["longvid_frames{}"] == 96 and figures["longvid_frames_done{}"] == 32
    assert figures["longvid_chunks_done{}"] == 1 and figures["longvid_rounds{}"] == 5
    # The clock goes on by a second whenever it is read: 1 unit of 9 took one.
    assert figures["longvid_left_seconds{}"] == 6 and figures["longvid_frames_per_second{}"] == 16
    assert sum(value for name, value in figures.items() if name.startswith("longvid_state")) == 1


def test_figures_are_there_at_the_start_and_at_the_end_and_replaced_as_a_whole(tmp_path: Path) -> None:
    path, contents = tmp_path / "film.prom", []
    metrics = Metrics(path, "film.mp4")
    for event in EVENTS:
        metrics.show(event)
        contents.append(path.read_text())
        assert [file.name for file in tmp_path.iterdir()] == ["film.prom"]
    assert 'state="running"} 1' in contents[0] and 'state="done"} 1' in contents[-1]


def test_a_full_disk_costs_the_journal_and_not_the_render(tmp_path: Path) -> None:
    # /dev/full is a file on a disk that is full.
    said = reported(Journals(tmp_path / "film.mp4", "json", Path("/dev/full"), tmp_path / "film.prom"))
    assert said.count("the log cannot be written (No space left on device)") == 1
    assert "film.mp4: 96 frames" in said and 'state="done"} 1' in (tmp_path / "film.prom").read_text()


def test_lines_of_a_launcher_go_where_the_log_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    sayer(Journals(Path("film.mp4"), "json", log))("longvid: error: rank 1 was killed")
    sayer(Journals(Path("film.mp4"), "json"))("longvid: error: rank 2 was killed")
    plain, as_json = capsys.readouterr().err.splitlines()
    assert plain == "longvid: error: rank 1 was killed" == json.loads(log.read_text())["text"]
    assert json.loads(as_json)["text"] == "longvid: error: rank 2 was killed"


def test_files_that_cannot_be_written_are_refused_before_the_work(tmp_path: Path) -> None:
    check_file("--metrics", None)
    check_file("--metrics", tmp_path / "film.prom")
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "no/film.prom", "there is no folder")):
        with pytest.raises(InputError, match=f"--metrics .*{words}"):
            check_file("--metrics", path)


def test_a_read_only_disk_is_refused_before_the_work(tmp_path: Path) -> None:
    folder, story = tmp_path / "read_only", tmp_path / "story.yaml"
    folder.mkdir()
    story.write_text("scenes: [{prompt: a red circle, for: 1s}]")
    mounted = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o ro none "$0" && exec "$@"', str(folder)]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*mounted, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("mount namespaces are missing")
    render = [sys.executable, "-P", "-m", "longvid", "render", str(story), "-o"]
    film, log = folder / "film.mp4", folder / "log"
    for arguments, words in (
        ([film], f"{film}: cannot write in the folder {folder}"),
        ([tmp_path / "film.mp4", "--log-file", log], f"--log-file {log}: cannot be written"),
    ):
        command = [*mounted, *render, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (2, f"longvid: error: {words}\n")
