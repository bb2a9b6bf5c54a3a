"""Sparse VideoGen 2 keeps the heavy pairs of clusters; SVG-EAR sees the others by their centroids."""

import gc
import math
from dataclasses import replace

import pytest
import torch

from longvid.kernels import cluster_cpu, native, reference
from longvid.kernels.dense import attend
from longvid.kernels.dispatch import sparse_attention
from longvid.kernels.layout import even_blocks, make_layout, one_group
from longvid.kernels.merge import merge_partials
from longvid.kernels.permute import cluster_blocks, cluster_sizes, cluster_sums
from longvid.sparsity.settings import Svg2, SvgEar
from longvid.sparsity.skipped import attend_skipped, block_means, with_skipped
from longvid.sparsity.svg2 import Clusters, Svg2Policy, cluster_count
from longvid.sparsity.svg_ear import MAX_EXPONENT, SvgEarPolicy, errors, log_error
from longvid.sparsity.tokens import TokenMap

JOINT = TokenMap(range(2, 8), range(2, 8), range(3, 7), 7, 9, text_before=5, text_behind=11)
FILM = TokenMap(range(6), range(6), range(6), 10, 12)

pytestmark = pytest.mark.usefixtures("_small_clusters")


def make(policy=Svg2Policy, **changes):
    settings = {Svg2Policy: Svg2, SvgEarPolicy: SvgEar}[policy]
    name = {Svg2Policy: "svg2", SvgEarPolicy: "svg_ear"}[policy]
    return policy(settings(policy=name, **{"first_iterations": 5, "sample_every": 1, **changes}))


def tokens_of(blocks, num_tokens, group):
    block = blocks.block_of(num_tokens)
    return [(block[group] == n).nonzero()[:, 0] for n in range(blocks.num_blocks)]


def clusters(x, labels, num_clusters):
    blocks = cluster_blocks(labels, num_clusters)
    sizes = cluster_sizes(labels, num_clusters)
    return Clusters(x, labels, block_means(x, blocks), sizes, blocks)


def test_pairs_are_kept_by_the_mass_of_their_centroids(film, attend_by):
    q, k, v = film(JOINT, batch=2)
    memory = {}
    _, layout = attend_by(make(top_p=0.8, min_keep=0.2), (q, k, v), 5, JOINT, memory)
    mask = layout.mask()
    for group in range(8):
        b, h = divmod(group, 4)
        q_tokens, k_tokens = tokens_of(layout.q, len(q[0]), group), tokens_of(layout.k, len(k[0]), group)
        num_q, num_k = len(q_tokens) - 1, len(k_tokens) - 1
        assert q_tokens[-1].tolist() == [*range(5), *range(len(q[0]) - 11, len(q[0]))]
        assert k_tokens[-1].tolist() == [*range(5 + 63), *range(5 + 5 * 63, len(k[0]))]
        means = torch.stack([k[b, n, h].mean(0) if len(n) else torch.zeros(16) for n in k_tokens[:-1]])
        sizes = torch.tensor([len(n) for n in k_tokens[:-1]])
        for row in range(num_q):
            if len(q_tokens[row]):
                scores = means @ q[b, q_tokens[row], h].mean(0) / 4
                weights = (sizes * scores.double().exp()) / (sizes * scores.double().exp()).sum()
                chosen, others = weights[mask[group, row, :-1]], weights[~mask[group, row, :-1]]
                assert chosen.min() >= others.max() - 1e-6
                assert chosen.sum() >= 0.8 - 1e-5 and len(chosen) >= 0.2 * num_k
                assert chosen.sum() - chosen.min() < 0.8 or len(chosen) == math.ceil(0.2 * num_k)


def test_clusters_go_on_from_those_of_the_last_step(film, attend_by, monkeypatch):
    """With the same tokens, two iterations a step are as many in one go."""
    memory, policy = {}, make(first_iterations=3, iterations=2)
    inputs = film(JOINT)
    for step in (2, 3, 4):
        attend_by(policy, inputs, step, JOINT, memory)
    at_once = {}
    attend_by(make(first_iterations=7), inputs, 2, JOINT, at_once)
    assert set(memory) == {"q_centroids", "k_centroids"}
    for name, centroids in memory.items():
        assert centroids.dtype == torch.float32
        assert torch.equal(centroids, at_once[name])


def test_few_tokens_have_few_clusters():
    assert cluster_count(1000, 75600, 64) == 1000
    assert cluster_count(1000, 6400, 64) == 100
    assert cluster_count(1000, 10, 64) == 1


def test_centroids_of_skipped_clusters_join_the_softmax(film, attend_by):
    """SVG-EAR is one attention over the keys and the centroids, which have the bias log n."""
    q, k, v = film(JOINT, batch=2)
    out, layout = attend_by(make(SvgEarPolicy, top_p=0.5), (q, k, v), 5, JOINT, {})
    assert layout.density() < 0.7
    mask = layout.mask()
    for group in range(8):
        b, h = divmod(group, 4)
        k_tokens = tokens_of(layout.k, len(k[0]), group)
        full = [n for n in range(len(k_tokens)) if len(k_tokens[n])]
        keys, values = (
            torch.cat([x[b, :, h], torch.stack([x[b, k_tokens[n], h].mean(0) for n in full])]).double() for x in (k, v)
        )
        seen = mask[group][layout.q.block_of(len(q[0]))[group]]
        bias = torch.tensor([len(k_tokens[n]) for n in full]).double().log()
        exact = torch.zeros(seen.shape[0], len(k[0])).double()
        exact.masked_fill_(~seen[:, layout.k.block_of(len(k[0]))[group]], -math.inf)
        scores = q[b, :, h].double() @ keys.T / 4
        scores = scores + torch.cat([exact, bias.masked_fill(seen[:, full], -math.inf)], 1)
        torch.testing.assert_close(out[b, :, h].double(), scores.softmax(-1) @ values, rtol=1e-5, atol=1e-5)


def test_nothing_skipped_weighs_nothing(film, attend_by):
    q, k, v = film(JOINT)
    _, layout = attend_by(make(), (q, k, v), 5, JOINT, {})
    everything = make_layout(layout.q, layout.k, torch.ones_like(layout.mask()), layout.group)
    means = torch.randn(2, 1, 4, layout.k.num_blocks, 16)
    out, lse = attend_skipped(q, *means, everything)
    assert out.isfinite().all() and (lse == -math.inf).all()


def test_slabs_of_queries_do_not_change_what_is_skipped(film, attend_by, monkeypatch):
    q, k, v = film(JOINT)
    _, layout = attend_by(make(), (q, k, v), 5, JOINT, {})
    means = torch.randn(2, 1, 4, layout.k.num_blocks, 16, generator=torch.Generator().manual_seed(0))
    whole = attend_skipped(q, *means, layout)
    monkeypatch.setattr("longvid.sparsity.skipped.CPU_SLAB", 5000)
    for part, expected in zip(attend_skipped(q, *means, layout), whole, strict=True):
        torch.testing.assert_close(part, expected)


@pytest.mark.skipif(not native.is_available(), reason="the C++ kernels were not built")
@pytest.mark.parametrize("policy", [Svg2Policy, SvgEarPolicy])
def test_the_c_plus_plus_chooses_and_corrects_as_torch_does(policy, film, attend_by, monkeypatch):
    inputs = film(JOINT, batch=2, noise=0.6)
    out, layout = attend_by(make(policy), inputs, 5, JOINT, {})
    monkeypatch.setattr(native, "is_available", lambda: False)
    expected, same = attend_by(make(policy), inputs, 5, JOINT, {})
    assert torch.equal(layout.mask(), same.mask())
    assert torch.equal(layout.q.order, same.q.order) and torch.equal(layout.k.order, same.k.order)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not native.is_available(), reason="the C++ kernels were not built")
def test_every_variant_sees_the_same_errors_and_means(film, attend_by):
    q, k, v = film(JOINT, batch=2)
    partial = attend_by(make(), (q, k, v), 5, JOINT, {})
    layout = partial[1]
    partial = sparse_attention(q, k, v, layout)
    k_mean, v_mean = block_means(k, layout.k), block_means(v, layout.k)
    expected, _ = merge_partials(*partial, *attend_skipped(q, k_mean, v_mean, layout))
    keys = clusters(k, layout.k.block_of(k.shape[1]).view(2, 4, -1), layout.k.num_blocks)
    centroids = 0.5 * torch.randn(2, 4, 45, 16, generator=torch.Generator().manual_seed(0))
    means = tuple(
        cluster_sums(x, keys.labels_BHT, layout.k.num_blocks) / keys.sizes_BHN.clamp(min=1)[..., None] for x in (k, v)
    )
    for isa in native.ISAS[: native.ISAS.index(native.isa()) + 1]:
        for x, mean in zip((k, v), means, strict=True):
            torch.testing.assert_close(cluster_cpu.block_means(x, layout.k, isa), mean)
        for every in (1, 3):
            sums = errors(keys, v, means, centroids, every)
            args = k, v, layout.k, means, centroids
            found = cluster_cpu.errors(*args, limit=MAX_EXPONENT, sample_every=every, isa=isa)
            torch.testing.assert_close(found, sums, rtol=1e-4, atol=1e-4)
        before = partial[0].clone(), partial[1]
        out = cluster_cpu.attend_skipped(q, k_mean, v_mean, before, layout, 1 / math.sqrt(16), isa)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not native.is_available(), reason="the C++ kernels were not built")
def test_rows_that_skip_nothing_and_rows_that_see_nothing():
    q, k, v = torch.randn(3, 1, 6, 1, 8, generator=torch.Generator().manual_seed(0)).unbind()
    blocks = even_blocks(6, 3)
    layout = make_layout(blocks, blocks, torch.tensor([[[True, True], [False, False]]]), one_group(1))
    partial = sparse_attention(q, k, v, layout)
    out = with_skipped(q, k, v, partial, layout)
    torch.testing.assert_close(out[:, :3], partial[0][:, :3])
    means = [x.view(1, 2, 3, 1, 8).mean(2) for x in (k, v)]
    torch.testing.assert_close(out[:, 3:], attend(q[:, 3:], *means))


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_the_error_of_a_centroid_is_that_of_its_definition(scale):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 8, generator=generator) for n in (20, 40, 40))
    k = k * scale
    labels = torch.randint(0, 5, (2, 3, 40), generator=generator)
    centroids = torch.randn(2, 3, 4, 8, generator=generator)
    queries = replace(clusters(q, torch.zeros(2, 3, 20).long(), 4), centroids_BHND=centroids)
    keys = clusters(k, labels, 6)  # the last is empty
    found = log_error(queries, keys, v, (keys.centroids_BHND, block_means(v, keys.blocks)))
    for b in range(2):
        for h in range(3):
            for j in range(5):
                ks, vs = (x[b, labels[b, h] == j, h].double() for x in (k, v))
                for c in range(4):
                    centroid = centroids[b, h, c].double() / math.sqrt(8)
                    wrong = (ks @ centroid).exp()[:, None] * vs - (ks.mean(0) @ centroid).exp() * vs.mean(0)
                    assert found[b, h, c, j].item() == pytest.approx(wrong.square().sum().log().item(), abs=1e-3)
    assert found[..., 5].isfinite().all() and (found[..., 5] < found[..., :5].amin()).all()


def test_far_scores_do_not_overflow():
    q, k, v = (torch.full((1, 4, 1, 8), x) for x in (100.0, 1.0, 1.0))
    k = k * torch.tensor([100.0, -100.0, 50.0, 0.0])[None, :, None, None]
    queries, keys = (clusters(x, torch.zeros(1, 1, 4).long(), 1) for x in (q, k))
    assert log_error(queries, keys, v, (keys.centroids_BHND, block_means(v, keys.blocks))).isfinite().all()


@pytest.mark.parametrize("top_p", [0.5, 0.7, 0.9])
def test_centroids_bring_the_output_nearer_to_dense_at_no_more_density(film, attend_by, top_p):
    inputs = film(FILM, noise=0.6)
    dense = attend(*inputs)
    plain, plain_layout = attend_by(make(top_p=top_p), inputs, 5, FILM, {})
    ear, ear_layout = attend_by(make(SvgEarPolicy, top_p=top_p), inputs, 5, FILM, {})
    assert ear_layout.density() <= plain_layout.density() + 0.02
    plain_error, ear_error = ((out - dense).square().mean() for out in (plain, ear))
    assert ear_error < 0.5 * plain_error


def test_samples_of_the_tokens_are_enough(film, attend_by, monkeypatch):
    """With clusters of a published size, clusters and errors from every third token are as good as from all."""
    monkeypatch.setattr("longvid.sparsity.svg2.QUERIES_A_CLUSTER", 64)
    monkeypatch.setattr("longvid.sparsity.svg2.KEYS_A_CLUSTER", 48)
    steps = [film(FILM, seed, noise=0.5) for seed in range(3)]
    for policy in (Svg2Policy, SvgEarPolicy):
        errors = []
        for every in (1, SvgEar(policy="svg_ear").sample_every):
            some, memory = make(policy, top_p=0.6, sample_every=every), {}
            outs = [attend_by(some, inputs, 5 + i, FILM, memory)[0] for i, inputs in enumerate(steps)]
            dense = [attend(*inputs) for inputs in steps]
            errors.append(sum((out - exact).square().mean() for out, exact in zip(outs, dense, strict=True)))
        assert errors[1] < 1.1 * errors[0]


def test_the_means_of_a_step_serve_its_correction_and_go_with_its_layout(film, attend_by):
    inputs = film(JOINT, batch=2)
    policy = make(SvgEarPolicy, top_p=0.5)
    out, layout = attend_by(policy, inputs, 5, JOINT, {})
    assert len(policy._means) == 1
    again = with_skipped(*inputs, sparse_attention(*inputs, layout), layout)
    torch.testing.assert_close(out, again, rtol=1e-5, atol=1e-5)
    del layout
    gc.collect()
    assert not policy._means


def test_without_iterations_skipped_clusters_still_count_as_their_means(film, attend_by):
    memory, policy = {}, make(SvgEarPolicy, top_p=0.5, iterations=0)
    attend_by(policy, film(JOINT, 0), 5, JOINT, memory)
    inputs = film(JOINT, 1)
    out, layout = attend_by(policy, inputs, 6, JOINT, memory)
    torch.testing.assert_close(
        out, with_skipped(*inputs, sparse_attention(*inputs, layout), layout), rtol=1e-5, atol=1e-5
    )


def test_choosing_by_error_beats_choosing_by_mass_with_the_same_centroids(film, attend_by):
    """When both see the others' centroids, SVG-EAR's choice of clusters is better than the heaviest clusters."""
    inputs = film(FILM, noise=0.6)
    dense = attend(*inputs)
    policy, by_mass = make(SvgEarPolicy, top_p=0.6), make(top_p=0.6)
    by_mass.finish = policy.finish
    errors = [(attend_by(p, inputs, 5, FILM, {})[0] - dense).square().mean() for p in (policy, by_mass)]
    assert errors[0] < errors[1]


def test_the_layout_is_block_sparse_attention_of_clusters(film, attend_by):
    inputs = film(JOINT, batch=2)
    out, layout = attend_by(make(), inputs, 5, JOINT, {})
    expected, _ = reference.sparse_attention(*inputs, layout)
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, sparse_attention(*inputs, layout, backend="gather")[0], rtol=1e-5, atol=1e-5)
