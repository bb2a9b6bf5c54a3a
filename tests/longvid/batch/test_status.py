"""How a batch is shown: what matters first, each news once, and nothing that a prompt could smuggle into a page."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from longvid.batch.report import page
from longvid.batch.status import headline, picture, show_batch
from longvid.batch.table import Row, State


def row_of(name: str, state: State, **values: Any) -> Row:
    empty: dict[str, Any] = dict.fromkeys(("cause", "reason", "owner", "began", "ended", "measures"))
    counts = {"attempt": 1, "lost": 0, "progress": 0.0}
    rest: dict[str, Any] = {"place": "jobs.txt:1", "story": {}, "settings": "", "result": {}}
    return Row(**{**empty, **counts, **rest, "name": name, "state": state, **values})


def lines_of(*looks: list[Row]) -> list[str]:
    text = io.StringIO()
    with show_batch(Console(file=text, width=200)) as show:
        for rows in looks:
            show(rows)
    return text.getvalue().splitlines()


def test_lines_tell_each_news_once() -> None:
    killed = {"lost": 1, "reason": "was killed"}
    lines = lines_of(
        [row_of("a", "running"), row_of("b", "waiting")],
        [row_of("a", "waiting", **killed), row_of("b", "running")],
        [row_of("a", "running", attempt=2, **killed), row_of("b", "done", result={"seconds": 2.0})],
        [row_of("a", "running", attempt=2, progress=0.5, **killed), row_of("b", "done", result={"seconds": 2.0})],
        [row_of("a", "failed", attempt=2, lost=2, reason="was killed"), row_of("b", "done", result={"seconds": 2.0})],
    )
    assert lines == ["a: waiting again, after: was killed", "b: done in 2.0 s", "a: was killed (worker 2)"]


def test_the_headline_says_how_long_it_will_take() -> None:
    done = [row_of(f"done{i}", "done", result={"seconds": 10.0}) for i in range(3)]
    rows = [*done, row_of("now", "running", progress=0.5), *(row_of(f"next{i}", "waiting") for i in range(5))]
    assert headline(rows) == "3 of 9 films done, 1 running, 5 waiting; about 0:55 left"


def test_the_table_shows_what_runs_and_fails_before_the_rest() -> None:
    rows = [row_of(f"[b]done{i}", "done") for i in range(50)]
    rows += [row_of("wrong", "failed", reason="is wrong"), row_of("now", "running", progress=0.25)]
    text = io.StringIO()
    Console(file=text, width=100).print(picture(rows, height=4))
    lines = [line.split() for line in text.getvalue().splitlines()]
    assert lines[1] == ["now", "running", "25%"] and lines[2] == ["wrong", "failed", "is", "wrong"]
    assert lines[3][0].startswith("[b]done") and lines[5] == ["and", "48", "more"]


def test_a_page_quotes_what_users_wrote(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    rows = [
        row_of(f"a{evil}", "done", story={"scenes": [{"prompt": evil}]}, result={"notices": [evil]}),
        row_of(f"b{evil}", "failed", cause="input", reason=evil),
        row_of(f"c{evil}", "waiting", lost=1, reason=evil),
    ]
    text = page(rows, tmp_path / "films", tmp_path / "pages" / "report.html")
    assert "<script" not in text and text.count("&lt;script") >= 7
    assert 'href="../films/a%3Cscript' in text
