"""k-means is Lloyd's, deterministic, and gives blocks that hold their tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longvid.kernels import cluster_cpu, native, permute, reference
from longvid.kernels.permute import (
    cluster_blocks,
    cluster_sizes,
    kmeans,
    lloyd_step,
    nearest_centroid,
    spaced_tokens,
)


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 1000), tokens=st.integers(1, 40), clusters=st.integers(1, 9))
def test_the_nearest_centroid_is_the_nearest(seed, tokens, clusters):
    x, centroids = random(seed, 2, tokens, 3, 8), random(seed + 1, 2, 3, clusters, 8)
    assert torch.equal(nearest_centroid(x, centroids), reference.nearest_centroid(x, centroids))


def test_slabs_do_not_change_the_nearest(monkeypatch):
    x, centroids = random(0, 2, 50, 3, 8), random(1, 2, 3, 7, 8)
    whole = nearest_centroid(x, centroids)
    monkeypatch.setattr("longvid.kernels.permute.CPU_SLAB", 100)
    assert torch.equal(nearest_centroid(x, centroids), whole)


@given(seed=st.integers(0, 1000), tokens=st.integers(1, 40), clusters=st.integers(1, 9))
def test_a_step_moves_centroids_to_the_means_of_their_tokens(seed, tokens, clusters):
    x, before = random(seed, 2, tokens, 3, 8), random(seed + 1, 2, 3, clusters, 8)
    labels, after = lloyd_step(x, before)
    for b in range(2):
        for h in range(3):
            for n in range(clusters):
                members = x[b, labels[b, h] == n, h]
                expected = members.mean(0) if len(members) else before[b, h, n]
                torch.testing.assert_close(after[b, h, n], expected)


built = pytest.mark.skipif(not native.is_available(), reason="the C++ kernels were not built")


def variants():
    return native.ISAS[: native.ISAS.index(native.isa()) + 1]


@built
@pytest.mark.parametrize(("tokens", "dim", "clusters"), [(1, 8, 1), (300, 80, 7), (257, 21, 40), (130, 128, 130)])
def test_the_c_plus_plus_step_is_torch_s(tokens, dim, clusters):
    x = random(3, 2, 3, tokens, dim).transpose(1, 2)
    x[:, tokens // 2] = x[:, 0]  # tokens that are alike go together
    centroids = spaced_tokens(x, clusters) + 0.3 * random(4, 2, 3, clusters, dim)
    labels, means = lloyd_step(x, centroids)
    assert torch.equal(labels, reference.nearest_centroid(x, centroids))
    for isa in variants():
        before = centroids.clone()
        found, moved = cluster_cpu.kmeans(x, before, 1, isa)
        assert torch.equal(found, labels) and torch.equal(before, centroids)
        torch.testing.assert_close(moved, means)
        twice, _ = cluster_cpu.kmeans(x, before, 2, isa)
        assert torch.equal(twice, cluster_cpu.kmeans(x, moved, 0, isa)[0])


@built
def test_the_matrix_units_find_the_nearest_of_many_as_well_as_fp32():
    """Where the labels differ, rounding decides: the distances are equal to its precision."""
    x = random(5, 1, 3000, 2, 64) * 3
    centroids = spaced_tokens(x, 200) + random(6, 1, 2, 200, 64)
    for isa in variants():
        labels, _ = cluster_cpu.kmeans(x, centroids, 0, isa)
        distance = torch.cdist(x.transpose(1, 2).double(), centroids.double())
        excess = distance.gather(-1, labels[..., None])[..., 0] / distance.amin(-1) - 1
        assert excess.max() < 1e-6 and (excess > 0).double().mean() < 0.001


@built
def test_a_head_that_is_done_stays_while_others_go_on():
    """The second head's tokens are their own centroids; the first's take some iterations."""
    x = torch.stack([random(8, 400, 8), random(9, 5, 8).repeat(80, 1)], 1)[None]
    found = cluster_cpu.kmeans(x, spaced_tokens(x, 5), 40)
    centroids = spaced_tokens(x, 5)
    for _ in range(40):
        labels, centroids = lloyd_step(x, centroids)
    assert torch.equal(found[0], labels)
    torch.testing.assert_close(found[1], centroids)


@built
def test_equal_centroids_give_the_first_and_nan_stays_inside():
    x = random(3, 1, 50, 1, 8)
    same = x.mean(1).expand(1, 1, 40, 8)
    for isa in variants():
        assert (cluster_cpu.kmeans(x, same, 0, isa)[0] == 0).all()
        labels, centroids = cluster_cpu.kmeans(x * torch.nan, same, 1, isa)
        assert (labels == 0).all() and centroids[0, 0, 0].isnan().all()
        assert torch.equal(centroids[:, :, 1:], same[:, :, 1:])


@built
def test_labels_that_name_no_cluster_are_refused():
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match="point outside"):
            cluster_blocks(torch.tensor([[[0, wrong, 1]]]), 3)


@pytest.mark.parametrize("is_built", [True, False])
def test_iterations_only_bring_tokens_closer(monkeypatch, is_built):
    is_available = is_built and native.is_available()
    monkeypatch.setattr(native, "is_available", lambda: is_available)
    x = random(0, 1, 300, 2, 8)
    spread = []
    for iterations in (1, 2, 5, 20):
        labels, centroids = kmeans(x, None, 12, iterations)
        own = centroids.gather(2, labels[..., None].expand(-1, -1, -1, 8))
        spread.append((x.transpose(1, 2) - own).square().sum().item())
    assert spread == sorted(spread, reverse=True)


def test_iterations_from_the_centroids_of_before_go_on_where_those_ended():
    x = random(0, 2, 100, 2, 8)
    _, halfway = kmeans(x, None, 6, 3)
    for result, expected in zip(kmeans(x, halfway, 6, 2), kmeans(x, None, 6, 5), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("is_built", [True, False])
def test_iterations_on_samples_end_with_one_on_all_tokens(monkeypatch, is_built):
    is_available = is_built and native.is_available()
    monkeypatch.setattr(native, "is_available", lambda: is_available)
    x = random(0, 2, 601, 2, 8)
    found = kmeans(x, None, 6, 4, sample_every=3)
    sampled = kmeans(x[:, 1::3], spaced_tokens(x, 6), 6, 3)[1]
    for result, expected in zip(found, kmeans(x, sampled, 6, 1), strict=True):
        assert torch.equal(result, expected)
    alone = kmeans(x[:, :1], None, 1, 4, sample_every=3)  # there is nothing to sample
    assert (alone[0] == 0).all() and torch.equal(alone[1], x[:, :1].transpose(1, 2))


@built
def test_parts_of_the_tokens_add_up_and_threads_change_nothing():
    """More tokens than one thread takes at a time: their sums are added up in one order."""
    x = random(7, 1, 2000, 3, 16)
    centroids = spaced_tokens(x, 9)
    labels, means = lloyd_step(x, centroids)
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(cluster_cpu.kmeans(x, centroids, 2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    found, moved = cluster_cpu.kmeans(x, centroids, 1)
    assert torch.equal(found, labels)
    torch.testing.assert_close(moved, means)


def test_without_iterations_tokens_go_to_the_centroids_as_they_are():
    x, centroids = random(0, 1, 20, 2, 8), random(1, 1, 2, 4, 8)
    labels, same = kmeans(x, centroids, 4, 0)
    assert same is centroids and torch.equal(labels, reference.nearest_centroid(x, centroids))


def test_heads_do_not_know_of_each_other():
    x = random(0, 2, 60, 4, 8)
    labels, centroids = kmeans(x, None, 5, 4)
    for h in range(4):
        alone, alone_centroids = kmeans(x[:, :, h : h + 1], None, 5, 4)
        assert torch.equal(alone, labels[:, h : h + 1])
        torch.testing.assert_close(alone_centroids, centroids[:, h : h + 1])


def test_half_precision_is_clustered_in_fp32():
    x = random(0, 1, 40, 2, 8).bfloat16()
    labels, centroids = kmeans(x, None, 5, 3)
    expected_labels, expected = kmeans(x.float(), None, 5, 3)
    assert torch.equal(labels, expected_labels) and torch.equal(centroids, expected)


@pytest.mark.parametrize(("tokens", "clusters"), [(10, 5), (7, 7), (9, 2), (5, 1)])
def test_first_centroids_are_evenly_spaced_tokens(tokens, clusters):
    x = torch.arange(tokens, dtype=torch.float32).view(1, tokens, 1, 1)
    first = spaced_tokens(x, clusters).flatten()
    assert len(first.unique()) == clusters
    assert first.diff().max() - first.diff().min() <= 1 if clusters > 1 else first == tokens // 2


@given(seed=st.integers(0, 1000), tokens=st.integers(1, 40), clusters=st.integers(1, 9))
def test_blocks_hold_the_tokens_of_their_cluster_in_order(seed, tokens, clusters):
    labels = torch.randint(0, clusters, (2, 3, tokens), generator=torch.Generator().manual_seed(seed))
    blocks = cluster_blocks(labels, clusters)
    assert blocks.offsets.dtype == blocks.order.dtype == torch.int32
    assert torch.equal(blocks.block_of(tokens), labels.flatten(0, 1))
    for group in range(6):
        for start, stop in zip(blocks.offsets[group], blocks.offsets[group, 1:], strict=False):
            assert (blocks.order[group, start:stop].diff() > 0).all()


@pytest.mark.parametrize("cluster_sums", [permute.cluster_sums, permute._sums_by_index, permute._sums_by_segment])
def test_sums_by_cluster(cluster_sums):
    x, labels = random(0, 2, 30, 3, 4), torch.randint(0, 5, (2, 3, 30), generator=torch.Generator().manual_seed(1))
    sums, sizes = cluster_sums(x, labels, 5), cluster_sizes(labels, 5)
    member = torch.nn.functional.one_hot(labels, 5).float()
    torch.testing.assert_close(sums, torch.einsum("bhtn,bthd->bhnd", member, x))
    assert torch.equal(sizes, member.sum(2).long())
