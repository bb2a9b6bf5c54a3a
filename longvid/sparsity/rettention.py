"""Re-ttention: a narrow window, rescaled by the share of the whole softmax that it held when that was last computed.

Shapes: B batch, L queries, T keys, H heads of this rank, D of a head.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from longvid.kernels.dense import Partial
from longvid.kernels.dispatch import sparse_attention
from longvid.kernels.layout import BlockLayout, make_layout, one_group
from longvid.sparsity.policy import Call, is_left_dense, last_step
from longvid.sparsity.settings import Rettention
from longvid.sparsity.tiles import at_origin, tiling
from longvid.sparsity.tokens import TokenMap


class RettentionPolicy:
    """O = rho · O_window + R, where rho = Z_window / Z and R = O - rho · O_window are of the last dense step.

    After `dense_steps` every `refresh_every`-th step is dense, and any that finds memory empty. Without `residual`, R
    is left out: the output then shrinks by the share of the softmax that the window misses. Memory: `rho`, fp32
    [B, L, H], which grows towards 1 at every sparse step; `refreshed`, the step of the last dense one; and `residual`
    [B, L, H, D] in q's dtype.
    """

    data_dependent = True
    """Its layout is not, but a dense step needs the window's LSE over all keys."""

    def __init__(self, settings: Rettention) -> None:
        self.settings = settings

    def layout(self, q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, call: Call) -> BlockLayout | None:
        """The window."""
        if not self._is_sparse(call) or self._refreshes(call):
            return None
        return self._window(q_BLHD, call)

    def finish(
        self,
        q_BLHD: Tensor,
        k_BTHD: Tensor,
        v_BTHD: Tensor,
        partial: Partial,
        layout: BlockLayout | None,
        call: Call,
    ) -> Tensor:
        """A sparse step's output corrected. A dense step's output as it is, from which the correction is learned."""
        out, lse_BLH = partial
        if layout is not None:
            return self._correct(out, call)
        if self._is_sparse(call) and not last_step(call):
            window, window_lse = sparse_attention(q_BLHD, k_BTHD, v_BTHD, self._window(q_BLHD, call))
            rho = (window_lse - lse_BLH).exp().clamp(max=1.0)
            call.memory.update(rho=rho, refreshed=torch.tensor(call.step))
            if self.settings.residual:
                call.memory["residual"] = (out - rho[..., None] * window).type_as(out)
        return out

    def head_costs(self, layer: int) -> tuple[float, ...] | None:
        """All heads have the same tiles."""
        return None

    def density(self, tokens: TokenMap) -> float:
        """Exact, of a step that is not dense."""
        settings = self.settings
        return window_layout(at_origin(tokens), settings.tile, settings.keep, 1, torch.device("cpu")).density()

    def choosing(self, tokens: TokenMap) -> float:
        """The window that a dense step computes, too, for each sparse one behind it; no end of it where there is none.

        A window of nothing still reads every token: the tenth of dense attention.
        """
        sparse_steps = self.settings.refresh_every - 1
        return (self.density(tokens) + 0.1) / sparse_steps if sparse_steps else math.inf

    def _correct(self, out_BLHD: Tensor, call: Call) -> Tensor:
        rho = (call.memory["rho"] + self.settings.growth).clamp(max=1.0)
        call.memory["rho"] = rho
        corrected = rho[..., None] * out_BLHD
        if self.settings.residual:
            corrected = corrected + call.memory["residual"]
        return corrected.type_as(out_BLHD)

    def _is_sparse(self, call: Call) -> bool:
        return not is_left_dense(call, self.settings)

    def _refreshes(self, call: Call) -> bool:
        """Every so many steps of the chunk, whether or not a cache left some out."""
        if "rho" not in call.memory:
            return True
        return call.step - int(call.memory["refreshed"]) >= self.settings.refresh_every

    def _window(self, q_BLHD: Tensor, call: Call) -> BlockLayout:
        tokens = at_origin(call.tokens)
        return window_layout(tokens, self.settings.tile, self.settings.keep, q_BLHD.shape[2], q_BLHD.device)


@functools.lru_cache(maxsize=32)
def window_layout(tokens: TokenMap, tile: int, keep: float, num_heads: int, device: torch.device) -> BlockLayout:
    """A share of the own keys around each tile's place in film order, in whole tiles, beside text and context.

    Near the ends of the own latents the window is moved, not cut: every row has as many tiles.
    """
    tiles = tiling(tokens, tile, device)
    num_optional = tiles.num_optional
    num_own = len(tokens.own) * tokens.per_latent
    width = min(num_optional, max(1, math.ceil(keep * num_own / tile)))
    first = int(tiles.optional.int().argmax())
    place = tiles.own.int().argmax(-1, keepdim=True) - first
    start = (place - (width - 1) // 2).clamp(0, num_optional - width)
    column = torch.arange(tiles.k.num_blocks, device=device) - first
    window = (start <= column) & (column < start + width)
    return make_layout(tiles.q, tiles.k, (window | tiles.visible)[None], one_group(num_heads, device))
