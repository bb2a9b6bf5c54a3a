"""Attention to keys that are on this rank: dense or by a policy, of video alone or with text beside it.

Shapes: B batch, N text tokens of a unit's prompts together, L video tokens, T keys, H heads, D of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from longvid.kernels.dense import Partial, attend, attend_lse
from longvid.kernels.merge import merge_partials
from longvid.sparsity.policy import Heads


class Attention(Protocol):
    """Softmax attention, dense or by a policy of sparse attention."""

    def whole(self, q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, heads: Heads) -> Tensor:
        """Attention to all keys, [B, L, H, D]."""
        ...

    def part(
        self, q_BlHD: Tensor, k_BtHD: Tensor, v_BtHD: Tensor, heads: Heads, queries: slice, keys: tuple[range, ...]
    ) -> Partial | None:
        """Attention of some queries to some keys, whose places among all are given; None: none of them sees any."""
        ...


class DenseAttention:
    """All scores."""

    def whole(self, q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, heads: Heads) -> Tensor:
        return attend(q_BLHD, k_BTHD, v_BTHD)

    def part(
        self, q_BlHD: Tensor, k_BtHD: Tensor, v_BtHD: Tensor, heads: Heads, queries: slice, keys: tuple[range, ...]
    ) -> Partial | None:
        return attend_lse(q_BlHD, k_BtHD, v_BtHD) if k_BtHD.shape[1] else None


@dataclass(frozen=True)
class JointSpan:
    """Video tokens that follow one prompt, or two: (1 - weight) · first + weight · second. Both index the prompts."""

    tokens: slice
    first: int
    second: int | None = None
    weight: float = 0.0


@dataclass(frozen=True)
class Text:
    """The text of a unit's prompts side by side, in one attention with its video: every rank has all of it.

    `query`, `key` and `value` are [B, N, H, D]; `lengths` are the tokens of each prompt. A prompt's text sees itself
    and all video; a video token sees all video, and the text of the prompts that its span follows. `spans` cover all
    video tokens of the unit, in order. Places among all tokens count text first.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    lengths: Sequence[int]
    spans: Sequence[JointSpan]

    @property
    def num_tokens(self) -> int:
        return self.query.shape[1]

    def of(self, heads: Heads) -> Text:
        """Some of its heads."""
        query, key, value = (of_heads(x, heads) for x in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value)

    def prompts(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Queries, keys and values of each prompt."""
        parts = (x.split(list(self.lengths), 1) for x in (self.query, self.key, self.value))
        return list(zip(*parts, strict=True))


def of_heads(x_BLHD: Tensor, heads: Heads) -> Tensor:
    """Some heads of all; a view where they lie side by side, so that the device is not waited for."""
    first, stop = heads.indices[0], heads.indices[-1] + 1
    if heads.indices == tuple(range(first, stop)):
        return x_BLHD[:, :, first:stop]
    return x_BLHD[:, :, list(heads.indices)]


def attend_beside(
    text: Text, q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, attention: Attention, heads: Heads
) -> Tensor:
    """Attention of text and video to both, where all keys of video are here: [B, N + L, H, D], text first.

    With several prompts it is dense.
    """
    if len(text.lengths) == 1:
        video = (q_BLHD, k_BTHD, v_BTHD)
        query, key, value = (torch.cat(pair, 1) for pair in zip(text.prompts()[0], video, strict=True))
        return attention.whole(query, key, value, heads)
    prompts = text.prompts()

    def attend_with(queries: Tensor, prompt: int) -> Tensor:
        _, key, value = prompts[prompt]
        return attend(queries, torch.cat([key, k_BTHD], 1), torch.cat([value, v_BTHD], 1))

    outputs = [attend_with(query, prompt) for prompt, (query, _, _) in enumerate(prompts)]
    for span in text.spans:
        out = attend_with(q_BLHD[:, span.tokens], span.first)
        if span.second is not None:
            out = torch.lerp(out, attend_with(q_BLHD[:, span.tokens], span.second), span.weight)
        outputs.append(out)
    return torch.cat(outputs, 1)


def join_text(
    text: Text,
    q_BnHD: Tensor,
    seen_of_video: tuple[Partial | None, Partial | None],
    first: int,
    attention: Attention,
    heads: Heads,
) -> Tensor:
    """What `attend_beside` gives, where keys of video came in parts: [B, N + n, H, D] in fp32.

    `seen_of_video` is what text, and these n queries of which the first is token `first` of the unit, saw of all
    video. The text's keys join here, once.
    """
    of_text, of_video = seen_of_video
    prompts, outputs, start = text.prompts(), [], 0
    places = []
    for query, key, value in prompts:
        place = slice(start, start + query.shape[1])
        places.append((range(place.start, place.stop),))
        own = attention.part(query, key, value, heads, place, places[-1])
        outputs.append(_merged(_rows(of_text, place), own, query))
        start = place.stop

    def attend_with(tokens: slice, prompt: int) -> Tensor:
        queries, (_, key, value) = q_BnHD[:, tokens], prompts[prompt]
        asked = slice(start + first + tokens.start, start + first + tokens.stop)
        found = attention.part(queries, key, value, heads, asked, places[prompt])
        return _merged(_rows(of_video, tokens), found, queries)

    for span in text.spans:
        edges = (min(max(edge - first, 0), q_BnHD.shape[1]) for edge in (span.tokens.start, span.tokens.stop))
        tokens = slice(*edges)
        if tokens.start == tokens.stop:
            continue
        out = attend_with(tokens, span.first)
        if span.second is not None:
            out = torch.lerp(out, attend_with(tokens, span.second), span.weight)
        outputs.append(out)
    return torch.cat(outputs, 1)


def merge_parts(parts: Sequence[Partial | None]) -> Partial | None:
    """Attention to all keys, from attention to some each; None where nothing is seen of any."""
    merged: Partial | None = None
    for part in parts:
        if part:
            merged = merge_partials(*merged, *part) if merged else part
    return merged


def _rows(partial: Partial | None, tokens: slice) -> Partial | None:
    return (partial[0][:, tokens], partial[1][:, tokens]) if partial else None


def _merged(a: Partial | None, b: Partial | None, like: Tensor) -> Tensor:
    merged = merge_parts([a, b])
    return merged[0].float() if merged else torch.zeros_like(like, dtype=torch.float32)
