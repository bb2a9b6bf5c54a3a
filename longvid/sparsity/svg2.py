"""Sparse VideoGen 2: queries and keys in clusters of their own, and the pairs of clusters that hold most of the mass.

arXiv 2505.18875. Shapes: B batch, L queries, T keys, H heads of this rank, D of a head, R query clusters,
C key clusters, G = B · H.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from longvid.kernels.dense import Partial
from longvid.kernels.layout import BlockLayout, Blocks, make_layout, own_groups
from longvid.kernels.permute import cluster_blocks, kmeans
from longvid.kernels.select import top_p
from longvid.sparsity.policy import Call, Memory, is_left_dense
from longvid.sparsity.settings import Svg2
from longvid.sparsity.tiles import density_of, latent_queries, own_keys, share_of_mass, share_of_tokens
from longvid.sparsity.tokens import TokenMap

QUERIES_A_CLUSTER, KEYS_A_CLUSTER = 128, 64
"""What a cluster has on average at the least. The published counts are for some 75,000 tokens: 250 and 75 a cluster.

Smaller clusters need fewer scores for the same mass, but finding them takes longer than that saves.
"""

TOKEN_SCORES = 60
"""Scores of attention that take as long as reading, ordering and choosing for one token, as measured on a CPU."""


@dataclass(frozen=True)
class Clusters:
    """Tokens of every head in N clusters."""

    x_BTHD: Tensor
    labels_BHT: Tensor
    centroids_BHND: Tensor
    """fp32"""
    sizes_BHN: Tensor
    """Tokens of each, int64."""
    blocks: Blocks
    """The same tokens in the order of their clusters, of every head."""


class Svg2Policy:
    """Clusters anew at every sparse step, from the centroids of the last.

    Queries of latents and own keys are in clusters; text queries are a block that sees all, and keys of text and
    context a block that all see. Memory: `q_centroids` and `k_centroids`, fp32 [B, H, N, D].
    """

    data_dependent = True

    def __init__(self, settings: Svg2) -> None:
        self.settings = settings

    def layout(self, q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, call: Call) -> BlockLayout | None:
        """The pairs of clusters that this step's q and k choose."""
        if is_left_dense(call, self.settings):
            return None
        queries, keys = self.cluster(q_BLHD, k_BTHD, call)
        return lay_out(queries, keys, self.choose(queries, keys), call.tokens)

    def finish(
        self,
        q_BLHD: Tensor,
        k_BTHD: Tensor,
        v_BTHD: Tensor,
        partial: Partial,
        layout: BlockLayout | None,
        call: Call,
    ) -> Tensor:
        """The output as it is."""
        return partial[0]

    def head_costs(self, layer: int) -> None:
        """They differ from step to step, and K/V of neighbours stay where their heads are."""
        return

    def density(self, tokens: TokenMap) -> float:
        """Text and context whole; of own keys the published share for `top_p`, at least `min_keep`."""
        return density_of(tokens, max(self.settings.min_keep, share_of_mass(self.settings.top_p)))

    def choosing(self, tokens: TokenMap) -> float:
        """k-means, in which a token's product with a centroid is half a score, and what is done to tokens besides."""
        num_q, num_k = self.num_clusters(tokens)
        passes = 1 + max(0, self.settings.iterations - 1) / self.settings.sample_every
        products = num_q / tokens.num_keys + num_k / tokens.num_queries
        return passes * products / 2 + share_of_tokens(tokens, TOKEN_SCORES)

    def num_clusters(self, tokens: TokenMap) -> tuple[int, int]:
        """Of queries and of keys."""
        settings = self.settings
        num_q = cluster_count(settings.query_clusters, len(tokens.queries) * tokens.per_latent, QUERIES_A_CLUSTER)
        return num_q, cluster_count(settings.key_clusters, len(tokens.own) * tokens.per_latent, KEYS_A_CLUSTER)

    def cluster(self, q_BLHD: Tensor, k_BTHD: Tensor, call: Call) -> tuple[Clusters, Clusters]:
        """The queries of latents and the own keys."""
        num_q, num_k = self.num_clusters(call.tokens)
        queries = self._cluster("q_centroids", q_BLHD[:, latent_queries(call.tokens)], num_q, call.memory)
        return queries, self._cluster("k_centroids", k_BTHD[:, own_keys(call.tokens)], num_k, call.memory)

    def choose(self, queries: Clusters, keys: Clusters) -> Tensor:
        """The key clusters that each query cluster sees, bool [G, R, C]."""
        return top_p(cluster_mass(queries, keys), self.settings.top_p, min_keep=self.min_clusters(keys))

    def min_clusters(self, keys: Clusters) -> int:
        """Key clusters that every query cluster sees at the least; all where `top_p` is 1, however small their mass."""
        share = 1.0 if self.settings.top_p == 1 else self.settings.min_keep
        return max(1, math.ceil(share * keys.sizes_BHN.shape[2]))

    def _cluster(self, name: str, x_BTHD: Tensor, num_clusters: int, memory: Memory) -> Clusters:
        known = memory.get(name)
        iterations = self.settings.first_iterations if known is None else self.settings.iterations
        labels, centroids = kmeans(x_BTHD, known, num_clusters, iterations, sample_every=self.settings.sample_every)
        memory[name] = centroids
        blocks = cluster_blocks(labels, num_clusters)
        sizes = blocks.lengths().long().view(*labels.shape[:2], -1)  # products of two may pass int32
        return Clusters(x_BTHD, labels, centroids, sizes, blocks)


def cluster_count(wanted: int, num_tokens: int, tokens_a_cluster: int) -> int:
    """As many clusters as wanted, but so that they have `tokens_a_cluster` on average; at least one."""
    return max(1, min(wanted, num_tokens // tokens_a_cluster))


def lay_out(queries: Clusters, keys: Clusters, chosen_GRC: Tensor, tokens: TokenMap) -> BlockLayout:
    """The chosen pairs of clusters, and whatever is in none, which sees all and which all see."""
    batch, num_heads, _ = queries.labels_BHT.shape
    return make_layout(
        with_rest(queries.blocks, latent_queries(tokens), tokens.num_queries),
        with_rest(keys.blocks, own_keys(tokens), tokens.num_keys),
        F.pad(chosen_GRC, (0, 1, 0, 1), value=True),
        own_groups(batch, num_heads, chosen_GRC.device),
    )


def with_rest(clusters: Blocks, place: slice, num_tokens: int) -> Blocks:
    """The clusters of all tokens: those outside `place` are in a cluster of their own, the last."""
    assert clusters.order is not None
    offsets = F.pad(clusters.offsets, (0, 1), value=num_tokens)
    if clusters.order.shape[1] == num_tokens:
        return Blocks(offsets, clusters.order)
    every = torch.arange(num_tokens, dtype=torch.int32, device=offsets.device)
    rest = torch.cat([every[: place.start], every[place.stop :]])
    return Blocks(offsets, torch.cat([clusters.order + place.start, rest.expand(len(offsets), -1)], 1))


def cluster_mass(queries: Clusters, keys: Clusters) -> Tensor:
    """The share of each query cluster's attention that goes to each key cluster, by their centroids, fp32 [G, R, C].

    P[c, j] ~ n_j · exp(q_c · k_j / sqrt(D)), over the own keys alone.
    """
    scores = queries.centroids_BHND @ keys.centroids_BHND.mT / math.sqrt(keys.centroids_BHND.shape[-1])
    scores = scores + keys.sizes_BHN.float().log()[:, :, None, :]
    return torch.softmax(scores, -1).flatten(0, 1)
