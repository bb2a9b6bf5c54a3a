"""What all policies hold that look at data: limits, what stays visible, memory, determinism, and heads apart."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from longvid.kernels.dense import attend
from longvid.sparsity.adaspa import AdaSpaPolicy
from longvid.sparsity.asa import AsaPolicy
from longvid.sparsity.crossover import pays
from longvid.sparsity.make import make_policy
from longvid.sparsity.policy import Heads
from longvid.sparsity.rettention import RettentionPolicy
from longvid.sparsity.runtime import SparseRuntime
from longvid.sparsity.settings import AdaSpa, Asa, Rettention, Svg2, SvgEar
from longvid.sparsity.svg2 import Svg2Policy
from longvid.sparsity.svg_ear import SvgEarPolicy
from longvid.sparsity.tokens import TokenMap

HEADS, STEPS = 4, 10

SQUARE = TokenMap(range(6), range(6), range(6), 8, 10)
CONTEXT = TokenMap(range(10, 14), range(9, 15), range(10, 14), 7, 9)
JOINT = TokenMap(range(2, 8), range(2, 8), range(3, 7), 7, 9, text_before=5, text_behind=11)
MAPS = {"square": SQUARE, "context": CONTEXT, "joint": JOINT}

POLICIES = {
    "adaspa": AdaSpaPolicy(AdaSpa(policy="adaspa", tile=16, sample_every=1)),
    "adaspa sampled": AdaSpaPolicy(AdaSpa(policy="adaspa", tile=32)),
    "svg2": Svg2Policy(Svg2(policy="svg2", first_iterations=5)),
    "svg_ear": SvgEarPolicy(SvgEar(policy="svg_ear", first_iterations=5)),
    "rettention": RettentionPolicy(Rettention(policy="rettention", tile=16, refresh_every=2, residual=False)),
    "rettention residual": RettentionPolicy(Rettention(policy="rettention", tile=16)),
    "asa": AsaPolicy(Asa(policy="asa", tile=16, sample=4)),
    "asa pooled": AsaPolicy(Asa(policy="asa", tile=16, sample=4, pooled=True)),
}

LIMITS = {
    "adaspa": AdaSpaPolicy(AdaSpa(policy="adaspa", sparsity=0)),
    "svg2": Svg2Policy(Svg2(policy="svg2", top_p=1, first_iterations=2)),
    "svg_ear": SvgEarPolicy(SvgEar(policy="svg_ear", top_p=1, first_iterations=2)),
    "rettention": RettentionPolicy(Rettention(policy="rettention", keep=1, residual=False)),
    "rettention residual": RettentionPolicy(Rettention(policy="rettention", keep=1)),
    "asa": AsaPolicy(Asa(policy="asa", tile=32, mass=1, max_keep=1)),
    "asa pooled": AsaPolicy(Asa(policy="asa", tile=32, mass=1, max_keep=1, pooled=True)),
}


pytestmark = pytest.mark.usefixtures("_small_clusters")
policies = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
maps = pytest.mark.parametrize("tokens", MAPS.values(), ids=MAPS)


@maps
@pytest.mark.parametrize("policy", LIMITS.values(), ids=LIMITS)
def test_at_full_density_every_policy_is_dense_attention(policy, tokens, film, run):
    films = [film(tokens, seed, batch=2) for seed in range(STEPS)]
    outs, layouts = run(policy, tokens, films)
    assert any(layout is not None for layout in layouts)
    for out, inputs in zip(outs, films, strict=True):
        torch.testing.assert_close(out, attend(*inputs), rtol=1e-5, atol=1e-5)


@maps
@policies
def test_text_and_context_stay_visible_and_no_row_is_empty(policy, tokens, film, run):
    _, layouts = run(policy, tokens, [film(tokens, seed, batch=2) for seed in range(STEPS)])
    sparse = [layout for layout in layouts if layout is not None]
    assert len(sparse) >= 3
    text_queries, global_keys = global_tokens(tokens)
    for layout in sparse:
        mask = token_mask(layout, tokens)
        assert mask.any(-1).all()
        assert mask[:, text_queries].all()
        assert mask[:, :, global_keys].all()
        assert not mask.all()


def global_tokens(tokens):
    """Text queries; and keys of text and of latents that the chunk does not own."""
    queries = torch.ones(tokens.num_queries, dtype=torch.bool)
    queries[tokens.text_before : tokens.num_queries - tokens.text_behind] = False
    keys = torch.ones(tokens.num_keys, dtype=torch.bool)
    for i, latent in enumerate(tokens.keys):
        if latent in tokens.own:
            first = tokens.text_before + i * tokens.per_latent
            keys[first : first + tokens.per_latent] = False
    return queries, keys


def token_mask(layout, tokens):
    mask = layout.mask()
    rows, cols = layout.q.block_of(tokens.num_queries), layout.k.block_of(tokens.num_keys)
    group = torch.arange(len(mask))[:, None, None]
    return mask[group, rows.expand(len(mask), -1)[:, :, None], cols.expand(len(mask), -1)[:, None, :]]


@policies
def test_memory_holds_tensors_that_nobody_writes_to(policy, film, attend_by):
    memory = {}
    for step in range(STEPS):
        kept = {name: (tensor, tensor.clone()) for name, tensor in memory.items()}
        attend_by(policy, film(JOINT, step), step, JOINT, memory)
        assert all(type(tensor) is torch.Tensor for tensor in memory.values())
        assert all(torch.equal(tensor, copy) for tensor, copy in kept.values())


@policies
def test_what_is_remembered_is_all_that_goes_on(policy, film, run, attend_by):
    """A run that is resumed by another process, from copies of its memory, gives the same bits."""
    films = [film(JOINT, seed) for seed in range(STEPS)]
    outs, _ = run(policy, JOINT, films)
    memory = {}
    for step, inputs in enumerate(films):
        memory = {name: tensor.clone() for name, tensor in memory.items()}
        fresh = type(policy)(policy.settings)
        out, _ = attend_by(fresh, inputs, step, JOINT, memory)
        assert torch.equal(out, outs[step])


@policies
def test_steps_before_and_layers_that_stay_dense_are_dense(policy, film, attend_by):
    settings = policy.settings.model_copy(update={"dense_steps": 0.5, "dense_layers": 0.5})
    policy, inputs = type(policy)(settings), film(JOINT)
    for layer in range(4):
        memory = {}
        layouts = [attend_by(policy, inputs, i, JOINT, memory, layer=layer)[1] for i in range(STEPS)]
        sparse = [i for i, layout in enumerate(layouts) if layout is not None]
        assert not sparse if layer < 2 else sparse and min(sparse) in (5, 6)
        assert not memory if layer < 2 else True


@policies
def test_heads_on_two_ranks_are_the_heads_on_one(policy, film, run):
    films = [film(JOINT, seed) for seed in range(STEPS)]
    whole, _ = run(policy, JOINT, films)
    gather = Meeting(2)

    def rank(first):
        heads = Heads(tuple(range(first, first + HEADS // 2)), HEADS, lambda x: gather(first, x))
        mine = [tuple(x[:, :, first : first + HEADS // 2] for x in inputs) for inputs in films]
        return run(type(policy)(policy.settings), JOINT, mine, heads)[0]

    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(rank, (0, HEADS // 2)))
    for out, *halves in zip(whole, *parts, strict=True):
        torch.testing.assert_close(torch.cat(halves, 2), out, rtol=1e-5, atol=1e-5)


class Meeting:
    """All-gather between threads."""

    def __init__(self, size):
        self.barrier, self.values = threading.Barrier(size, timeout=120), {}

    def __call__(self, place, x):
        self.values[place] = x
        self.barrier.wait()
        result = torch.cat([self.values[place] for place in sorted(self.values)])
        self.barrier.wait()
        return result


@maps
@policies
def test_the_expected_density_is_a_share_and_that_of_budgets_is_met(policy, tokens, film, run):
    expected = policy.density(tokens)
    assert 0 < expected <= 1
    if isinstance(policy, AdaSpaPolicy | RettentionPolicy):
        _, layouts = run(policy, tokens, [film(tokens, seed) for seed in range(STEPS)])
        found = next(layout for layout in layouts if layout is not None).density()
        assert found == pytest.approx(expected, abs=0.08)


@pytest.mark.parametrize("backend", ["cpu", "gather", "triton"])
def test_the_crossover_counts_what_choosing_takes(backend):
    assert pays(backend, 4096, 4096, 0.2, 0.1) and not pays(backend, 4096, 4096, 0.2, 0.75)


def test_short_clips_are_dense_where_choosing_takes_longer_than_it_saves(monkeypatch):
    monkeypatch.undo()  # clusters as they are
    maps = [TokenMap(range(n), range(n), range(n), n, n) for n in (8, 16, 20)]
    for policy in (Svg2(policy="svg2"), SvgEar(policy="svg_ear"), Asa(policy="asa"), AdaSpa(policy="adaspa")):
        shares = [make_policy(policy).choosing(tokens) for tokens in maps]
        assert shares == sorted(shares, reverse=True) and 0 < shares[-1] < 0.25
    runtime = SparseRuntime(SvgEarPolicy(SvgEar(policy="svg_ear")), num_layers=8, num_steps=50)
    assert [runtime.pays(tokens, torch.device("cpu")) for tokens in maps] == [False, True, True]


def test_half_precision_comes_back_as_it_came(film, run):
    for policy in POLICIES.values():
        films = [tuple(x.bfloat16() for x in film(JOINT, seed)) for seed in range(STEPS)]
        for out, inputs in zip(run(policy, JOINT, films)[0], films, strict=True):
            assert out.dtype == torch.bfloat16
            error = (out.float() - attend(*(x.float() for x in inputs))).square().mean()
            assert math.isfinite(error) and error < 2
