"""Models by their id on the Hugging Face Hub, from a local cache in its real layout: nobody asks the network."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch

from longvid.errors import InputError
from longvid.models.facts import facts_of, find_model, weight_bytes
from longvid.models.hub import SHORT_NAMES, HubModel
from longvid.models.loader import open_checkpoint
from longvid.models.parts import ModelPart

COMMIT = hashlib.sha1(b"commit").hexdigest()
OTHER = hashlib.sha1(b"another").hexdigest()
NAME = "somebody/tiny-hunyuan"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, offline: huggingface_hub reads the environment when it is imported."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.fixture
def model(checkpoint_of: Callable[[str], Path]) -> Path:
    return checkpoint_of("hunyuan")


def store(model: Path, cache: Path, commit: str, ref: str, keep: Callable[[Path], bool] = lambda file: True) -> Path:
    """Lay a model out as huggingface_hub does: blobs by their digest, and links to them in the snapshot of a commit."""
    root = cache / f"models--{NAME.replace('/', '--')}"
    for file in filter(keep, (file for file in model.rglob("*") if file.is_file())):
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(file.read_bytes())
        link = root / "snapshots" / commit / file.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / ref).write_text(commit)
    return root / "snapshots" / commit


def test_an_id_is_the_folder_in_the_cache(model: Path, cache: Path) -> None:
    root = store(model, cache, COMMIT, "main")
    assert find_model(NAME) == find_model(f"{NAME}@main") == find_model(f"{NAME}@{COMMIT}") == root
    assert facts_of(NAME).grid == facts_of(str(model)).grid
    part = ModelPart(range(1), is_last=False)
    assert weight_bytes(NAME, part, 2) == weight_bytes(str(model), part, 2) > 0
    opened, expected = open_checkpoint(NAME), open_checkpoint(str(model))
    texts = [x.load_prompts(torch.float32, torch.device("cpu")).encode(["a cat"])[0] for x in (opened, expected)]
    assert torch.equal(texts[0].states, texts[1].states) and torch.equal(texts[0].pooled, texts[1].pooled)


def test_a_revision_is_what_was_asked_for(model: Path, cache: Path) -> None:
    roots = [store(model, cache, COMMIT, "main"), store(model, cache, OTHER, "v2")]
    assert [find_model(NAME), find_model(f"{NAME}@v2")] == roots
    with pytest.raises(InputError, match=rf"{NAME}@v3 is not in the local cache .*hf download {NAME} --revision v3"):
        find_model(f"{NAME}@v3")


def test_offline_the_message_says_what_is_not_there_and_how_to_get_it(cache: Path) -> None:
    expected = rf"model.path: {NAME} is not in the local cache \({cache}\), and HF_HUB_OFFLINE is set; "
    with pytest.raises(InputError, match=rf"{expected}`hf download {NAME}` gets it .*or give a directory"):
        find_model(NAME)


def test_planning_needs_the_config_files_alone(model: Path, cache: Path) -> None:
    store(model, cache, COMMIT, "main", keep=lambda file: file.suffix == ".json")
    assert facts_of(NAME).num_layers == 3
    with pytest.raises(InputError, match=r"text_encoder: holds no \.safetensors file"):
        open_checkpoint(NAME)


def test_a_part_that_was_not_downloaded_is_named(model: Path, cache: Path) -> None:
    store(model, cache, COMMIT, "main", keep=lambda file: file.parent.name != "tokenizer_2")
    with pytest.raises(InputError, match=rf"{NAME}: .*tokenizer_2 is missing; `hf download"):
        find_model(NAME)


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "/no/such", "./a/b", "~/a/b", "a b/c", "owner/", "owner/name@"])
def test_what_cannot_be_an_id_is_refused_without_looking(name: str, cache: Path) -> None:
    assert HubModel.of(name) is None
    with pytest.raises(InputError, match=r"is neither a directory nor a known name .*nor an id like OWNER/NAME"):
        find_model(name)


def test_short_names_are_ids() -> None:
    for short, repo in SHORT_NAMES.items():
        assert HubModel.of(short) == HubModel.of(repo) == HubModel(repo)
        assert HubModel.of(f"{short}@abc") == HubModel(repo, "abc")


def test_a_directory_comes_before_an_id(
    model: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "somebody").mkdir()
    (tmp_path / NAME).symlink_to(model)
    monkeypatch.chdir(tmp_path)
    assert find_model(NAME) == Path(NAME)


def test_where_no_hub_answers_what_is_in_the_cache_is_used(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not told that there is no network, but asking a port where nobody listens."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=rf"{NAME} is not in the local cache .* and the Hub cannot be reached"):
        find_model(NAME)
    assert store(model, cache, COMMIT, "main") == find_model(NAME)


def test_the_command_line_takes_an_id_and_says_what_is_missing(model: Path, tmp_path: Path) -> None:
    store(model, tmp_path / "hub", COMMIT, "main")
    story = tmp_path / "story.yaml"
    story.write_text("size: [32, 48]\nscenes:\n  - {prompt: a cat, for: 9f}\n")
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}

    def plan(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "longvid", "plan", str(story), "--model", name]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    done, failed = plan(NAME), plan("somebody/else")
    assert done.returncode == 0, done.stderr
    assert failed.returncode == 2
    assert "somebody/else is not in the local cache" in failed.stderr and len(failed.stderr.splitlines()) == 1
