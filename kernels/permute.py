"""Tokens gathered in clusters: deterministic k-means, and the blocks that clusters make.

Shapes: B batch, H heads, T tokens, D of a head, N clusters, G = B · H.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longvid.kernels import cluster_cpu, native
from longvid.kernels.layout import Blocks

CPU_SLAB, GPU_SLAB = 1 << 20, 1 << 28
"""Distances that are in memory at once; on a CPU they are to stay in its cache."""


def kmeans(
    x_BTHD: Tensor, centroids_BHND: Tensor | None, num_clusters: int, iterations: int, *, sample_every: int = 1
) -> tuple[Tensor, Tensor]:
    """Each token's cluster, int64 [B, H, T], and the centroids, fp32 [B, H, N, D]; every head on its own.

    From the centroids of before, or from evenly spaced tokens (None). Nothing is drawn, so that equal inputs give equal
    clusters. With an iteration or more, centroids are the means of their tokens; an empty cluster's stays. All
    iterations but the last look at every `sample_every`-th token alone. Needs a token at least.
    """
    centroids = spaced_tokens(x_BTHD, num_clusters) if centroids_BHND is None else centroids_BHND
    if sample_every > 1 and iterations > 1:
        some = x_BTHD[:, sample_every // 2 :: sample_every]
        if some.shape[1]:
            centroids, iterations = kmeans(some, centroids, num_clusters, iterations - 1)[1], 1
    if x_BTHD.device.type == "cpu" and native.is_available():
        labels, moved = cluster_cpu.kmeans(x_BTHD, centroids, iterations)
        return labels, moved if iterations else centroids
    if iterations == 0:
        return nearest_centroid(x_BTHD, centroids), centroids
    for _ in range(iterations):
        labels, centroids = lloyd_step(x_BTHD, centroids)
    return labels, centroids


def spaced_tokens(x_BTHD: Tensor, num_clusters: int) -> Tensor:
    """Evenly spaced tokens as first centroids, fp32 [B, H, N, D]."""
    num_tokens = x_BTHD.shape[1]
    middle = (2 * torch.arange(num_clusters, device=x_BTHD.device) + 1) * num_tokens // (2 * num_clusters)
    return x_BTHD[:, middle].transpose(1, 2).float().contiguous()


def lloyd_step(x_BTHD: Tensor, centroids_BHND: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens to their nearest centroids, then centroids to the means of their tokens; empty ones stay."""
    labels = nearest_centroid(x_BTHD, centroids_BHND)
    num_clusters = centroids_BHND.shape[2]
    sums, sizes = cluster_sums(x_BTHD, labels, num_clusters), cluster_sizes(labels, num_clusters)
    means = sums / sizes[..., None].clamp(min=1)
    return labels, torch.where(sizes[..., None] > 0, means, centroids_BHND)


def nearest_centroid(x_BTHD: Tensor, centroids_BHND: Tensor) -> Tensor:
    """The centroid at the smallest Euclidean distance of each token, int64 [B, H, T]."""
    batch, num_tokens, num_heads, head_dim = x_BTHD.shape
    centroids = centroids_BHND.flatten(0, 1)
    # |x - c|² / 2 less |x|² / 2, which is the same for all centroids.
    half_squares = centroids.square().sum(-1)[:, None, :] / 2
    x_GTD = x_BTHD.transpose(1, 2).reshape(batch * num_heads, num_tokens, head_dim)
    limit = CPU_SLAB if x_BTHD.device.type == "cpu" else GPU_SLAB
    slabs = x_GTD.split(max(1, limit // max(1, half_squares.numel())), dim=1)
    # `min` finds the index faster than `argmin`.
    nearest = [torch.baddbmm(half_squares, x.float(), centroids.mT, alpha=-1).min(-1).indices for x in slabs]
    return torch.cat(nearest, 1).view(batch, num_heads, num_tokens)


def cluster_sums(x_BTHD: Tensor, labels_BHT: Tensor, num_clusters: int) -> Tensor:
    """The sum of each cluster's tokens, fp32 [B, H, N, D]; the same in every run."""
    # The faster one on a CPU. On a GPU `index_add_` adds in any order, and segments do not.
    sums = _sums_by_index if x_BTHD.device.type == "cpu" else _sums_by_segment
    return sums(x_BTHD, labels_BHT, num_clusters)


def _sums_by_index(x_BTHD: Tensor, labels_BHT: Tensor, num_clusters: int) -> Tensor:
    batch, num_heads, _ = labels_BHT.shape
    head_dim = x_BTHD.shape[3]
    first = torch.arange(batch * num_heads, device=x_BTHD.device).view(batch, num_heads, 1) * num_clusters
    rows = (labels_BHT + first).transpose(1, 2).reshape(-1)  # in the order of x
    sums = x_BTHD.new_zeros(batch * num_heads * num_clusters, head_dim, dtype=torch.float32)
    sums.index_add_(0, rows, x_BTHD.reshape(-1, head_dim).float())
    return sums.view(batch, num_heads, num_clusters, head_dim)


def _sums_by_segment(x_BTHD: Tensor, labels_BHT: Tensor, num_clusters: int) -> Tensor:
    order = labels_BHT.argsort(dim=-1, stable=True)[..., None]
    in_order = x_BTHD.transpose(1, 2).take_along_dim(order, 2).float()
    sizes = cluster_sizes(labels_BHT, num_clusters)
    return torch.segment_reduce(in_order, "sum", lengths=sizes, axis=2, unsafe=True, initial=0.0)


def cluster_blocks(labels_BHT: Tensor, num_clusters: int) -> Blocks:
    """Clusters as blocks, for each head of each batch entry its own: group b · H + h.

    A block's tokens keep their order. Empty clusters are empty blocks.
    """
    labels = labels_BHT.flatten(0, 1)
    if labels.device.type == "cpu" and native.is_available():
        return cluster_cpu.blocks_of(labels, num_clusters)
    in_order, order = labels.sort(dim=-1, stable=True)
    names = torch.arange(num_clusters + 1, device=labels.device).expand(len(labels), -1).contiguous()
    return Blocks(torch.searchsorted(in_order, names).int(), order.int())


def cluster_sizes(labels: Tensor, num_clusters: int) -> Tensor:
    """How many tokens each cluster has, int64 [..., N], from their labels [..., T]."""
    counts = labels.new_zeros(*labels.shape[:-1], num_clusters)
    return counts.scatter_add_(-1, labels, torch.ones_like(labels))
