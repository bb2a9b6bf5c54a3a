"""The GPU benchmark goes on behind a case that takes its process, or its device, with it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
PART = """
import os, sys, time
first, budget = int(sys.argv[2]), float(sys.argv[4])
print("something else")
for number in range(first, 7):
    if number == 1:
        os.abort()
    if number == 3:
        time.sleep(600)
    print('found: {"number": %d, "kind": "gate", "ok": true}' % number, flush=True)
    if number == 4:
        sys.exit(70)
"""


@pytest.fixture(scope="module")
def gpu() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_case_that_crashes_hangs_or_loses_the_device_costs_no_other(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "CASE_S", 6.0)
    found: list[dict[str, Any]] = []
    assert gpu.run_part([sys.executable, "-c", PART], gpu.Clock(120.0), found.append)
    assert [(one["kind"], one.get("case")) for one in found] == [
        ("gate", None),
        ("lost", 1),
        ("gate", None),
        ("lost", 3),
        *[("gate", None)] * 3,
    ]
    assert "code -6" in found[1]["failed"] and "code -9" in found[3]["failed"]


def test_a_part_that_is_cut_short_says_so(gpu: Any) -> None:
    found: list[dict[str, Any]] = []
    assert not gpu.run_part([sys.executable, "-c", PART], gpu.Clock(-1.0), found.append)
    assert not found
