"""A fingerprint says what a film's pixels depend on, no more and no less, and what changed in the user's words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longvid.fingerprint import WHOLE_BYTES, Machine, describe_model, differences, fingerprint
from longvid.geometry import LatentGrid
from longvid.parallel.topology import Topology
from longvid.plan import ModelFacts, make_plan
from longvid.script import parse_script
from longvid.settings import load_settings

FACTS = ModelFacts("tiny", "wan", LatentGrid(), 16, 4, 16.0, 64, 64, True, 64)
STORY = """\
title: a film
seed: 3
scenes:
  - {prompt: a red circle, for: 21f}
  - {prompt: a blue square, for: 2s, transition: {kind: blend, over: 1s}}
  - {prompt: a cat, for: 1s, seed: 5}
"""
MODEL = {"transformer/config.json": {"bytes": 3, "digest": "00"}}
MACHINE = Machine("cpu", 1, Topology())


def fingerprint_of(
    story: str = STORY,
    overrides: tuple[str, ...] = (),
    *,
    facts: ModelFacts = FACTS,
    model: dict[str, Any] = MODEL,
    machine: Machine = MACHINE,
) -> dict[str, Any]:
    script, settings = parse_script(story, "story.yaml"), load_settings(None, overrides)
    return fingerprint(script, make_plan(script, settings, facts), settings, facts, model=model, machine=machine)


def test_it_is_plain_data_that_json_brings_back_unchanged() -> None:
    ours = fingerprint_of()
    assert differences(json.loads(json.dumps(ours)), ours) == []
    assert json.loads(json.dumps(ours)) == ours


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("a red circle", "a red disc", "scene 1, prompt: 'a red circle' then, 'a red disc' now"),
        ("21f", "22f", "scene 1, frames: 21 then, 22 now"),
        ("seed: 5", "seed: 6", "scene 3, seed: 5 then, 6 now"),
        ("over: 1s", "over: 0.5s", "scene 2, blend frames: 16 then, 8 now"),
        ("title: a film", "fps: 8", "fps: 16.0 then, 8.0 now"),
        ("title: a film", "size: [32, 64]", "width: 64 then, 32 now"),
        ("title: a film", "negative: blurred", "scene 3, negative: '' then, 'blurred' now"),
        ("  - {prompt: a cat, for: 1s, seed: 5}\n", "", "scenes: 3 then, 2 now"),
        ("seed: 3\n", "seed: 4\n", "scene 2, seed: 3 then, 4 now"),
    ],
)
def test_what_the_storyboard_means_counts(old: str, new: str, message: str) -> None:
    assert old in STORY
    assert message in differences(fingerprint_of(), fingerprint_of(STORY.replace(old, new)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("title: a film", "# a comment"),
        ("for: 2s", "for: 32f"),
        ("21f}", "21f, seed: 3}"),
        ("title: a film", "fps: 16"),
        ("a red circle,", '"a  red circle",'),
    ],
)
def test_other_words_for_the_same_film_do_not_count(old: str, new: str) -> None:
    assert old in STORY
    assert fingerprint_of(STORY.replace(old, new)) == fingerprint_of()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampler.steps=10", "sampler.steps: 8 then, 10 now"),
        ("sampler.shift=3.0", "sampler.shift: nothing then, 3.0 now"),
        ("queue.left=cached", "queue.left: 'recompute' then, 'cached' now"),
        ("queue.gap=2", "queue.gap: 1 then, 2 now"),
        ("output.crf=20", "output.crf: 18 then, 20 now"),
        ("output.segment_s=1.0", "output.segment_s: 2.0 then, 1.0 now"),
        ("runtime.dtype=bfloat16", "runtime.dtype: 'float32' then, 'bfloat16' now"),
        ("runtime.linear=torch", "runtime.linear: 'auto' then, 'torch' now"),
        ("sequence.backend=deepspeed", "sequence.backend: 'longvid' then, 'deepspeed' now"),
        ("memory.quantize=int8", "memory.quantize: 'none' then, 'int8' now"),
        ("memory.vae_rows=2", "memory.vae_rows: 0 then, 2 now"),
    ],
)
def test_settings_that_change_pixels_count(override: str, message: str) -> None:
    assert differences(fingerprint_of(), fingerprint_of(overrides=(override,))) == [message]


@pytest.mark.parametrize(
    "override",
    [
        "model.path=/elsewhere",
        "mesh.stage=3",
        "mesh.guidance=2",
        "mesh.buffers=5",
        "output.keep_state=true",
        "memory.offload=disk",
        "memory.text_encoder=free",
        "memory.prompt_cache=/elsewhere",
        "runtime.threads=7",
        "runtime.timeout_s=5.0",
    ],
)
def test_settings_that_do_not_change_pixels_do_not_count(override: str) -> None:
    assert fingerprint_of(overrides=(override,)) == fingerprint_of()


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (replace(MACHINE, threads=2), "runtime.threads: 1 then, 2 now"),
        (replace(MACHINE, device="cuda"), "runtime.device: 'cpu' then, 'cuda' now"),
        (replace(MACHINE, topology=Topology(seq=2)), "mesh.seq: 1 then, 2 now"),
        (replace(MACHINE, topology=Topology(stage=4, guidance=2)), None),
    ],
)
def test_what_is_really_used_counts(machine: Machine, message: str | None) -> None:
    assert differences(fingerprint_of(), fingerprint_of(machine=machine)) == ([message] if message else [])


def test_versions_and_the_model_count() -> None:
    old, new = fingerprint_of(), fingerprint_of(facts=replace(FACTS, num_layers=5, name="elsewhere"))
    assert differences(old, new) == ["the model's num_layers: 4 then, 5 now"]
    old["versions"]["torch"] = "1.0"
    assert any(line.startswith("torch: '1.0' then, ") for line in differences(old, new))


def test_a_long_prompt_is_shown_where_it_changed() -> None:
    words = " ".join(f"word{i}" for i in range(100))
    story = STORY.replace("a red circle", words), STORY.replace("a red circle", words.replace("word77", "cat"))
    [line] = differences(*map(fingerprint_of, story))
    assert "word77 word78" in line.partition(" then")[0]
    assert "cat word78" in line.partition(" then")[2]
    assert len(line) < 200


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=80),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=5), PLAIN, max_size=4), st.dictionaries(st.text(max_size=5), PLAIN, max_size=4))
def test_differences_are_there_just_where_data_differ(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert differences(old, old) == []
    without = [{key: value for key, value in data.items() if value is not None} for data in (old, new)]
    assert bool(differences(old, new)) or without[0] == without[1] or _only_nothing_differs(old, new)
    assert all(isinstance(line, str) for line in differences(old, new))


def _only_nothing_differs(old: Any, new: Any) -> bool:
    """Equal but for keys that are missing on one side and hold nothing on the other."""
    if isinstance(old, dict) and isinstance(new, dict):
        return all(_only_nothing_differs(old.get(key), new.get(key)) for key in {*old, *new})
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_only_nothing_differs, old, new))
    return bool(old == new)


def test_a_model_is_known_by_its_files_wherever_they_are(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for root in (one, other):
        (root / "transformer").mkdir(parents=True)
        (root / "vae").mkdir()
        (root / "model_index.json").write_text("{}")
        (root / "transformer" / "model.safetensors").write_bytes(b"weights")
        (root / "vae" / "config.json").write_text("{}")
    (other / "README.md").write_text("not a part of it")
    assert describe_model(one) == describe_model(other)
    (other / "transformer" / "model.safetensors").write_bytes(b"Weights")
    (other / "vae" / "config.json").unlink()
    old, new = ({"model": {"files": describe_model(root)}} for root in (one, other))
    assert differences(old, new) == [
        "the model's weights changed (transformer/model.safetensors)",
        "the model's files changed (vae/config.json)",
    ]


def test_large_weights_are_sampled_at_both_ends_and_between(tmp_path: Path) -> None:
    path, size = tmp_path / "transformer" / "large.safetensors", WHOLE_BYTES + 12345
    path.parent.mkdir()
    seen = []
    for place in (None, 8, size - 1, (size - (1 << 16)) // 63 * 31 + 100):
        with path.open("wb") as file:
            file.truncate(size)
            if place is not None:
                file.seek(place)
                file.write(b"x")
        seen.append(describe_model(tmp_path)["transformer/large.safetensors"]["digest"])
    assert len(set(seen)) == 4


def test_files_that_settings_name_count_by_their_content_wherever_they_are(tmp_path: Path) -> None:
    one, copy, other = (tmp_path / name for name in ("one.json", "copy.json", "other.json"))
    for path, text in ((one, "a"), (copy, "a"), (other, "b")):
        path.write_text(text)

    def marks(path: Path) -> dict[str, Any]:
        return fingerprint_of(overrides=("attention.policy=sta", f"attention.profile={path}"))

    assert marks(one) == marks(copy)
    assert differences(marks(one), marks(other)) == ["the file of attention.profile changed"]
    (added,) = differences(fingerprint_of(overrides=("attention.policy=sta",)), marks(one))
    assert added.startswith("attention.profile: nothing then")
