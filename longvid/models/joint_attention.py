"""Joint attention of text and video tokens in a queue: neighbours' K/V, and each latent with its own scene's prompt.

Shapes: B = 1, N text tokens of a prompt, P prompts of a unit, S video tokens of a unit, H heads, D of a head.
Text of all prompts of a unit goes through the layers side by side, [1, P·N, E]. Only attention knows that they are
several: a prompt's text sees itself and all video, and a latent's tokens see all video and their own prompt's text.
With one prompt that is the attention that the model was trained with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longvid.kernels.dense import attend
from longvid.parallel.sequence import KvPart, Rope, rotate, rows, without_scene


@dataclass(frozen=True)
class JointSpan:
    """Video tokens that follow one prompt, or two: (1 - weight) · first + weight · second. Both index the P prompts."""

    tokens: slice
    first: int
    second: int | None = None
    weight: float = 0.0


@dataclass(frozen=True)
class JointContext:
    """What joint attention needs besides its input: one a forward pass and guidance branch.

    ``rope`` covers the left neighbour's tokens, the unit's S, and the right neighbour's; None: positions are in the
    tokens. ``left`` and ``right`` hold K/V a layer. K/V of the spans in ``store`` are appended to ``stored``. Layers in
    ``sharing`` also read ``shared``, how the scene before ended, in the place before token ``shared_stop`` of ``rope``;
    with ``stores_scene`` the last of ``store`` is such an end, kept by them alone.
    """

    rope: Rope | None
    spans: Sequence[JointSpan]
    text_tokens: int
    left: list[KvPart] | None = None
    right: list[KvPart] | None = None
    num_left: int = 0
    store: tuple[slice, ...] = ()
    stored: list[list[KvPart]] = field(default_factory=list)
    shared: list[KvPart] | None = None
    shared_stop: int = 0
    stores_scene: bool = False
    sharing: range = range(0)


def joint_attention(index: int, text: Sequence[Tensor], video: Sequence[Tensor], context: JointContext) -> Tensor:
    """Attention of layer ``index``: [1, P·N + S, H, D], text first.

    ``text`` and ``video`` are queries, keys and values, normed; video is rotated here. Keys are stored before that, for
    the neighbour sees them at another position.
    """
    query, key, value = video
    is_sharing = index in context.sharing
    store = context.store if is_sharing else without_scene(context.store, context.stores_scene)
    context.stored.append([KvPart(key[:, span].clone(), value[:, span].clone()) for span in store])
    if context.rope is not None:
        query = rotate(query, rows(context.rope, context.num_left, context.num_left + query.shape[1]))
    sides = [[side[index]] if side else [] for side in (context.left, context.right)]
    key = torch.cat([*(kv.key for kv in sides[0]), key, *(kv.key for kv in sides[1])], 1)
    value = torch.cat([*(kv.value for kv in sides[0]), value, *(kv.value for kv in sides[1])], 1)
    if context.rope is not None:
        key = rotate(key, context.rope)
        if context.shared and is_sharing:
            kv = context.shared[index]
            place = rows(context.rope, context.shared_stop - kv.key.shape[1], context.shared_stop)
            key, value = torch.cat([key, rotate(kv.key, place)], 1), torch.cat([value, kv.value], 1)
    parts = list(zip(*(x.split(context.text_tokens, 1) for x in text), strict=True))

    def attend_with(queries: Tensor, prompt: int) -> Tensor:
        return attend(queries, torch.cat([parts[prompt][1], key], 1), torch.cat([parts[prompt][2], value], 1))

    if len(parts) == 1:
        return attend_with(torch.cat([text[0], query], 1), 0)
    outputs = [attend_with(part[0], prompt) for prompt, part in enumerate(parts)]
    for span in context.spans:
        out = attend_with(query[:, span.tokens], span.first)
        if span.second is not None:
            out = torch.lerp(out, attend_with(query[:, span.tokens], span.second), span.weight)
        outputs.append(out)
    return torch.cat(outputs, 1)
