"""A policy at work: who calls it, with what it remembers, and where dense attention takes its place.

Shapes: B batch, L queries, T keys, H heads of this rank, D of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from longvid.kernels.dense import Partial, attend_lse
from longvid.kernels.dispatch import backend_for, sparse_attention
from longvid.kernels.layout import BlockLayout
from longvid.sparsity.crossover import pays
from longvid.sparsity.policy import Call, Heads, Memory, Policy
from longvid.sparsity.tokens import TokenMap

MAX_PARTS = 256
"""Layouts for parts of the tokens that are kept for the next call."""


@dataclass(frozen=True)
class Place:
    """Which attention: a layer of the model, a guidance branch, a chunk, and the chunk's step."""

    chunk: int
    branch: int
    layer: int
    step: int

    @property
    def key(self) -> tuple[int, int, int]:
        """What memory is kept by."""
        return self.chunk, self.branch, self.layer


class SparseRuntime:
    """One policy in all layers of a stage. `always` computes sparsely where dense attention would be faster, too."""

    def __init__(self, policy: Policy, num_layers: int, num_steps: int, *, always: bool = False) -> None:
        self.policy = policy
        self.on_layout: Callable[[BlockLayout | None], None] | None = None
        """Told of every attention's layout; None: dense."""
        self._num_layers, self._num_steps, self._always = num_layers, num_steps, always
        self._memories: dict[tuple[int, int, int], tuple[TokenMap, Memory]] = {}
        self._pays: dict[TokenMap, bool] = {}
        self._parts: dict[tuple[int, int, int, tuple[range, ...]], tuple[BlockLayout, BlockLayout | None]] = {}

    def at(self, place: Place, tokens: TokenMap, device: torch.device) -> PolicyAttention | None:
        """Attention at a place; None where it is to be dense."""
        if not self.pays(tokens, device):
            return None
        known, memory = self._memories.get(place.key, (None, {}))
        if known != tokens:  # a neighbour came or went: what was learned is of other keys
            memory = {}
        self._memories[place.key] = (tokens, memory)

        def call(heads: Heads) -> Call:
            return Call(place.layer, self._num_layers, place.step, self._num_steps, tokens, heads, memory)

        return PolicyAttention(self, call)

    def pays(self, tokens: TokenMap, device: torch.device) -> bool:
        """Whether the policy is faster than dense attention for these tokens, as measured for this kernel."""
        if self._always:
            return True
        if tokens not in self._pays:
            shares = self.policy.density(tokens), self.policy.choosing(tokens)
            self._pays[tokens] = pays(backend_for(device), tokens.num_queries, tokens.num_keys, *shares)
        return self._pays[tokens]

    def end_step(self, chunk: int, step: int) -> None:
        """After a unit's pass: what is kept of a chunk goes with its last step."""
        if step == self._num_steps - 1:
            self._memories = {key: kept for key, kept in self._memories.items() if key[0] != chunk}

    def part(self, layout: BlockLayout, queries: slice, keys: tuple[range, ...]) -> BlockLayout | None:
        """A layout for some of the queries and keys, in that order; None where it has no tile."""
        name = (id(layout), queries.start, queries.stop, keys)
        if name not in self._parts:
            if len(self._parts) >= MAX_PARTS:
                self._parts.clear()
            index = [torch.arange(span.start, span.stop, device=layout.device) for span in keys]
            rows = torch.arange(queries.start, queries.stop, device=layout.device)
            here = layout.keep(rows, torch.cat(index))
            # The first keeps its id taken. Whether there are tiles is asked once: the device is waited for.
            self._parts[name] = (layout, here if int(here.row_ptr[-1, -1]) else None)
        return self._parts[name][1]

    def state(self) -> dict[tuple[int, int, int], Memory]:
        """What is remembered, by (chunk, branch, layer): tensors that nobody writes to, and the tokens' places."""
        return {key: {**memory, "tokens": _as_tensor(tokens)} for key, (tokens, memory) in self._memories.items()}

    def load_state(self, state: Mapping[tuple[int, int, int], Memory]) -> None:
        """Go on from what `state` gave; without anything, a new film begins."""
        self._memories = {
            # Single numbers, such as steps, are read by the program: on the host it need not wait for them.
            key: (
                _as_tokens(kept["tokens"]),
                {name: x if x.dim() else x.cpu() for name, x in kept.items() if name != "tokens"},
            )
            for key, kept in state.items()
        }


@dataclass(frozen=True)
class PolicyAttention:
    """Attention at one place by a policy."""

    runtime: SparseRuntime
    call: Callable[[Heads], Call]

    def whole(self, q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, heads: Heads) -> Tensor:
        """Attention to all keys, [B, L, H, D]."""
        call, policy = self.call(heads), self.runtime.policy
        layout = policy.layout(q_BLHD, k_BTHD, v_BTHD, call)
        if self.runtime.on_layout:
            self.runtime.on_layout(layout)
        if layout is None:
            partial = attend_lse(q_BLHD, k_BTHD, v_BTHD)
        else:
            partial = sparse_attention(q_BLHD, k_BTHD, v_BTHD, layout)
        return policy.finish(q_BLHD, k_BTHD, v_BTHD, partial, layout, call)

    def part(
        self,
        q_BlHD: Tensor,
        k_BtHD: Tensor,
        v_BtHD: Tensor,
        heads: Heads,
        queries: slice,
        keys: tuple[range, ...],
    ) -> Partial | None:
        """Attention of some of the queries to some of the keys; None where the layout has no tile there.

        `queries` and `keys` are their places among all. For policies that look at no data.
        """
        layout = self.runtime.policy.layout(q_BlHD, k_BtHD, v_BtHD, self.call(heads))
        if layout is None:
            return attend_lse(q_BlHD, k_BtHD, v_BtHD)
        here = self.runtime.part(layout, queries, keys)
        return None if here is None else sparse_attention(q_BlHD, k_BtHD, v_BtHD, here)


def _as_tensor(tokens: TokenMap) -> Tensor:
    spans = (edge for span in (tokens.queries, tokens.keys, tokens.own) for edge in (span.start, span.stop))
    return torch.tensor([*spans, tokens.height, tokens.width, tokens.text_before, tokens.text_behind])


def _as_tokens(values: Tensor) -> TokenMap:
    a, b, c, d, e, f, *rest = values.tolist()
    return TokenMap(range(a, b), range(c, d), range(e, f), *rest)
