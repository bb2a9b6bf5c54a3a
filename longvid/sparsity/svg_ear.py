"""SVG-EAR: Sparse VideoGen 2 in which skipped clusters count as their centroids, and those that stray most are exact.

Shapes: B batch, T own keys, H heads, D of a head, R query clusters, C key clusters, G = B · H.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from longvid.kernels import cluster_cpu, native
from longvid.kernels.dense import Partial
from longvid.kernels.layout import BlockLayout
from longvid.kernels.permute import cluster_sums
from longvid.kernels.score import sampled
from longvid.kernels.select import greedy_area, top_k, top_p
from longvid.sparsity.policy import Call, is_left_dense
from longvid.sparsity.settings import SvgEar
from longvid.sparsity.skipped import block_means, with_skipped
from longvid.sparsity.svg2 import TOKEN_SCORES, Clusters, Svg2Policy, cluster_mass, lay_out
from longvid.sparsity.tiles import own_keys, share_of_tokens
from longvid.sparsity.tokens import TokenMap

MAX_EXPONENT = 40.0
"""Of a key's score over its centroid's: its square must fit into fp32."""


class SvgEarPolicy(Svg2Policy):
    """Computes as many scores as Sparse VideoGen 2, elsewhere: what a centroid says well need not be exact."""

    def __init__(self, settings: SvgEar) -> None:
        super().__init__(settings)
        self._means = WeakTensorKeyDictionary()  # of layouts that are alive

    def layout(self, q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, call: Call) -> BlockLayout | None:
        """Key clusters by their error per score, in the area that top-p takes; the heaviest ones in any case."""
        if is_left_dense(call, self.settings):
            return None
        queries, keys = self.cluster(q_BLHD, k_BTHD, call)
        v_own = v_BTHD[:, own_keys(call.tokens)]
        means = keys.centroids_BHND, block_means(v_own, keys.blocks)
        if self.settings.iterations == 0:
            means = block_means(keys.x_BTHD, keys.blocks), means[1]
        errors = log_error(queries, keys, v_own, means, self.settings.sample_every)
        layout = lay_out(queries, keys, self.choose_by_error(queries, keys, errors), call.tokens)
        self._means[layout.row_ptr] = [F.pad(x, (0, 0, 0, 1)) for x in means]  # all see what is in no cluster
        return layout

    def choose_by_error(self, queries: Clusters, keys: Clusters, errors_BHRC: Tensor) -> Tensor:
        """The key clusters that each query cluster sees, bool [G, R, C]. Errors are logarithms."""
        area = (queries.sizes_BHN[:, :, :, None] * keys.sizes_BHN[:, :, None, :]).flatten(0, 1)
        mass, fewest = cluster_mass(queries, keys), self.min_clusters(keys)
        budget = (top_p(mass, self.settings.top_p, min_keep=fewest) * area).sum(-1)
        heaviest = top_k(mass, fewest)
        score = errors_BHRC.flatten(0, 1) - area.clamp(min=1).log()
        return greedy_area(score.masked_fill(heaviest, math.inf), area, budget) | heaviest

    def choosing(self, tokens: TokenMap) -> float:
        """As Sparse VideoGen 2; the errors, half a score for each key and query cluster; and attention to the means."""
        num_q, num_k = self.num_clusters(tokens)
        errors = num_q / tokens.num_queries / 2 / self.settings.sample_every
        return super().choosing(tokens) + errors + num_k / tokens.num_keys + share_of_tokens(tokens, TOKEN_SCORES)

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
        if layout is None:
            return partial[0]
        return with_skipped(q_BLHD, k_BTHD, v_BTHD, partial, layout, self._means.get(layout.row_ptr))


Means = tuple[Tensor, Tensor]
"""Of each cluster's keys and values, fp32 [B, H, C, D]."""


def log_error(queries: Clusters, keys: Clusters, v_BTHD: Tensor, means: Means, sample_every: int = 1) -> Tensor:
    """What each query cluster loses where a key cluster counts as its mean, in logarithms, fp32 [B, H, R, C].

    E[c, j] = sum over i in j of |e^{q_c · k_i} v_i - e^{q_c · k̄_j} v̄_j|², with k̄ and v̄ the means of the cluster. With
    d = q_c · (k_i - k̄_j): E = e^{2 q_c · k̄_j} (sum over i of e^d (e^d |v_i|² - 2 v_i · v̄_j) + n_j |v̄_j|²). Of every
    cluster each `sample_every`-th key stands for all of them.
    """
    q_BHRD = queries.centroids_BHND / math.sqrt(v_BTHD.shape[-1])
    if v_BTHD.device.type == "cpu" and native.is_available():
        args = keys.x_BTHD, v_BTHD, keys.blocks, means, q_BHRD
        spread = cluster_cpu.errors(*args, limit=MAX_EXPONENT, sample_every=sample_every)
    else:
        spread = errors(keys, v_BTHD, means, q_BHRD, sample_every)
    k_mean, v_mean = means
    spread += keys.sizes_BHN[..., None] * v_mean.square().sum(-1, keepdim=True)
    tiny = torch.finfo(torch.float32).tiny  # rounding may leave less than nothing
    return (spread.clamp_(min=tiny).log_().add_(k_mean @ q_BHRD.mT, alpha=2)).mT


def errors(keys: Clusters, v_BTHD: Tensor, means: Means, q_BHRD: Tensor, sample_every: int = 1) -> Tensor:
    """The sums of `log_error` over i, fp32 [B, H, C, R]."""
    labels, num_clusters = keys.labels_BHT, keys.sizes_BHN.shape[2]
    batch, num_heads, num_tokens = labels.shape
    spread = torch.empty(batch, num_heads, num_clusters, q_BHRD.shape[2], device=labels.device)
    for b in range(batch):  # one head at a time: it has T x R terms
        for h in range(num_heads):
            some, label, weight = sampled(keys.blocks.of_group(b * num_heads + h), num_tokens, sample_every)
            k_mean_TD, v_mean_TD = (x[b, h, label] for x in means)
            v_TD = v_BTHD[b, some, h].float()
            d_TR = (keys.x_BTHD[b, some, h].float() - k_mean_TD) @ q_BHRD[b, h].mT
            e_TR = d_TR.clamp_(max=MAX_EXPONENT).exp_()
            own, cross = v_TD.square().sum(-1, keepdim=True), (v_TD * v_mean_TD).sum(-1, keepdim=True)
            terms_TR = e_TR * (e_TR * own - 2 * cross) * weight[:, None]
            spread[b, h] = cluster_sums(terms_TR[None, :, None], label[None, None], num_clusters)[0, 0]
    return spread
