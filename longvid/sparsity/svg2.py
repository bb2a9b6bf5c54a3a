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
from longvid.kernels.layout import BlockLayout, make_layout, own_groups
from longvid.kernels.permute import cluster_blocks, cluster_sizes, kmeans
from longvid.kernels.select import top_p
from longvid.sparsity.policy import Call, Memory, is_left_dense
from longvid.sparsity.settings import Svg2
from longvid.sparsity.tiles import density_of, latent_queries, own_keys, share_of_mass, share_of_tokens
from longvid.sparsity.tokens import TokenMap

QUERIES_A_CLUSTER, KEYS_A_CLUSTER = 128, 64
"""What a cluster has on average at the least. The published counts are for some 75,000 tokens: 250 and 75 a cluster.

Smaller clusters need fewer scores for the same mass, but finding them takes longer than that saves.
"""

TOKEN_SCORES = 200
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
        settings, tokens = self.settings, call.tokens
        if is_left_dense(call, settings):
            return None
        in_clusters, skippable = latent_queries(tokens), own_keys(tokens)
        num_q, num_k = self.num_clusters(tokens)
        queries = self._cluster("q_centroids", q_BLHD[:, in_clusters], num_q, call.memory)
        keys = self._cluster("k_centroids", k_BTHD[:, skippable], num_k, call.memory)
        chosen_GRC = self.choose(queries, keys, v_BTHD[:, skippable])
        return make_layout(
            cluster_blocks(with_rest(queries.labels_BHT, in_clusters, tokens.num_queries, num_q), num_q + 1),
            cluster_blocks(with_rest(keys.labels_BHT, skippable, tokens.num_keys, num_k), num_k + 1),
            F.pad(chosen_GRC, (0, 1, 0, 1), value=True),
            own_groups(q_BLHD.shape[0], q_BLHD.shape[2], q_BLHD.device),
        )

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
        products = num_q / tokens.num_keys + num_k / tokens.num_queries
        return max(1, self.settings.iterations) * products / 2 + share_of_tokens(tokens, TOKEN_SCORES)

    def num_clusters(self, tokens: TokenMap) -> tuple[int, int]:
        """Of queries and of keys."""
        settings = self.settings
        num_q = cluster_count(settings.query_clusters, len(tokens.queries) * tokens.per_latent, QUERIES_A_CLUSTER)
        return num_q, cluster_count(settings.key_clusters, len(tokens.own) * tokens.per_latent, KEYS_A_CLUSTER)

    def choose(self, queries: Clusters, keys: Clusters, v_BTHD: Tensor) -> Tensor:
        """The key clusters that each query cluster sees, bool [G, R, C]. `v_BTHD` are the own keys' values."""
        return top_p(cluster_mass(queries, keys), self.settings.top_p, min_keep=self.min_clusters(keys))

    def min_clusters(self, keys: Clusters) -> int:
        """Key clusters that every query cluster sees at the least; all where `top_p` is 1, however small their mass."""
        share = 1.0 if self.settings.top_p == 1 else self.settings.min_keep
        return max(1, math.ceil(share * keys.sizes_BHN.shape[2]))

    def _cluster(self, name: str, x_BTHD: Tensor, num_clusters: int, memory: Memory) -> Clusters:
        known = memory.get(name)
        iterations = self.settings.first_iterations if known is None else self.settings.iterations
        labels, centroids = kmeans(x_BTHD, known, num_clusters, iterations)
        memory[name] = centroids
        return Clusters(x_BTHD, labels, centroids, cluster_sizes(labels, num_clusters))


def cluster_count(wanted: int, num_tokens: int, tokens_a_cluster: int) -> int:
    """As many clusters as wanted, but so that they have `tokens_a_cluster` on average; at least one."""
    return max(1, min(wanted, num_tokens // tokens_a_cluster))


def with_rest(labels_BHT: Tensor, place: slice, num_tokens: int, num_clusters: int) -> Tensor:
    """The clusters of all tokens: those outside `place` are in a cluster of their own, the last."""
    labels = labels_BHT.new_full((*labels_BHT.shape[:2], num_tokens), num_clusters)
    labels[:, :, place] = labels_BHT
    return labels


def cluster_mass(queries: Clusters, keys: Clusters) -> Tensor:
    """The share of each query cluster's attention that goes to each key cluster, by their centroids, fp32 [G, R, C].

    P[c, j] ~ n_j · exp(q_c · k_j / sqrt(D)), over the own keys alone.
    """
    scores = queries.centroids_BHND @ keys.centroids_BHND.mT / math.sqrt(keys.centroids_BHND.shape[-1])
    scores = scores + keys.sizes_BHN.float().log()[:, :, None, :]
    return torch.softmax(scores, -1).flatten(0, 1)
