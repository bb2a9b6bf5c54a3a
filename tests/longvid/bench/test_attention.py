"""`bench attention` measures what it says."""

from __future__ import annotations

import json
import math

import pytest

from longvid.bench import attention
from longvid.errors import RuntimeFailure
from longvid.kernels import native

SMALL = attention.AttentionBench(shapes=((1, 2, 256, 16),), densities=(0.25, 1.0), tiles=(32,), repeats=2)


@pytest.mark.skipif(not native.is_available(), reason="the C++ kernels were not built")
def test_every_case_has_its_figures() -> None:
    lines: list[str] = []
    result = json.loads(json.dumps(attention.bench_attention(SMALL, say=lines.append), allow_nan=False))
    isas = {case["isa"] for case in result["cases"]}
    assert native.isa() in isas or native.isa() == "portable"
    assert len(result["cases"]) == 4 * len(isas)
    for case in result["cases"]:
        assert case["speedup"] > 0 and 0 <= case["error"] < 1e-5
        assert case["efficiency"] == pytest.approx(case["speedup"] * case["density"])
    assert [case["sample_every"] for case in result["search"]] == [1, 4] * len(isas)
    assert all(case["cost"] > 0 for case in result["search"])
    assert result["machine"]["isa"] == native.isa()
    assert all(line in attention.as_text(result) for line in lines if not line.endswith(":"))


def test_without_the_kernels_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "isa", lambda: None)
    with pytest.raises(RuntimeFailure, match="C\\+\\+ compiler"):
        attention.bench_attention(SMALL, say=print)


@pytest.mark.parametrize("rows", ["uniform", "ragged"])
def test_layouts_have_about_the_density(rows: attention.Rows) -> None:
    layout = attention.random_layout(4096, 2, 64, 0.25, rows)
    assert math.isclose(layout.density(), 0.25, rel_tol=0.15)
    lengths, counts = layout.q.lengths()[0], layout.mask()[0].sum(-1)
    assert (len(set(lengths.tolist())) > 1) == (len(set(counts.tolist())) > 1) == (rows == "ragged")
    assert attention.random_layout(4096, 2, 64, 1.0, rows).density() == 1.0
