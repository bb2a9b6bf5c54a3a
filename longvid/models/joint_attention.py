"""Joint attention of text and video tokens in a queue: neighbours' K/V, and each latent with its own scene's prompt.

Shapes: B = 1, N text tokens of a unit's prompts together, s of a unit's S video tokens on this rank, H heads, D of a
head. Text of all prompts of a unit goes through the layers side by side, [1, N, E]. Only attention knows that they are
several: a prompt's text sees itself and all video, and a latent's tokens see all video and their own prompt's text.
With one prompt that is the attention that the model was trained with, and a policy may choose its scores; where scenes
meet in a unit attention is dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

from longvid.models.layer_stage import LayerContext
from longvid.parallel.around import Rope
from longvid.parallel.attention import DenseAttention, JointSpan, Text
from longvid.parallel.sequence import SequenceAttention
from longvid.plan import PromptBlend


@dataclass(frozen=True, kw_only=True)
class JointContext(LayerContext):
    """What joint attention needs besides its input.

    ``rope`` covers the left neighbour's tokens, the unit's S (``num_tokens``), and the right neighbour's; None:
    positions are in the tokens. ``text_lengths`` are the tokens of each prompt, N together.
    """

    rope: Rope | None
    num_tokens: int
    spans: Sequence[JointSpan]
    text_lengths: Sequence[int]


def joint_attention(
    index: int, text: Sequence[Tensor], video: Sequence[Tensor], context: JointContext, sequence: SequenceAttention
) -> Tensor:
    """Attention of layer ``index``: [1, N + s, H, D], text first.

    ``text`` and ``video`` are queries, keys and values, normed. Video is rotated by what spreads it over the ranks, and
    keys are stored before that, for the neighbour sees them at another position.
    """
    is_one = len(context.text_lengths) == 1
    asks, keys, values = text
    around = context.around(
        index,
        rope=context.rope,
        num_tokens=context.num_tokens,
        attention=context.attention(index) if is_one else DenseAttention(),
        text=Text(asks, keys, values, context.text_lengths, context.spans),
    )
    query, key, value = video
    out, stored = sequence.attend(query, key, value, around)
    context.stored.append(stored)
    return out


def joint_spans(blends: Sequence[PromptBlend], prompts: Sequence[int], per_latent: int) -> list[JointSpan]:
    """Spans of consecutive latents that follow the same prompts, as places among the unit's."""
    spans, start = [], 0
    for blend, latents in groupby(blends):
        stop = start + per_latent * len(list(latents))
        second = prompts.index(blend.b) if blend.weight and blend.b != blend.a else None
        spans.append(JointSpan(slice(start, stop), prompts.index(blend.a), second, blend.weight))
        start = stop
    return spans
