"""Storyboards: what is read, and that anything else gets one message with file and line."""

import json
import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from longvid.document import MAX_BYTES
from longvid.errors import InputError
from longvid.script import Duration, Scene, Script, Transition, load_script, parse_script

STORY = """\
# a comment
title: Shapes
seed: 7
style: "over a blue background"
negative: blurred
fps: 24
size: [128, 64]
scenes:
  - {prompt: "a large red circle moving left", for: 12s}
  - prompt: >
      a small yellow diamond
      moving up
    for: 1m30s
    seed: 9
    transition: {kind: blend, over: 36f}
  - prompt: a small white ring
    for: 480f
    transition: blend
    negative: ""
  - prompt: no
    for: 0.5s
    transition: cut
"""


def one_scene(**keys):
    """A storyboard of one scene, as JSON, which is YAML on one line."""
    return json.dumps({"scenes": [{"prompt": "a", "for": "1s"} | keys]})


def message(text):
    with pytest.raises(InputError) as caught:
        parse_script(text, "story.yaml")
    return str(caught.value)


def test_every_part_of_a_storyboard_is_read():
    blend = Transition("blend", Duration(36, "f"))
    second = Transition("blend", Duration(1, "s"))
    place = "over a blue background"
    assert parse_script(STORY, "story.yaml") == Script(
        scenes=(
            Scene(f"a large red circle moving left {place}", Duration(12, "s"), negative="blurred", line=9),
            Scene(f"a small yellow diamond moving up {place}", Duration(90, "s"), blend, 9, "blurred", 10),
            Scene(f"a small white ring {place}", Duration(480, "f"), second, line=16),
            Scene(f"no {place}", Duration(0.5, "s"), negative="blurred", line=20),
        ),
        seed=7,
        title="Shapes",
        fps=24.0,
        size=(128, 64),
        path="story.yaml",
        size_line=7,
    )


def test_what_is_left_out_has_its_default():
    assert parse_script("scenes: [{prompt: a, for: 1s}]", "x") == Script(
        (Scene("a", Duration(1, "s"), line=1),), path="x"
    )


def test_a_file_reads_as_its_text_and_names_itself(tmp_path):
    path = tmp_path / "story.yaml"
    path.write_text(STORY)
    assert load_script(path) == parse_script(STORY, str(path))
    path.write_text("scene: []")
    with pytest.raises(InputError, match=re.escape(f"{path}:1: unknown key 'scene': did you mean 'scenes'?")):
        load_script(path)


@pytest.mark.parametrize("name", ["missing.yaml", "", "a\0b"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    with pytest.raises(InputError, match="cannot be read"):
        load_script(tmp_path / name)


def test_the_examples_are_storyboards():
    from pathlib import Path

    examples = Path(__file__).parent.parent.parent / "examples"
    minute = load_script(examples / "minute.yaml")
    assert sum(scene.duration.frames(16) for scene in minute.scenes) == 62 * 16
    assert len({scene.prompt for scene in minute.scenes}) >= 5
    assert {scene.transition.kind for scene in minute.scenes} == {"cut", "blend"}
    assert sum(scene.duration.frames(16) for scene in load_script(examples / "two_scenes.yaml").scenes) == 6 * 16


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("12s", Duration(12, "s")),
        ("0.5s", Duration(0.5, "s")),
        ("1m30s", Duration(90, "s")),
        ("2m", Duration(120, "s")),
        ("1h2m3.5s", Duration(3723.5, "s")),
        ("24h", Duration(86400, "s")),
        ("480f", Duration(480, "f")),
    ],
)
def test_durations_are_seconds_or_frames(text, duration):
    assert parse_script(one_scene(**{"for": text}), "x").scenes[0].duration == duration


@pytest.mark.parametrize(
    "value",
    [
        "-1s",
        "0s",
        "0f",
        "0m0s",
        "nan",
        "nans",
        "infs",
        "s",
        "",
        "12",
        12,
        1.5,
        None,
        True,
        [],
        "12 s",
        "1s1m",
        "1.5f",
        "\u0661s",
        "24h1s",
        "99999999999f",
        "9" * 5000 + "s",
        "1e3s",
        "12S",
    ],
)
def test_other_durations_are_refused_with_their_line(value):
    assert re.match(r"story\.yaml:1: for: must be ", message(one_scene(**{"for": value})))


@given(st.floats(1e-6, 86400), st.floats(1, 240))
def test_a_duration_is_the_nearest_number_of_frames_and_at_least_one(seconds, fps):
    frames = Duration(seconds, "s").frames(fps)
    assert frames >= 1
    assert frames == 1 or abs(frames - seconds * fps) <= 0.5 + 1e-6
    assert Duration(frames, "f").frames(fps) == frames


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ":1: the storyboard is empty"),
        ("# only a comment", ":1: the storyboard is empty"),
        ("7", ":1: must be a mapping of keys to values, not 7"),
        ("scenes: []", ":1: scenes: must hold at least 1 items"),
        ("scenes:", ":1: scenes: must be a valid list, not nothing"),
        ("title: x", ":1: 'scenes' is missing"),
        ("scenes:\n  - prompt: a\n    for: 1s\n  - for: 1s", ":4: 'prompt' is missing"),
        ("scenes:\n  -", ":2: scenes[0]: must be a mapping"),
        ("scenes:\n  - {promt: a, for: 1s}", ":2: scenes[0]: unknown key 'promt': did you mean 'prompt'?"),
        (
            "scenes:\n  - prompt: a\n    for: 1s\n    tansition: cut",
            ":4: scenes[0]: unknown key 'tansition': did you mean",
        ),
        ("stlye: x", ":1: unknown key 'stlye': did you mean 'style'?"),
        (one_scene(prompt="  \n "), ":1: prompt: must hold at least 1 characters"),
        (one_scene(prompt="a" * 2001), ":1: prompt: must hold at most 2000 characters, not 2001"),
        (one_scene(prompt=7), ":1: prompt: must be text (put it in quotes), not 7"),
        (one_scene(prompt=["a"]), ":1: prompt: must be text (put it in quotes), not a list"),
        (one_scene(seed=-1), ":1: seed: must be greater than or equal to 0"),
        (one_scene(seed=2**63), ":1: seed: must be less than or equal to"),
        (one_scene(seed=10**40), ":1: seed: must be a valid integer"),
        (one_scene(seed=True), ":1: seed: must be a valid integer"),
        (one_scene(transition="fade"), ":1: transition: unknown kind 'fade'"),
        (one_scene(transition="share"), ":1: the first scene has none before it to share from"),
        (one_scene(transition={"kind": "cut", "over": "1s"}), ":1: transition.over: a cut takes no time"),
        (one_scene(transition={"over": "1s"}), ":1: 'transition.kind' is missing"),
        (one_scene(transition="blend"), ":1: the first scene has none before it to blend from"),
        ("fps: 0.5\nscenes: [{prompt: a, for: 1s}]", ":1: fps: must be greater than or equal to 1"),
        ("fps: .inf\nscenes: [{prompt: a, for: 1s}]", ":1: fps: must be a finite number"),
        ("size: [64]\nscenes: [{prompt: a, for: 1s}]", ":1: size: must hold at least 2 items, not 1"),
        ("size: 64x64\nscenes: [{prompt: a, for: 1s}]", ":1: size: must be a valid list, not '64x64'"),
        ("title: 2001\nscenes: [{prompt: a, for: 1s}]", ":1: title: must be text (put it in quotes), not 2001"),
        ("seed: 1\nseed: 2", ":2: 'seed' stands twice, first at line 1"),
        ("scenes:\n\t- prompt: a", ":2: is not valid YAML: indent with spaces, not tabs"),
        ("scenes: [", ":1: is not valid YAML"),
        ("seed: 1\n---\nseed: 1", ":2: a second document starts here"),
        ("? [a]\n: b", ":1: a key must be a word"),
        ("title: !!python/object/apply:os.system [ls]", ":1: tags are not supported"),
        ("!x scenes: 1", ":1: tags are not supported"),
        ("style: &a x\ntitle: *a", ":1: anchors and aliases are not supported"),
        ("title: x\nstyle: *a", ":2: anchors and aliases are not supported"),
        ('title: "\\0"', ":1: control character '\\x00'"),
        ("seed: 1\ntitle: \x07", ":2: control character '\\x07'"),
        (b"\x89PNG\r\n\x1a\n", ": is not UTF-8 text"),
        ("title: \ud800", ": is not UTF-8 text"),
        ("[" * 100_000, ":1: nested more than 16 levels deep"),
        ("{a: " * 100_000, ":1: nested more than 16 levels deep"),
        ("- " * 100_000, ":1: nested more than 16 levels deep"),
        ("# " + "x" * MAX_BYTES, ": is larger than 1 MiB"),
    ],
)
def test_a_wrong_storyboard_gets_one_message_with_file_and_line(text, expected):
    told = message(text)
    assert told.startswith("story.yaml:")
    assert expected in told
    assert "\n" not in told
    assert len(told) < 300


def test_a_bomb_of_aliases_costs_nothing():
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))]
    started = time.process_time()
    assert "anchors and aliases" in message("\n".join(lines))
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    ("over", "whole", "fps"),
    [("2s", "1s", None), ("11f", "10f", None), ("1s", "10f", 24), ("25f", "1s", 24)],
)
@pytest.mark.parametrize("kind", ["blend", "share"])
def test_a_transition_longer_than_its_scene_is_refused(kind, over, whole, fps):
    first = {"prompt": "a", "for": "9s"}
    second = {"prompt": "b", "for": whole, "transition": {"kind": kind, "over": over}}
    told = message(json.dumps({"scenes": [first, second]} | ({"fps": fps} if fps else {})))
    assert re.match(rf"story\.yaml:1: the {kind} over \w+ is longer than its scene of \w+", told)


def test_a_script_made_in_python_is_checked_too():
    with pytest.raises(InputError, match="at least one scene"):
        Script(())
    with pytest.raises(InputError, match=r"^storyboard: the first scene"):
        Script((Scene("a", Duration(1, "s"), Transition("blend")),))


# ----------------------------------------------------------------------------------------------------------------- fuzz


def check(content):
    """Whatever the content is: a valid script, or one InputError."""
    try:
        script = parse_script(content, "story.yaml")
    except InputError as error:
        assert re.match(r"story\.yaml(:\d+)?: .", str(error))
        assert "\n" not in str(error)
        str(error).encode()
    else:
        assert script.scenes
        assert all(scene.prompt and scene.duration.frames(24) >= 1 for scene in script.scenes)


@given(st.text() | st.text("[]{}:-,?*&!|>'\"%@` \n\tascenprmtfo120\x85\u2028\ufeff"))
def test_any_text_gives_a_script_or_a_message(text):
    check(text)


@given(st.binary())
def test_any_bytes_give_a_script_or_a_message(data):
    check(data)


@given(st.data())
def test_a_mutated_storyboard_gives_a_script_or_a_message(data):
    text = STORY.encode()
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 20)))
        copied = st.integers(0, len(text)).map(lambda at, text=text: text[at : at + 30])
        text = text[:start] + data.draw(st.binary(max_size=8) | copied) + text[end:]
    check(text)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["1s", "cut", "blend"])
KEYS = st.text() | st.sampled_from(re.findall(r"\w+", "style fps size scenes prompt for transition kind over negative"))
TREES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner), max_leaves=12)
SCENES = st.fixed_dictionaries(
    {"prompt": SCALARS, "for": SCALARS}, optional={"transition": TREES, "seed": TREES, "negative": TREES}
)


@given(TREES | st.fixed_dictionaries({"scenes": st.lists(SCENES | TREES)}, optional={"fps": TREES, "size": TREES}))
@example({"scenes": [{"prompt": "a", "for": "1s", "transition": {}}]})
def test_any_tree_of_values_gives_a_script_or_a_message(tree):
    check(json.dumps(tree))
