"""Static policies: their masks against their rules stated for pairs of tokens, and what all of them keep."""

import math
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longvid.errors import InputError
from longvid.kernels import reference
from longvid.kernels.dispatch import sparse_attention
from longvid.sparsity import settings as kinds
from longvid.sparsity.cuboids import cut_cuboids, cut_latents, cut_positions, even_tile
from longvid.sparsity.make import make_policy
from longvid.sparsity.policy import Call, Heads
from longvid.sparsity.profile import FULL, SKIP, Costs, Pattern, Profile
from longvid.sparsity.sparse_vdit import pattern_layout
from longvid.sparsity.static import MAX_KEPT
from longvid.sparsity.tokens import TokenMap

COSTS = Costs(score_s=1e-9, tile_s=1e-9, token_s=1e-9, dense_score_s=1e-9)
WINDOW = {"diagonal": 0.8, "multi_diagonal": 0.3, "vertical": 2.0}


@st.composite
def token_maps(draw):
    """A chunk with context on either side, whose queries are its own latents or those and the left context."""
    start, count = draw(st.integers(0, 9)), draw(st.integers(1, 7))
    left, right = draw(st.integers(0, min(2, start))), draw(st.integers(0, 2))
    own = range(start, start + count)
    queries = range(start - draw(st.integers(0, left)), start + count)
    height, width, before, behind = (draw(st.integers(low, high)) for low, high in ((1, 6), (1, 7), (0, 3), (0, 3)))
    return TokenMap(queries, range(start - left, own.stop + right), own, height, width, before, behind)


def film(latents, height, width, text=0):
    """All latents of a film at once."""
    return TokenMap(range(latents), range(latents), range(latents), height, width, 0, text)


def profile_of(*patterns, layers=1, **changes):
    values = {"model": "m", "num_layers": layers, "num_heads": len(patterns), "tile": 16, "costs": COSTS}
    return Profile(**{**values, "layers": (patterns,) * layers, **changes})


@pytest.fixture(scope="module")
def vdit(tmp_path_factory):
    """Settings of a Sparse-vDiT policy with these patterns in all layers."""
    folder = tmp_path_factory.mktemp("profiles")

    def make(*patterns, layers=1, **options):
        path = folder / f"{abs(hash((patterns, layers)))}.json"
        if not path.exists():
            profile_of(*patterns, layers=layers).write(path)
        return kinds.SparseVdit(policy="sparse_vdit", profile=str(path), **options)

    return make


def call_of(tokens, heads=1, **changes):
    values = {"layer": 0, "num_layers": 1, "step": 9, "num_steps": 10, "heads": Heads.all(heads)}
    return Call(**{**values, "tokens": tokens, **changes})


def layout_of(policy, call):
    empty = torch.empty(0)
    return policy.layout(empty, empty, empty, call)


def mask_of(policy, tokens):
    """The tokens that the first head sees, bool [L, T]."""
    layout = layout_of(policy, call_of(tokens))
    return reference.token_mask(layout, tokens.num_queries, tokens.num_keys)[0, 0].numpy()


# ---------------------------------------------------------------------------------------- rules, stated for token pairs


@dataclass
class Pairs:
    """Coordinates of queries [L, 1] and keys [1, T]; p is the place in the latent."""

    qt: np.ndarray
    qh: np.ndarray
    qw: np.ndarray
    kt: np.ndarray
    kh: np.ndarray
    kw: np.ndarray
    width: int

    @property
    def qp(self):
        return self.qh * self.width + self.qw

    @property
    def kp(self):
        return self.kh * self.width + self.kw


def coordinates(tokens, latents):
    """t, h, w of each token; text has t = -1."""
    video = np.array([(t, h, w) for t in latents for h in range(tokens.height) for w in range(tokens.width)])
    text = np.full((1, 3), -1)
    return np.concatenate([text.repeat(tokens.text_before, 0), video, text.repeat(tokens.text_behind, 0)]).T


def stated(tokens, rule):
    """The mask of a rule for pairs of latents' tokens, with text and context visible, bool [L, T]."""
    q, k = coordinates(tokens, tokens.queries), coordinates(tokens, tokens.keys)
    pairs = Pairs(*(x[:, None] for x in q), *(x[None] for x in k), tokens.width)
    is_free = (pairs.qt < 0) | (pairs.kt < 0) | (pairs.kt < tokens.own.start) | (pairs.kt >= tokens.own.stop)
    return rule(pairs) | is_free


def spread_latents(tokens, count):
    count = min(count, len(tokens.own))
    return [tokens.own.start + math.floor(i * len(tokens.own) / count) for i in range(count)]


def tile_rule(tokens, chosen):
    return lambda x: (x.qt == x.kt) | np.isin(x.kt, spread_latents(tokens, chosen.global_latents))


def sta_rule(tokens, chosen):
    def near(q, k, extent, window, latents):
        places = {x // extent for x in latents}
        if len(places) <= window:
            return q == q
        centre = np.clip(q // extent, min(places) + (window - 1) // 2, max(places) - window // 2)
        return (k // extent >= centre - (window - 1) // 2) & (k // extent <= centre + window // 2)

    extents, windows = chosen.tile, chosen.window
    return lambda x: (
        near(x.qt, x.kt, extents[0], windows[0], tokens.keys)
        & near(x.qh, x.kh, extents[1], windows[1], range(tokens.height))
        & near(x.qw, x.kw, extents[2], windows[2], range(tokens.width))
    )


def grat_rule(_, chosen):
    def apart(x):
        t, h, w = chosen.group
        return abs(x.qt // t - x.kt // t), abs(x.qh // h - x.kh // h), abs(x.qw // w - x.kw // w)

    if chosen.pattern == "cross":
        return lambda x: np.minimum.reduce(np.broadcast_arrays(*apart(x))) == 0
    return lambda x: np.maximum.reduce(np.broadcast_arrays(*apart(x))) <= 1


def radial_rule(tokens, chosen):
    size = even_tile(tokens.per_latent, chosen.tile)

    def rule(x):
        distance = abs(x.qt - x.kt)
        octave = np.floor(np.log2(np.maximum(distance, 1)))
        band = chosen.decay * tokens.per_latent / 2.0**octave
        apart = abs(x.qp // size - x.kp // size) * size
        is_narrow = band < size
        kept = np.where(is_narrow, (apart == 0) & (distance % np.ceil(size / band) == 0), apart < band)
        return (distance <= 1) | kept | (x.kt == tokens.keys.start)

    return rule


def vdit_rule(tokens, pattern):
    """Distances are between the first tokens of tiles."""
    size, positions = even_tile(tokens.per_latent, 16), tokens.per_latent
    narrow = even_tile(positions, max(1, 16 // len(tokens.own)))

    def diagonal(x):
        q, k = x.qt * positions + x.qp // size * size, x.kt * positions + x.kp // size * size
        return (abs(q - k) < WINDOW["diagonal"] * positions) | (q == k)

    def multi_diagonal(x):
        q, k = x.qp // narrow * narrow, x.kp // narrow * narrow
        return (abs(q - k) < WINDOW["multi_diagonal"] * positions) | (q == k)

    def vertical(x):
        is_own = (x.qt == x.kt) & (x.qp // size == x.kp // size)
        return is_own | np.isin(x.kt, spread_latents(tokens, int(WINDOW["vertical"])))

    rules = {"diagonal": diagonal, "multi_diagonal": multi_diagonal, "vertical": vertical}
    return rules[pattern.mode]


ALWAYS = {"dense_steps": 0.0, "dense_layers": 0.0}
RULES = {
    "tile": (kinds.TileFrames(policy="tile", global_latents=2, tile=16), tile_rule),
    "sta": (kinds.Sta(policy="sta", tile=(3, 2, 2), window=(2, 1, 3), **ALWAYS), sta_rule),
    "radial": (kinds.Radial(policy="radial", tile=16, **ALWAYS), radial_rule),
    "narrow radial": (kinds.Radial(policy="radial", tile=16, decay=0.4, **ALWAYS), radial_rule),
    "cross": (kinds.Grat(policy="grat", group=(2, 2, 3)), grat_rule),
    "neighbours": (kinds.Grat(policy="grat", group=(2, 2, 3), pattern="neighbours"), grat_rule),
    **{mode: (Pattern(mode=mode, window=window), vdit_rule) for mode, window in WINDOW.items()},
}


@pytest.fixture(scope="module", params=RULES)
def rule(request, vdit):
    """A policy, and its rule as a function of the tokens."""
    chosen, state = RULES[request.param]
    policy = make_policy(vdit(chosen) if isinstance(chosen, Pattern) else chosen)
    return policy, lambda tokens: stated(tokens, state(tokens, chosen))


@given(tokens=token_maps())
@settings(max_examples=60)
def test_a_mask_is_what_its_rule_says_of_each_pair_of_tokens(rule, tokens):
    policy, state = rule
    assert (mask_of(policy, tokens) == state(tokens)).all()


@given(tokens=token_maps())
@settings(max_examples=30)
def test_context_text_and_own_tokens_are_seen(rule, tokens):
    mask = mask_of(rule[0], tokens)
    assert not (~mask & ~stated(tokens, lambda x: x.qt >= 0)).any()  # ordinary pairs may be hidden, no others
    assert (mask | ~stated(tokens, lambda x: (x.qt == x.kt) & (x.qp == x.kp))).all()
    assert mask.any(1).all()


@given(tokens=token_maps(), data=st.data())
@settings(max_examples=30)
def test_some_of_the_queries_see_what_they_see_among_all(rule, tokens, data):
    whole = replace(tokens, queries=tokens.keys, text_before=0, text_behind=0)
    first = data.draw(st.integers(tokens.keys.start, tokens.keys.stop - 1))
    queries = range(first, data.draw(st.integers(first + 1, tokens.keys.stop)))
    rows = slice(
        (first - tokens.keys.start) * tokens.per_latent, (queries.stop - tokens.keys.start) * tokens.per_latent
    )
    assert (mask_of(rule[0], replace(whole, queries=queries)) == mask_of(rule[0], whole)[rows]).all()


@given(tokens=token_maps())
@settings(max_examples=20)
def test_density_is_the_share_of_visible_pairs(rule, tokens):
    assert rule[0].density(tokens) == pytest.approx(mask_of(rule[0], tokens).mean())


def test_the_first_steps_and_layers_are_dense():
    policy = make_policy(kinds.Radial(policy="radial", dense_steps=0.25, dense_layers=0.05))
    calls = [call_of(film(4, 4, 4), layer=layer, num_layers=40, step=step, num_steps=8) for layer, step in STEPS]
    assert [layout_of(policy, call) is None for call in calls] == [True, True, True, False]


STEPS = [(0, 7), (1, 7), (2, 1), (2, 2)]


def test_chunks_of_one_shape_share_a_layout():
    policy = make_policy(kinds.Sta(policy="sta", tile=(3, 4, 4), **ALWAYS))
    chunks = [TokenMap(range(n, n + 4), range(n - 1, n + 5), range(n, n + 4), 8, 8) for n in (2, 5, 3)]
    first, second, other = (layout_of(policy, call_of(tokens)) for tokens in chunks)
    assert first is second
    assert first is not other
    for n in range(2 * MAX_KEPT):
        layout_of(policy, call_of(film(2 + n, 2, 2)))
    assert len(policy._built) == MAX_KEPT


def test_tokens_that_stand_in_blocks_as_they_come_need_no_order():
    tokens = TokenMap(range(4, 8), range(2, 10), range(4, 8), 6, 6, 5, 7)
    cut = cut_latents(tokens, 16)
    assert cut.queries.blocks.order is None and cut.keys.blocks.order is None
    assert cut.queries.blocks.lengths().tolist() == [[5, *[12] * 12, 7]]
    assert cut.keys.blocks.lengths().tolist() == [[16, 16, 16, 16, 13, *[12] * 12, *[16] * 4, 15]]


def test_spatial_major_blocks_hold_positions_in_all_latents():
    tokens = TokenMap(range(3, 8), range(3, 9), range(4, 8), 4, 6)
    cut = cut_positions(tokens, 16)
    assert cut.queries.blocks.lengths().tolist() == [[20] * 6]
    assert cut.queries.blocks.order[0, :8].tolist() == [0, 1, 2, 3, 24, 25, 26, 27]
    assert cut.keys.blocks.lengths().tolist() == [[16, 8, *[16] * 6, 16, 8]]


def test_cuboids_of_queries_and_keys_lie_over_each_other():
    tokens = TokenMap(range(8, 13), range(6, 15), range(8, 13), 5, 6)
    cut = cut_cuboids(tokens, (3, 2, 4))
    queries, keys = (list(zip(*(x.tolist() for x in (c.t, c.h, c.w)), strict=True)) for c in (cut.queries, cut.keys))
    assert set(queries) == {(t, h, w) for t in (2, 3, 4) for h in range(3) for w in range(2)}
    assert set(keys) == {*queries, (-1, -1, -1)}
    lengths = dict(zip(queries, cut.queries.blocks.lengths()[0].tolist(), strict=True))
    assert [lengths[place] for place in ((2, 0, 0), (3, 0, 0), (3, 2, 1), (4, 1, 0))] == [8, 24, 6, 8]


# ------------------------------------------------------------------------------------------------------------ densities

WAN = film(21, 30, 52)
"""Wan2.1, 81 frames of 832 x 480."""
HUNYUAN = film(30, 48, 80)
"""HunyuanVideo, 117 frames of 1280 x 768."""


@pytest.mark.parametrize(
    ("tokens", "chosen", "density"),
    [
        # STA: "91 % sparse" for a window of 18 x 24 x 24 tokens, 3 x 3 x 3 of 5 x 6 x 10 tiles.
        (HUNYUAN, kinds.Sta(policy="sta"), 27 / 300),
        (HUNYUAN, kinds.Sta(policy="sta", window=(5, 3, 3)), 45 / 300),
        (HUNYUAN, kinds.Sta(policy="sta", window=(5, 6, 10)), 1.0),
        # Efficient-vDiT, "k : F - k": 4 latents see 4 latents, the other 17 see 5.
        (WAN, kinds.TileFrames(policy="tile"), (4 * 4 + 17 * 5) / 21**2),
        (film(20, 48, 80), kinds.TileFrames(policy="tile", global_latents=1), (1 + 19 * 2) / 20**2),
        # GRAT-X on whole groups: 1 - (1 - 1/8)(1 - 1/6)(1 - 1/10) of 8 x 6 x 10 groups; GRAT-B less at borders.
        (film(32, 48, 80), kinds.Grat(policy="grat"), 1 - (7 / 8) * (5 / 6) * (9 / 10)),
        (film(32, 48, 80), kinds.Grat(policy="grat", pattern="neighbours"), (22 / 64) * (16 / 36) * (28 / 100)),
        (WAN, kinds.Grat(policy="grat", pattern="neighbours"), 0.13),
    ],
)  # fmt: skip
def test_densities_are_the_published_ones(tokens, chosen, density):
    assert make_policy(chosen).density(tokens) == pytest.approx(density, abs=0.005)


def test_radial_scores_grow_like_n_log_n():
    policy = make_policy(kinds.Radial(policy="radial"))
    densities = [policy.density(film(latents, 30, 52)) for latents in (21, 42, 84, 168)]
    scores = [density * latents for density, latents in zip(densities, (21, 42, 84, 168), strict=True)]
    steps = np.diff(scores)
    assert densities == pytest.approx([0.51, 0.31, 0.18, 0.10], abs=0.01)
    assert steps.max() / steps.min() < 1.5  # a query's scores grow by the same at each doubling


# -------------------------------------------------------------------------------------------------- Sparse-vDiT's heads

DIAGONAL, MULTI, VERTICAL = (Pattern(mode=mode, window=window) for mode, window in WINDOW.items())


@pytest.mark.parametrize(("first", "count"), [(0, 6), (0, 3), (3, 3), (1, 1), (1, 4)])
def test_heads_of_a_rank_follow_the_profile_in_one_launch(vdit, first, count):
    patterns = (DIAGONAL, SKIP, MULTI, FULL, VERTICAL, DIAGONAL)
    policy = make_policy(vdit(*patterns))
    tokens = TokenMap(range(3, 6), range(2, 7), range(3, 6), 4, 5, 3, 2)
    draw = torch.Generator().manual_seed(1)
    q = torch.randn(2, tokens.num_queries, count, 16, generator=draw)
    k, v = torch.randn(2, 2, tokens.num_keys, count, 16, generator=draw)
    layout = layout_of(policy, replace(call_of(tokens), heads=Heads(tuple(range(first, first + count)), 6)))
    assert layout.group.tolist()[0] == [0, -1, 2, 1, 3, 0][first : first + count]
    out, lse = sparse_attention(q, k, v, layout)
    for head, pattern in enumerate(patterns[first : first + count]):
        if pattern == SKIP:
            assert (out[:, :, head] == 0).all() and (lse[:, :, head] == -math.inf).all()
        else:
            q_, k_, v_ = (x[:, :, head : head + 1] for x in (q, k, v))
            alone = reference.sparse_attention(q_, k_, v_, pattern_layout((pattern,), tokens, 16))
            assert torch.allclose(out[:, :, head].double(), alone[0][:, :, 0], atol=1e-5)


def test_a_layer_of_full_heads_is_dense(vdit):
    policy = make_policy(vdit(FULL, FULL, DIAGONAL))
    first, last = (replace(call_of(film(4, 4, 4)), heads=Heads((first, first + 1), 3)) for first in (0, 1))
    assert layout_of(policy, first) is None
    assert layout_of(policy, last) is not None
    assert make_policy(vdit(FULL, SKIP)).density(film(4, 4, 4)) == 0.5
    assert make_policy(vdit(SKIP)).density(film(4, 4, 4)) == 0


def test_a_profile_comes_back_from_its_file(tmp_path):
    profile = profile_of(DIAGONAL, SKIP, MULTI, FULL, layers=3, model='wan "1.3B": 0f3a\n')
    profile.write(tmp_path / "p.json")
    assert Profile.read(tmp_path / "p.json") == profile
    assert [file.name for file in tmp_path.iterdir()] == ["p.json"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"format": 1', '"format": 2', "p.json:2: format: must be 1, not 2"),
        ('"num_layers": 2', '"num_layers": 3', "p.json:1: layers holds 2, but num_layers is 3"),
        ('"num_heads": 2', '"num_heads": 1', "p.json:1: layer 0 holds 2 heads, but num_heads is 1"),
        ('"tile": 16', '"tile": 8', "p.json:6: tile: must be greater than or equal to 16, not 8"),
        ('"mode": "skip"', '"mode": "jump"', "mode: must be 'full', 'skip', 'diagonal'"),
        ('"model"', '"modle"', "unknown key 'modle': did you mean 'model'?"),
        ("{", "[", "is not valid YAML"),
    ],
)
def test_a_damaged_profile_is_refused_with_its_line(tmp_path, old, new, message):
    path = tmp_path / "p.json"
    profile_of(DIAGONAL, SKIP, layers=2).write(path)
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(InputError, match=re.escape(message)):
        Profile.read(path)


def test_a_missing_profile_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.json: cannot be read: No such file"):
        make_policy(kinds.SparseVdit(policy="sparse_vdit", profile=str(tmp_path / "none.json")))
    with pytest.raises(InputError, match="cannot be written"):
        profile_of(FULL).write(tmp_path / "no" / "p.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 4}, "x.json: is of a model with 2 layers, but this one has 4"),
        ({"num_heads": 12}, "x.json: is of a model with 3 heads, but this one has 12"),
        ({"model": "wan"}, "x.json: is the profile of 'm', but the model is 'wan'"),
    ],
)
def test_a_profile_of_another_model_is_refused(changes, message):
    profile = profile_of(FULL, SKIP, DIAGONAL, layers=2)
    profile.require("x.json", num_layers=2, num_heads=3, model="m")
    with pytest.raises(InputError, match=re.escape(message)):
        profile.require("x.json", **{"num_layers": 2, "num_heads": 3, **changes})


def test_the_policy_refuses_a_model_with_other_layers_or_heads(vdit):
    policy = make_policy(vdit(FULL, DIAGONAL))
    for call in (call_of(film(2, 2, 2), heads=2, num_layers=7), call_of(film(2, 2, 2), heads=4)):
        with pytest.raises(InputError, match="tune this one"):
            layout_of(policy, call)
