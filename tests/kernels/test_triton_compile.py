"""The Triton kernels compile for real chips, and stay in their registers and shared memory. No GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

SHARED_BYTES = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
PROCESSES = (["sm_80", "sm_90", "gfx942"], ["sm_86", "sm_100"])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What `compile_triton.py` prints of every kernel on every chip."""
    file = Path(__file__).with_name("compile_triton.py")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "TRITON_INTERPRET": "0"}
    running = [
        subprocess.Popen(
            [sys.executable, "-P", str(file), *chips],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for chips in PROCESSES
    ]
    facts = []
    for process in running:
        output, errors = process.communicate()
        assert process.returncode == 0, errors[-4000:]
        facts += [json.loads(line) for line in output.splitlines()]
    return facts


def broken(facts, holds):
    return [fact for fact in facts if not holds(fact)]


def test_every_kernel_was_compiled_for_every_chip(compiled):
    kernels = {chip: {fact["kernel"].split()[0] for fact in compiled if fact["chip"] == chip} for chip in SHARED_BYTES}
    assert set(map(frozenset, kernels.values())) == {frozenset({"forward", "steps", "mass", "pool", "top_k", "top_p"})}


def test_no_kernel_spills_registers(compiled):
    assert not broken(compiled, lambda fact: fact["spilled"] == 0)


def test_products_run_on_tensor_cores(compiled):
    products = [fact for fact in compiled if fact["kernel"].startswith(("forward", "mass"))]
    assert not broken(products, lambda fact: fact["products"] > 0)


def test_shared_memory_is_within_the_chip_s(compiled):
    assert not broken(compiled, lambda fact: fact["shared"] <= SHARED_BYTES[fact["chip"]])


def test_on_nvidia_loads_of_the_next_keys_are_in_flight_while_these_are_used(compiled):
    attention = [fact for fact in compiled if fact["kernel"].startswith("forward") and fact["chip"].startswith("sm")]
    assert not broken(attention, lambda fact: fact["loads"] > 0)
