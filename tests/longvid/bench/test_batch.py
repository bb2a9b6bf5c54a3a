"""`bench batch` makes the same films in all its runs, whoever is killed."""

from __future__ import annotations

import pytest

from longvid.bench.batch import BatchBench, as_text, bench_batch


@pytest.fixture(scope="module")
def result() -> dict[str, object]:
    return bench_batch(BatchBench(jobs=4, workers=1, seconds=0.3, steps=1, kill_s=1.0), say=lambda line: None)


def test_no_film_is_lost_or_made_twice(result: dict[str, object]) -> None:
    assert (result["jobs"], result["lost"], result["duplicated"]) == (4, 0, 0)
    assert result["hashes_equal"]


def test_the_words_say_the_figures(result: dict[str, object]) -> None:
    assert "4 films on 1 workers" in as_text(result) and "bytes are equal" in as_text(result)
    assert float(str(result["efficiency"])) > 0
