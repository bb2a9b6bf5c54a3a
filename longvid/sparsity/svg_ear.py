"""SVG-EAR: Sparse VideoGen 2 in which skipped clusters count as their centroids, and those that stray most are exact.

Shapes: B batch, T own keys, H heads, D of a head, R query clusters, C key clusters, G = B · H.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longvid.kernels import cluster_cpu, native
from longvid.kernels.dense import Partial
from longvid.kernels.layout import BlockLayout
from longvid.kernels.permute import cluster_blocks, cluster_sums
from longvid.kernels.select import greedy_area, top_k, top_p
from longvid.sparsity.policy import Call
from longvid.sparsity.skipped import with_skipped
from longvid.sparsity.svg2 import TOKEN_SCORES, Clusters, Svg2Policy, cluster_mass
from longvid.sparsity.tiles import share_of_tokens
from longvid.sparsity.tokens import TokenMap

MAX_EXPONENT = 40.0
"""Of a key's score over its centroid's: its square must fit into fp32."""


class SvgEarPolicy(Svg2Policy):
    """Computes as many scores as Sparse VideoGen 2, elsewhere: what a centroid says well need not be exact."""

    def choose(self, queries: Clusters, keys: Clusters, v_BTHD: Tensor) -> Tensor:
        """Key clusters by their error per score, in the area that top-p takes; the heaviest ones in any case."""
        area = (queries.sizes_BHN[:, :, :, None] * keys.sizes_BHN[:, :, None, :]).flatten(0, 1)
        mass, fewest = cluster_mass(queries, keys), self.min_clusters(keys)
        budget = (top_p(mass, self.settings.top_p, min_keep=fewest) * area).sum(-1)
        heaviest = top_k(mass, fewest)
        score = log_error(queries, keys, v_BTHD).flatten(0, 1) - area.clamp(min=1).log()
        return greedy_area(score.masked_fill(heaviest, math.inf), area, budget) | heaviest

    def choosing(self, tokens: TokenMap) -> float:
        """As Sparse VideoGen 2; the errors, half a score for each key and query cluster; and attention to the means."""
        num_q, num_k = self.num_clusters(tokens)
        extra = num_q / tokens.num_queries / 2 + num_k / tokens.num_keys
        return super().choosing(tokens) + extra + share_of_tokens(tokens, TOKEN_SCORES / 2)

    def finish(
        self,
        q_BLHD: Tensor,
        k_BTHD: Tensor,
        v_BTHD: Tensor,
        partial: Partial,
        layout: BlockLayout | None,
        call: Call,
    ) -> Tensor:
        """The output with every skipped cluster as one key, its centroid, in the same softmax."""
        return partial[0] if layout is None else with_skipped(q_BLHD, k_BTHD, v_BTHD, partial, layout)


def log_error(queries: Clusters, keys: Clusters, v_BTHD: Tensor) -> Tensor:
    """What each query cluster loses where a key cluster counts as its centroid, in logarithms, fp32 [B, H, R, C].

    E[c, j] = sum over i in j of |e^{q_c · k_i} v_i - e^{q_c · k̄_j} v̄_j|², with k̄ and v̄ the means of the cluster. With
    d = q_c · (k_i - k̄_j): E = e^{2 q_c · k̄_j} (sum over i of e^d (e^d |v_i|² - 2 v_i · v̄_j) + n_j |v̄_j|²).
    """
    q_BHRD = queries.centroids_BHND / math.sqrt(v_BTHD.shape[-1])
    if v_BTHD.device.type == "cpu" and native.is_available():
        blocks = cluster_blocks(keys.labels_BHT, keys.sizes_BHN.shape[2])
        spread, k_mean, v_mean = cluster_cpu.errors(keys.x_BTHD, v_BTHD, blocks, q_BHRD, limit=MAX_EXPONENT)
    else:
        spread, k_mean, v_mean = errors(keys, v_BTHD, q_BHRD)
    spread += keys.sizes_BHN[..., None] * v_mean.square().sum(-1, keepdim=True)
    tiny = torch.finfo(torch.float32).tiny  # rounding may leave less than nothing
    return (spread.clamp_(min=tiny).log_().add_(k_mean @ q_BHRD.mT, alpha=2)).mT


def errors(keys: Clusters, v_BTHD: Tensor, q_BHRD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of `log_error` over i, fp32 [B, H, C, R], and the means of keys and values, fp32 [B, H, C, D]."""
    labels, num_clusters = keys.labels_BHT, keys.sizes_BHN.shape[2]
    sizes = keys.sizes_BHN.clamp(min=1)[..., None]
    k_mean, v_mean = (cluster_sums(x, labels, num_clusters) / sizes for x in (keys.x_BTHD, v_BTHD))
    batch, num_heads = labels.shape[:2]
    spread = torch.empty(batch, num_heads, num_clusters, q_BHRD.shape[2], device=labels.device)
    for b in range(batch):  # one head at a time: it has T x R terms
        for h in range(num_heads):
            label = labels[b, h]
            v_TD, v_mean_TD = v_BTHD[b, :, h].float(), v_mean[b, h, label]
            d_TR = (keys.x_BTHD[b, :, h].float() - k_mean[b, h, label]) @ q_BHRD[b, h].mT
            e_TR = d_TR.clamp_(max=MAX_EXPONENT).exp_()
            own, cross = v_TD.square().sum(-1, keepdim=True), (v_TD * v_mean_TD).sum(-1, keepdim=True)
            terms_TR = e_TR * (e_TR * own - 2 * cross)
            spread[b, h] = cluster_sums(terms_TR[None, :, None], label[None, None], num_clusters)[0, 0]
    return spread, k_mean, v_mean
