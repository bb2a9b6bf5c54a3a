"""Job files: good lines become films, wrong ones cost no other, and each is told with its place."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longvid.batch.jobs import Defaults, Job, Refused, parse_prompts, read_jobs
from longvid.errors import InputError

prompts = st.text(st.characters(categories=["L", "N", "P", "Zs", "S"]), min_size=1, max_size=40).filter(
    lambda text: text.strip() and not text.strip().startswith("#")
)


def parse(text: str | bytes, name: str = "jobs.jsonl") -> list[Job | Refused]:
    content = text.encode() if isinstance(text, str) else text
    return list(parse_prompts(content, Path(name), Defaults()))


def good(items: list[Job | Refused]) -> list[Job]:
    return [item for item in items if isinstance(item, Job)]


def bad(items: list[Job | Refused]) -> list[Refused]:
    return [item for item in items if isinstance(item, Refused)]


@given(st.lists(prompts, min_size=1, max_size=8))
def test_the_three_kinds_of_prompt_files_say_the_same(texts: list[str]) -> None:
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([["prompt"], *([text.strip()] for text in texts)])
    kinds = {
        "a.txt": "\n".join(texts),
        "a.jsonl": "\n".join(json.dumps({"prompt": text}) for text in texts),
        "a.csv": table.getvalue(),
    }
    wanted = [" ".join(text.split()) for text in texts]
    for name, content in kinds.items():
        jobs = good(parse(content, name))
        assert [job.script.scenes[0].prompt for job in jobs] == wanted
        assert len({job.name for job in jobs}) == len(texts)


@given(st.binary(max_size=300), st.sampled_from(["a.txt", "a.jsonl", "a.csv"]))
def test_any_bytes_become_jobs_and_refusals_with_their_lines(content: bytes, name: str) -> None:
    try:
        items = parse(content, name)
    except InputError as error:
        assert name == "a.csv" and str(error).startswith("a.csv:")
        return
    assert all(item.place.startswith(f"{name}:") for item in items)
    assert all(item.reason.startswith(item.place) for item in bad(items))


@given(st.data())
def test_bad_lines_cost_no_good_ones(data: st.DataObject) -> None:
    wrong = ["{", "[]", '{"prompt": 3}', '{"prompt": "a", "seed": -1}', '{"promt": "a"}', '{"prompt": "a", "for": "x"}']
    lines = data.draw(st.lists(st.sampled_from(['{"prompt": "a cat"}', *wrong]), max_size=12))
    items = parse("\n".join(lines))
    assert [item.place for item in bad(items)] == [f"jobs.jsonl:{i}" for i, x in enumerate(lines, 1) if x in wrong]
    assert [job.place for job in good(items)] == [f"jobs.jsonl:{i}" for i, x in enumerate(lines, 1) if x not in wrong]


def test_a_line_says_all_that_a_film_needs() -> None:
    line = {"prompt": "a cat", "seconds": 2.5, "seed": 7, "negative": "dogs", "name": "cat", "sampler.steps": 3}
    (job,) = good(parse(json.dumps(line)))
    (scene,) = job.script.scenes
    assert (job.name, job.script.seed, scene.negative, scene.duration.value) == ("cat", 7, "dogs", 2.5)
    assert job.settings.sampler.steps == 3
    (same,) = good(parse("name,prompt,seconds,seed,negative,sampler.steps\ncat,a cat,2.5,7,dogs,3", "jobs.csv"))
    assert same.digest == job.digest and same.name == job.name


def test_a_line_may_hold_a_whole_storyboard() -> None:
    scenes = [{"prompt": "a", "for": "1s"}, {"prompt": "b", "for": "2s", "transition": "blend"}]
    (job,) = good(parse(json.dumps({"scenes": scenes, "style": "in red"})))
    assert [scene.prompt for scene in job.script.scenes] == ["a in red", "b in red"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a", "prompt": "b"}', "'prompt' stands twice"),
        ('{"prompt": "a", "seconds": 0}', "seconds: must be a number above zero, not 0"),
        ('{"prompt": "a", "seconds": NaN}', "NaN is no number"),
        ('{"prompt": "a", "seconds": 1, "for": "1s"}', "`for` and `seconds` say the same: give one of them"),
        ('{"seed": 1}', "needs either `prompt` or `scenes`"),
        ('{"prompt": "a", "name": "../a"}', "the name '../a' must begin with a letter or digit"),
        ('{"prompt": "a", "name": "x/a"}', "must hold no slashes"),
        ('{"prompt": "a\\u001b[2J"}', "control character"),
        ('{"prompt": "a", "sampler.stepz": 2}', "unknown key 'stepz': did you mean 'steps'?"),
        ("[" * 100_000, "is nested too deeply"),
    ],
)
def test_a_wrong_line_is_told_with_its_place_and_reason(line: str, reason: str) -> None:
    (refused,) = bad(parse(f"\n{line}\n"))
    assert refused.reason.startswith("jobs.jsonl:2: ") and reason in refused.reason


def test_a_line_that_is_not_utf8_is_told_and_the_others_are_read() -> None:
    items = parse(b"a cat\n\xff\xfe\na dog\n", "jobs.txt")
    assert len(good(items)) == 2 and "is not UTF-8" in bad(items)[0].reason


def test_a_csv_without_prompts_is_refused_as_a_whole() -> None:
    with pytest.raises(InputError, match=r"a\.csv:1: the first line must name the columns"):
        parse("name,seed\na,1", "a.csv")


def test_names_stand_for_one_film(tmp_path: Path) -> None:
    for folder, prompt in (("a", "a cat"), ("b", "a cat"), ("c", "a dog")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "pet.yaml").write_text(f"scenes: [{{prompt: {prompt}, for: 1s}}]")
    items = read_jobs([tmp_path / "a", tmp_path / "b", tmp_path / "c" / "pet.yaml"], Defaults())
    assert [job.name for job in good(items)] == ["pet"], "equal films of one name are one job"
    (refused,) = bad(items)
    assert "is another film of the name 'pet'" in refused.reason and refused.place.endswith("c/pet.yaml")


def test_a_bad_storyboard_in_a_folder_costs_itself_alone(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text("scenes: [{prompt: a cat, for: 1s}]")
    (tmp_path / "bad.yaml").write_text("scenes:\n  - {promt: a cat, for: 1s}")
    items = read_jobs([tmp_path], Defaults())
    assert [job.name for job in good(items)] == ["good"]
    assert "bad.yaml:2: scenes[0]: unknown key 'promt'" in bad(items)[0].reason


@pytest.mark.parametrize(
    ("name", "message"), [("none.txt", "is not there"), ("a.md", "jobs come from"), (".", "holds no")]
)
def test_a_path_that_holds_no_jobs_is_refused(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.md").touch()
    with pytest.raises(InputError, match=message):
        read_jobs([tmp_path / name], Defaults())


def test_films_of_different_images_are_different_films(tmp_path: Path) -> None:
    for name, content in (("a.png", b"a"), ("b.png", b"b"), ("c.png", b"a")):
        (tmp_path / name).write_bytes(content)
    scene = {"prompt": "a cat", "for": "1s"}
    scenes = [scene, *({**scene, "image": str(tmp_path / name)} for name in ("a.png", "b.png", "c.png"))]
    none, a, b, c = good(parse("\n".join(json.dumps({"scenes": [one]}) for one in scenes)))
    assert len({none.digest, a.digest, b.digest}) == 3 and a.digest == c.digest
