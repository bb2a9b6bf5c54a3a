"""Prompts of others become storyboards: the same scenes come back, and what is wrong is told with its line."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longvid.errors import InputError
from longvid.importers import Defaults, import_prompts
from longvid.script import Duration, Scene, Script, Transition, load_script, parse_script, storyboard_text

PRINTABLE = st.characters(codec="utf-8", exclude_categories=["Cc", "Cn", "Co"])
TEXT = st.text(PRINTABLE, min_size=1, max_size=20).map(lambda text: " ".join(text.split()))
PROMPTS = TEXT.filter(lambda text: text and "--neg" not in text)
LENGTHS = st.integers(1, 500)


def made(folder: Path, content: str, name: str = "prompts.json", **defaults) -> Script:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return import_prompts(path, Defaults(**defaults))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompts")


durations = st.integers(1, 10**6).map(lambda n: Duration(n, "f")) | st.floats(1e-6, 8e4).map(
    lambda seconds: Duration(round(seconds, 6), "s")
)


@st.composite
def scripts(draw):
    scenes = []
    for i in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["cut", "blend", "share"])) if i else "cut"
        length = draw(durations)
        over = length if kind != "cut" else None
        seed, negative = draw(st.none() | st.integers(0, 2**63 - 1)), draw(st.just("") | PROMPTS)
        scenes.append(Scene(draw(PROMPTS), length, Transition(kind, over), seed, negative))
    size = draw(st.none() | st.tuples(st.integers(16, 8192), st.integers(16, 8192)))
    fps, style = draw(st.none() | st.floats(1, 240)), draw(st.just("") | PROMPTS)
    styled = tuple(replace(scene, prompt=f"{scene.prompt} {style}".strip()) for scene in scenes)
    return Script(styled, draw(st.integers(0, 2**63 - 1)), draw(st.none() | PROMPTS), fps, size, style=style)


@given(scripts())
def test_a_storyboard_that_is_written_reads_as_what_it_was(script):
    found = parse_script(storyboard_text(script), script.path)
    scenes = tuple(replace(scene, line=0) for scene in found.scenes)
    assert replace(found, scenes=scenes, size_line=0) == script
    assert found.style == script.style


@given(st.lists(st.tuples(PROMPTS, LENGTHS), min_size=1, max_size=6), st.sampled_from(["blend", "cut", "share"]))
def test_frame_keyed_maps_and_json_lines_give_their_scenes_back(folder, scenes, transition):
    prompts, lengths = zip(*scenes, strict=True)
    starts = [0, *accumulate(lengths)]
    keyed = dict(zip(map(str, starts), prompts, strict=False))
    lines = {"prompts": prompts, "switch_frames": starts[1:-1]}
    seconds = {"prompts": prompts, "durations": [length / 16 for length in lengths], "fps": 16}
    last = Duration(lengths[-1], "f")
    cases = [
        made(folder, json.dumps(keyed), length=last, transition=transition),
        made(folder, json.dumps({"prompts": keyed, "max_frames": starts[-1], "fps": 16}), transition=transition),
        made(folder, json.dumps(lines), "one.jsonl", length=last, transition=transition),
        made(folder, "\n" + json.dumps(lines) + "\n{}\n", "two.jsonl", length=last, line=2, transition=transition),
        made(folder, json.dumps(seconds), transition=transition),
        made(folder, json.dumps(lines | {"max_frames": starts[-1]}), transition=transition),
    ]
    for script in cases:
        assert [scene.prompt for scene in script.scenes] == list(prompts)
        assert [scene.duration.frames(16) for scene in script.scenes] == list(lengths)
        assert {scene.transition.kind for scene in script.scenes[1:]} <= {transition}


def test_lists_negatives_and_yaml_are_read(folder):
    script = made(folder, "- a circle --neg blurred, dark\n- a ring\n", "list.yaml", length=Duration(2, "s"))
    said = [(scene.prompt, scene.negative) for scene in script.scenes]
    assert said == [("a circle", "blurred, dark"), ("a ring", "")]
    assert script.scenes[1].transition == Transition("blend", Duration(1, "s"))
    script = made(folder, "48: a ring\n0: a circle\n", "keyed.yaml", length=Duration(5, "f"), fps=24.0)
    assert [scene.duration for scene in script.scenes] == [Duration(48, "f"), Duration(5, "f")]
    assert script.scenes[1].transition.over == Duration(5, "f")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.json", '{"0": "a",\n "x": "b"}', "a.json:2: 'x' is no frame"),
        ("a.json", '{"8": "a"}', "a.json:1: the first prompt is of frame 8, and must be of 0"),
        ("a.json", '{"0": "a",\n "12": "b"}', "a.json:2: the file does not say how long this prompt holds: give --for"),
        ("a.json", '{"prompts": {"0": "a",\n "12": "b"}, "max_frames": 12}', "a.json:2: frame 12 has a prompt, and"),
        ("a.json", '{"0": "a",\n "12": 7}', "a.json:2: a prompt must be text"),
        ("a.json", '{"prompts": ["a"],\n "colour": 1}', "a.json:2: unknown key 'colour'"),
        ("a.json", '{"prompts": ["a", "b"],\n "switch_frames": [3, 4]}', "a.json:2: switch_frames must be a list of 1"),
        ("a.json", '{"prompts": ["a", "b", "c"],\n "switch_frames": [4, 4]}', "a.json:2: frames must go up"),
        ("a.json", '{"prompts": ["a"],\n "durations": ["soon"]}', "a.json:2: must be a duration like 12s"),
        ("a.json", '["a",\n "--neg b"]', "a.json:2: a prompt must say something"),
        ("a.json", "7", "a.json:1: must be a map from frames to prompts"),
        ("a.json", "[]", "a.json:1: holds no prompt"),
        ("a.json", '{"prompts": ["a"], "fps": 0}', "a.json:1: fps must be a number from 1 to 240"),
        ("a.jsonl", '{"prompts": ["a"]}\n{"prompts": ["b"]}', "a.jsonl: holds 2 films, a line each: choose one by"),
        ("a.jsonl", '\n{"prompts": [7]}', "a.jsonl:2: a prompt must be text"),
        ("missing/a.json", None, "cannot be read"),
    ],
)
def test_what_is_wrong_is_told_with_file_and_line(folder, name, content, told):
    length = None if "--for" in told else Duration(1, "s")
    with pytest.raises(InputError) as caught:
        if content is None:
            import_prompts(folder / name, Defaults(length))
        else:
            made(folder, content, name, length=length)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_line_writes_a_storyboard_that_renders(tmp_path):
    from typer.testing import CliRunner

    from longvid.cli import app

    path, story = tmp_path / "prompts.jsonl", tmp_path / "story.yaml"
    path.write_text('{"prompts": ["a red circle", "a blue ring"], "durations": [2, 3]}\n')
    done = CliRunner().invoke(app, ["import", str(path), "-o", str(story), "--transition", "share", "--fps", "16"])
    assert done.exit_code == 0, done.output
    assert [(scene.prompt, scene.transition.kind) for scene in load_script(story).scenes] == [
        ("a red circle", "cut"),
        ("a blue ring", "share"),
    ]
    refused = CliRunner().invoke(app, ["import", str(path), "-o", str(tmp_path / "none" / "story.yaml")])
    assert refused.exit_code == 2
