"""Joint attention of text and video tokens in a queue: neighbours' K/V, and each latent with its own scene's prompt.

Shapes: B = 1, N text tokens of a unit's prompts together, S video tokens of a unit, H heads, D of a head.
Text of all prompts of a unit goes through the layers side by side, [1, N, E]. Only attention knows that they are
several: a prompt's text sees itself and all video, and a latent's tokens see all video and their own prompt's text.
With one prompt that is the attention that the model was trained with, and a policy may choose its scores; where scenes
meet in a unit attention is dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from longvid.kernels.dense import attend
from longvid.models.layer_stage import LayerContext
from longvid.parallel.sequence import KvPart, Rope, rotate, rows
from longvid.plan import PromptBlend
from longvid.sparsity.policy import Heads


@dataclass(frozen=True)
class JointSpan:
    """Video tokens that follow one prompt, or two: (1 - weight) · first + weight · second. Both index the prompts."""

    tokens: slice
    first: int
    second: int | None = None
    weight: float = 0.0


@dataclass(frozen=True, kw_only=True)
class JointContext(LayerContext):
    """What joint attention needs besides its input.

    ``rope`` covers the left neighbour's tokens, the unit's S, and the right neighbour's; None: positions are in the
    tokens. ``text_lengths`` are the tokens of each prompt, N together.
    """

    rope: Rope | None
    spans: Sequence[JointSpan]
    text_lengths: Sequence[int]


def joint_attention(index: int, text: Sequence[Tensor], video: Sequence[Tensor], context: JointContext) -> Tensor:
    """Attention of layer ``index``: [1, N + S, H, D], text first.

    ``text`` and ``video`` are queries, keys and values, normed; video is rotated here. Keys are stored before that, for
    the neighbour sees them at another position.
    """
    query, key, value = video
    context.stored.append([KvPart(key[:, span].clone(), value[:, span].clone()) for span in context.store_at(index)])
    if context.rope is not None:
        query = rotate(query, rows(context.rope, context.num_left, context.num_left + query.shape[1]))
    sides = [[side[index]] if side else [] for side in (context.left, context.right)]
    key = torch.cat([*(kv.key for kv in sides[0]), key, *(kv.key for kv in sides[1])], 1)
    value = torch.cat([*(kv.value for kv in sides[0]), value, *(kv.value for kv in sides[1])], 1)
    if context.rope is not None:
        key = rotate(key, context.rope)
        if shared := context.shared_at(index):
            place = rows(context.rope, context.shared_stop - shared.key.shape[1], context.shared_stop)
            key, value = torch.cat([key, rotate(shared.key, place)], 1), torch.cat([value, shared.value], 1)
    if len(context.text_lengths) == 1:
        query, key, value = (torch.cat(pair, 1) for pair in zip(text, (query, key, value), strict=True))
        return context.attention(index).whole(query, key, value, Heads.all(query.shape[2]))
    parts = list(zip(*(x.split(list(context.text_lengths), 1) for x in text), strict=True))

    def attend_with(queries: Tensor, prompt: int) -> Tensor:
        return attend(queries, torch.cat([parts[prompt][1], key], 1), torch.cat([parts[prompt][2], value], 1))

    outputs = [attend_with(part[0], prompt) for prompt, part in enumerate(parts)]
    for span in context.spans:
        out = attend_with(query[:, span.tokens], span.first)
        if span.second is not None:
            out = torch.lerp(out, attend_with(query[:, span.tokens], span.second), span.weight)
        outputs.append(out)
    return torch.cat(outputs, 1)


def joint_spans(blends: Sequence[PromptBlend], prompts: Sequence[int], per_latent: int) -> list[JointSpan]:
    """Spans of consecutive latents that follow the same prompts, as places among the unit's."""
    spans, start = [], 0
    for blend, latents in groupby(blends):
        stop = start + per_latent * len(list(latents))
        second = prompts.index(blend.b) if blend.weight and blend.b != blend.a else None
        spans.append(JointSpan(slice(start, stop), prompts.index(blend.a), second, blend.weight))
        start = stop
    return spans
