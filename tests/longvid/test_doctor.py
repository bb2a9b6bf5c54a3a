"""The doctor tells what is there, in words and as data."""

from __future__ import annotations

import json

import pytest
import torch

import longvid.doctor as doctor


def test_facts_are_json_and_agree_with_torch() -> None:
    facts = json.loads(json.dumps(doctor.examine()))
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["torch"]["threads"] == torch.get_num_threads()
    assert facts["torch"]["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert facts["encoder"]["libx264"] is True
    assert facts["cpu"]["cores"] >= 1


def test_the_text_names_every_package_the_device_and_the_attention() -> None:
    facts = doctor.examine()
    text = doctor.as_text(facts)
    for word in (*doctor.REQUIRED, *doctor.OPTIONAL, facts["torch"]["device"], facts["torch"]["attention"]):
        assert word in text
    assert f"block-sparse: {facts['torch']['sparse_attention']}" in text


def test_the_backend_of_sparse_attention_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"triton": "CUDA device", "cpu": "C++ kernels for", "gather": "were not built"}
    for backend, reason in reasons.items():
        monkeypatch.setattr("longvid.kernels.dispatch.backend_for", lambda device, backend=backend: backend)
        line = doctor._sparse_kernel("cpu")
        assert line.startswith(backend) and reason in line


def test_what_is_missing_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "package_version", lambda name: None)
    monkeypatch.setattr(doctor, "_model", lambda: None)
    facts = doctor.examine()
    assert "torch is not installed" in facts["problems"]
    assert any("embedded model" in problem for problem in facts["problems"])
    assert "problem    torch is not installed" in doctor.as_text(facts)
