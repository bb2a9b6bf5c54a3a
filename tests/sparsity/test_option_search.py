"""The searches for windows and latents: the knapsack against all choices, planted heads, and what a profile does."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longvid.errors import InputError
from longvid.sparsity import settings as kinds
from longvid.sparsity.knapsack import choose_options
from longvid.sparsity.make import make_policy
from longvid.sparsity.option_search import OptionJudge, OptionSearch
from longvid.sparsity.policy import Call, Heads
from longvid.sparsity.profile import Choices
from longvid.sparsity.search import Sample
from longvid.sparsity.tokens import TokenMap

TOKENS = TokenMap(range(10), range(10), range(10), 4, 8)
STA = kinds.Sta(policy="sta", tile=(2, 2, 2), window=(3, 1, 2), dense_steps=0)
TILE = kinds.TileFrames(policy="tile", tile=16, global_latents=2)


@st.composite
def knapsacks(draw):
    num_items, num_options = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    numbers = st.floats(0, 1, width=16)
    values, weights = (
        np.array(draw(st.lists(numbers, min_size=num_items * num_options, max_size=num_items * num_options)))
        for _ in range(2)
    )
    return values.reshape(num_items, -1), weights.reshape(num_items, -1), draw(st.floats(0, 1))


def least_of(values, weights, limit):
    """The least sum of values within a mean weight, by looking at all choices."""
    items = range(len(values))
    sums = [
        sum(values[i, o] for i, o in zip(items, choice, strict=True))
        for choice in itertools.product(range(values.shape[1]), repeat=len(values))
        if sum(weights[i, o] for i, o in zip(items, choice, strict=True)) <= limit * len(values)
    ]
    return min(sums, default=math.inf)


@given(knapsacks())
def test_the_knapsack_holds_its_limit_and_is_as_good_as_the_best_of_a_little_less(case):
    values, weights, limit = case
    grain = limit / max(32, math.ceil(2000 / len(values)))
    try:
        chosen = choose_options(values, weights, limit)
    except ValueError:
        assert least_of(values, weights, limit - grain) == math.inf
        return
    items = np.arange(len(values))
    assert weights[items, chosen].mean() <= limit * (1 + 1e-9)
    assert values[items, chosen].sum() <= least_of(values, weights, limit - grain) + 1e-9


def test_one_option_at_the_limit_itself_always_fits():
    values, weights = np.array([[1.0, 0.5]] * 7), np.array([[0.1, 1 / 3]] * 7)
    assert choose_options(values, weights, 1 / 3).tolist() == [1] * 7
    values[2, 1] = math.nan
    assert choose_options(values, weights, 1 / 3).tolist() == [1, 1, 0, 1, 1, 1, 1]


def planted(reach, seed):
    """q, k, v [T, 16] of a head that looks so far along latents, rows and columns."""
    draw = torch.Generator().manual_seed(seed)
    place = torch.cartesian_prod(torch.arange(10), torch.arange(4), torch.arange(8)).float()
    angle = (place / torch.tensor(reach)) @ torch.randn(3, 16, generator=draw)
    q = torch.cat([angle.cos(), angle.sin()], 1) * 1.7
    return q, q, torch.randn(len(place), 32, generator=draw)


def sample_of(*reaches, layer=0, progress=0.0):
    heads = [planted(reach, seed) for seed, reach in enumerate(reaches)]
    q, k, v = (torch.stack(x, 1)[None] for x in zip(*heads, strict=True))
    return Sample(layer, q, k, v, TOKENS, progress)


ALONG_FILM, IN_FRAME = (1.5, 0.3, 0.3), (0.3, 1.5, 3.0)


def found_by(how, samples):
    judge = OptionJudge(how)
    for sample in samples:
        judge.add(sample)
    return judge.choices("m")


@pytest.fixture(scope="module")
def windows():
    early = [sample_of(ALONG_FILM, IN_FRAME, progress=0.1), sample_of(IN_FRAME, IN_FRAME, layer=1, progress=0.1)]
    late = [sample_of(IN_FRAME, IN_FRAME, progress=0.6), sample_of(ALONG_FILM, IN_FRAME, layer=1, progress=0.6)]
    return found_by(OptionSearch(STA), [*early, *late])


def test_heads_get_windows_of_the_shape_that_was_planted_in_each_span(windows):
    values = [option.value for option in windows.options]
    for span, layer, head in itertools.product(range(2), repeat=3):
        t, h, w = values[windows.chosen[span][layer][head]]
        looks_along_film = head == 0 and span == layer
        assert t > h * w if looks_along_film else t < h * w
    assert windows.density <= windows.even_density + 1e-9
    assert windows.error < 0.5 * windows.even_error


def test_a_tolerance_gives_the_sparsest_choice_within_it():
    samples = [sample_of(ALONG_FILM, IN_FRAME, progress=share) for share in (0.1, 0.6)]
    loose, strict = (found_by(OptionSearch(STA, tolerance), samples) for tolerance in (0.1, 0.01))
    assert loose.error <= 0.1 and strict.error <= 0.01
    assert loose.density < strict.density < 1
    with pytest.raises(ValueError, match="no choice of options keeps to a mean weight of 0"):
        found_by(OptionSearch(STA, 0.0), samples)
    with pytest.raises(ValueError, match="every span of steps of every layer"):
        found_by(OptionSearch(STA), samples[:1])


def test_layers_share_the_budget_of_global_latents():
    near = sample_of(IN_FRAME, IN_FRAME)
    far = sample_of((30.0, 0.3, 0.3), (30.0, 0.3, 0.3), layer=1)
    found = found_by(OptionSearch(TILE), [near, far])
    first, second = ([found.options[place].value for place in heads] for heads in found.chosen[0])
    assert len(set(first)) == len(set(second)) == 1 and first[0] < second[0]
    assert found.spans == (0.0,)
    assert found.density <= found.even_density + 1e-9 and found.error < found.even_error


def call_of(layer, step, heads=None):
    return Call(layer, 2, step, 10, TOKENS, heads or Heads.all(2))


def test_a_policy_with_a_profile_gives_each_head_its_window(tmp_path, windows):
    windows.write(tmp_path / "w.json")
    assert Choices.read(tmp_path / "w.json") == windows
    policy = make_policy(kinds.Sta(policy="sta", profile=str(tmp_path / "w.json"), dense_steps=0))
    q, k, v, _ = (torch.zeros(1, TOKENS.num_keys, 2, 32) for _ in range(4))
    for layer, step in itertools.product(range(2), (0, 4, 5, 9)):
        layout = policy.layout(q, k, v, call_of(layer, step))
        for head in range(2):
            window = windows.options[windows.chosen[step // 5][layer][head]].value
            even = make_policy(replace_settings(STA, window=window)).layout(q, k, v, call_of(layer, step))
            assert torch.equal(layout.mask()[layout.group[0, head]], even.mask()[0])
    one = policy.layout(q, k, v, call_of(0, 0, Heads((1,), 2)))
    assert one.group.tolist() == [[windows.chosen[0][0][1]]]
    assert policy.density(TOKENS) == pytest.approx(windows.density)
    assert all(cost > 0 for layer in range(2) for cost in policy.head_costs(layer))
    with pytest.raises(InputError, match="layers, but this one has 3"):
        policy.layout(q, k, v, replace(call_of(0, 0), num_layers=3))
    with pytest.raises(InputError, match="is of policy sta, not tile"):
        make_policy(kinds.TileFrames(policy="tile", profile=str(tmp_path / "w.json")))


def replace_settings(settings, **changes):
    return type(settings)(**{**settings.model_dump(), **changes})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"num_heads": 2', '"num_heads": 3', "layer 0 holds 2 heads, but num_heads is 3"),
        ('"spans": [\n  0.0', '"spans": [\n  0.1', "spans must begin at 0"),
        ('"policy": "sta"', '"policy": "tile"', "sta has cuboids"),
    ],
)
def test_a_damaged_profile_is_refused(tmp_path, windows, old, new, message):
    path = tmp_path / "w.json"
    windows.write(path)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(InputError, match=message):
        Choices.read(path)
