"""Muon: momentum, orthogonalised by Newton-Schulz, for matrices and convolution kernels.

Rule and coefficients from K. Jordan et al., "Muon: an optimizer for hidden layers in neural
networks" (2024); update scaled to AdamW's typical size as in Liu et al., "Muon is scalable for LLM
training" (2025). ``torch.optim.Muon`` takes matrices only, and a small VAE is all kernels; here
weights of one shape are orthogonalised together, which also saves many small calls on a CPU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(updates_NRC: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix of each matrix, roughly; float [N, R, C], kept in shape."""
    a, b, c = NEWTON_SCHULZ
    x = updates_NRC.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    out: Tensor = (x.mT if tall else x).to(updates_NRC.dtype)
    return out


class Muon(torch.optim.Optimizer):
    """Muon for parameters of two or more dims; a kernel [O, I, ...] counts as the matrix [O, I·...]."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    by_shape[param.shape[0], param[0].numel()].append(param)
            for shape, params in by_shape.items():
                self._step_shape(shape, params, group)

    def _step_shape(self, shape: tuple[int, int], params: list[nn.Parameter], group: dict[str, Any]) -> None:
        weights: list[Tensor] = list(params)
        grads = [param.grad for param in params if param.grad is not None]
        buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(grads, buffers, group["momentum"])
        stacked = torch.stack([update.reshape(shape) for update in nesterov])
        # An orthogonal [R, C] has entries of rms 1/sqrt(max(R, C)); AdamW's updates have about 0.2.
        scale = 0.2 * max(shape) ** 0.5
        updates = orthogonalise(stacked).mul_(-group["lr"] * scale)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, [u.reshape(w.shape) for u, w in zip(updates, weights, strict=True)])


def split_parameters(
    module: nn.Module, is_hidden: Callable[[str, nn.Parameter], bool]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters that Muon should take, and the others (for AdamW)."""
    hidden: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, param in module.named_parameters():
        if param.requires_grad:
            (hidden if param.ndim >= 2 and is_hidden(name, param) else others).append(param)
    return hidden, others
