"""Policies beside dense attention: each row is kept as soon as it is measured, and not measured again."""

import pytest

from longvid.bench.policies import Case, as_markdown, as_text, measure_policies
from longvid.errors import InputError

CASES = (
    Case("tile", ("attention.policy=tile",), "1.5x"),
    Case("grat", ("attention.policy=grat", "attention.group=[1,2,2]"), title="crosses of groups"),
)
COMMON = ["schedule=sequential", "sampler.steps=2"]


def measure(cases=CASES, **changes):
    said, kept = [], []
    args = {"films": 1, "frames": 33, "together": 1, "keep": kept.append, "say": said.append, **changes}
    return measure_policies(cases, COMMON, **args), kept, said


@pytest.fixture(scope="module")
def measured():
    return measure()


def test_each_group_takes_turns_with_dense_attention_and_is_kept(measured):
    result, kept, said = measured
    assert [[row["name"] for row in some["policies"]] for some in kept] == [["tile"], ["tile", "grat"]]
    assert kept[-1] == result
    assert said == ["tile: film 1 of 1", "grat: film 1 of 1"]
    for row in result["policies"]:
        assert row["denoise_speedup"] == pytest.approx(row["dense_denoise_s"] / row["denoise_s"])
        assert row["psnr"] > 5 and 0 < row["density"] < 1
    assert result["dense"]["density"] == 1 and result["dense"]["psnr"] is None


def test_what_is_kept_is_not_measured_again(measured):
    _, (first, _), _ = measured
    result, kept, said = measure(before=first)
    assert said == ["grat: film 1 of 1"] and len(kept) == 1
    assert result["policies"][0] == first["policies"][0] and result["dense"] == first["dense"]


def test_results_of_other_films_are_refused(measured):
    with pytest.raises(InputError, match="other frames"):
        measure(before=measured[0], frames=17)


def test_tables_have_a_line_for_each_policy(measured):
    result = measured[0]
    assert len(as_text(result).splitlines()) == 2 + 1 + len(CASES)
    *_, tile, grat = as_markdown(result).splitlines()
    assert tile.startswith("| `tile` | 0.") and tile.endswith("| 1.5x |")
    assert grat.startswith("| crosses of groups | ") and grat.endswith("| - |")
