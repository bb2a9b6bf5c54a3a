"""AdaSpa: tiles of the largest attention mass, found with the LSE of a dense step (arXiv 2502.21079).

Shapes: B batch, L queries, T keys, H heads of this rank, D of a head, R query tiles, C key tiles.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from longvid.kernels.dense import Partial
from longvid.kernels.layout import BlockLayout, make_layout, own_groups
from longvid.kernels.score import block_mass
from longvid.kernels.select import top_k
from longvid.sparsity.policy import Call, is_layer_dense, last_step
from longvid.sparsity.settings import AdaSpa
from longvid.sparsity.tiles import Tiling, density_of, tiling
from longvid.sparsity.tokens import TokenMap


class AdaSpaPolicy:
    """Dense until the first search, whose own step is dense too; each mask then serves until the next search.

    Memory: `mask`, bool [B · H, R, C]; `searched`, the step of the last search; and `lse`, fp32 [B, H, L], as long as
    another search comes. With an empty memory a step behind the first search is dense and searches.
    """

    data_dependent = True

    def __init__(self, settings: AdaSpa) -> None:
        self.settings = settings
        self._layouts = WeakTensorKeyDictionary()  # of masks that are alive

    def layout(self, q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, call: Call) -> BlockLayout | None:
        """The tiles of the last search. At a later search, with the LSE of the dense step, of this one."""
        if not self._is_sparse(call) or "mask" not in call.memory:
            return None
        if "lse" in call.memory and self._is_due(call):
            self._search(q_BLHD, k_BTHD, call)
        mask = call.memory["mask"]
        if mask not in self._layouts:
            self._layouts[mask] = self._build(mask, q_BLHD, call)
        layout: BlockLayout = self._layouts[mask]
        return layout

    def finish(
        self,
        q_BLHD: Tensor,
        k_BTHD: Tensor,
        v_BTHD: Tensor,
        partial: Partial,
        layout: BlockLayout | None,
        call: Call,
    ) -> Tensor:
        """The output as it is. The first dense step that sparse ones follow searches."""
        out, lse_BLH = partial
        if layout is None and self._is_sparse(call) and not last_step(call):
            call.memory["lse"] = lse_BLH.transpose(1, 2).contiguous()
            self._search(q_BLHD, k_BTHD, call)
        return out

    def head_costs(self, layer: int) -> None:
        """They differ from step to step, and K/V of neighbours stay where their heads are."""
        return

    def density(self, tokens: TokenMap) -> float:
        """Own keys at 1 - sparsity, which the heads' budgets keep on average; text and context whole."""
        return density_of(tokens, 1 - self.settings.sparsity)

    def choosing(self, tokens: TokenMap) -> float:
        """Of a step that searches: the scores of the queries that are looked at, which are half of attention."""
        return 0.5 / self.settings.sample_every

    def _is_sparse(self, call: Call) -> bool:
        """Whether the step is at or behind the first search, in a layer that is not dense."""
        first = max(self.settings.dense_steps, min(self.settings.search_at))
        return call.has_reached(first) and not is_layer_dense(call, self.settings.dense_layers)

    def _searches(self, call: Call) -> list[int]:
        return [round(share * call.num_steps) for share in self.settings.search_at]

    def _is_due(self, call: Call) -> bool:
        """Whether a search is to be at this step, or was to be at one since the last that a cache left out."""
        last = int(call.memory["searched"])
        return any(last < step <= call.step for step in self._searches(call))

    def _search(self, q_BLHD: Tensor, k_BTHD: Tensor, call: Call) -> None:
        """A new mask from the LSE in memory: all heads at the same sparsity first, then by their recall."""
        settings, memory = self.settings, call.memory
        tiles = tiling(call.tokens, settings.tile, q_BLHD.device)
        lse_BLH = memory["lse"].transpose(1, 2)
        args = q_BLHD, k_BTHD, lse_BLH, tiles.q, tiles.k
        mass_BHRC = block_mass(*args, sample_every=settings.sample_every, exact=settings.sample_every == 1)
        even = mass_BHRC.new_full((call.heads.count,), settings.sparsity)
        found = mass_BHRC * choose(mass_BHRC, even, tiles)
        recall = call.heads.gather(found.sum((0, 2, 3)) / mass_BHRC.sum((0, 2, 3)))
        sparsity = head_sparsity(recall, settings.sparsity, settings.recall)
        mine = sparsity[list(call.heads.indices)]
        memory["mask"] = choose(mass_BHRC, mine, tiles).flatten(0, 1)
        memory["searched"] = torch.tensor(call.step)
        if call.step >= max(self._searches(call)):
            del memory["lse"]

    def _build(self, mask: Tensor, q_BLHD: Tensor, call: Call) -> BlockLayout:
        tiles = tiling(call.tokens, self.settings.tile, q_BLHD.device)
        layout = make_layout(tiles.q, tiles.k, mask, own_groups(q_BLHD.shape[0], q_BLHD.shape[2], q_BLHD.device))
        return replace(layout, col=layout.col[: int(layout.row_ptr[-1, -1])].clone())  # it is kept for many steps


def choose(mass_BHRC: Tensor, sparsity_H: Tensor, tiles: Tiling) -> Tensor:
    """The tiles of the largest mass of each row, as many as its head's sparsity leaves, and one: bool [B, H, R, C].

    Sparsity is of the tiles that may be skipped, those of own keys: text and context come on top. A row's own tile is
    among its first.
    """
    batch = mass_BHRC.shape[0]
    budget = ((1 - sparsity_H) * tiles.num_optional).round().clamp(min=1).int().repeat(batch)
    wanted = mass_BHRC.masked_fill(tiles.own, math.inf).masked_fill(tiles.visible, -math.inf)
    return top_k(wanted.flatten(0, 1), budget).view_as(mass_BHRC) | tiles.visible | tiles.own


def head_sparsity(recall_H: Tensor, sparsity: float, threshold: float) -> Tensor:
    """Each head's sparsity, fp32 [H], on average s.

    With n heads over the recall's threshold, but half of all at the most, the n of highest recall have (1 + s) / 2 and
    the n of lowest (3s - 1) / 2. Under s = 1 / 3, where that would be less than nothing, they have 2s and 0. Of equal
    heads the first counts as higher.
    """
    num_heads = len(recall_H)
    n = (recall_H > threshold).sum().clamp(max=num_heads // 2)
    rank = recall_H.argsort(descending=True, stable=True).argsort()
    change = min((1 - sparsity) / 2, sparsity)
    raised, lowered = rank < n, rank >= num_heads - n
    return sparsity + change * (raised.float() - lowered.float())
