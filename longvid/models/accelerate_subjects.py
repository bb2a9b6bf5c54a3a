"""Transformers of somebody else's pipelines: where their layers are, what those take, and which tokens they see.

Shapes: B batch, S video tokens, N text tokens, H heads, D of a head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    WanTransformer3DModel,
)
from torch import Tensor

from longvid.cache.plan import Module
from longvid.errors import InputError
from longvid.models.hunyuan import dual_outputs, dual_projections
from longvid.parallel.around import Rope, rotate
from longvid.sparsity.tokens import TokenMap

Call = Mapping[str, Any]
"""The arguments of a transformer's call, by their names."""


class Attend(Protocol):
    """Attention of a layer: queries, keys and values [B, tokens, H, D], text first; [B, tokens, H, D] comes out."""

    @property
    def num_text(self) -> int:
        """Text tokens in it, without padding."""
        ...

    def __call__(self, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor: ...


class Subject(ABC):
    """A transformer whose attention or layers are to be accelerated.

    `states` are the arguments of a layer that it returns changed; `arguments` those of the whole transformer, in order.
    `modules` names a layer's modules; empty where text and video go through them together. `rope_dim` is that of the
    tokens in rotary tables; `modulation` are the dims of a layer's `temb` where that may have a row a token, in dim 1.
    """

    states: tuple[str, ...] = ("hidden_states",)
    arguments: tuple[str, ...] = ("hidden_states", "encoder_hidden_states", "timestep")
    modules: Mapping[Module, str] = {}
    rope_dim = 0
    modulation = 0

    def __init__(self, model: Any) -> None:
        self.model = model

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """A call of the transformer."""
        return {**dict(zip(self.arguments, args, strict=False)), **kwargs}

    @property
    def layers(self) -> Sequence[Any]:
        """In the order in which they run."""
        blocks: Sequence[Any] = self.model.transformer_blocks
        return blocks

    def attention(self, layer: Any) -> Any:
        """The module of a layer in which video tokens see each other."""
        return layer.attn1

    @abstractmethod
    def grid(self, call: Call) -> tuple[int, int, int]:
        """Latents, rows and columns of the tokens of a call."""

    def num_text(self, call: Call) -> int:
        """Text tokens that attention sees beside them."""
        return 0

    def tokens(self, call: Call) -> TokenMap:
        """Where the tokens of a call are."""
        t, h, w = self.grid(call)
        return TokenMap(range(t), range(t), range(t), h, w, text_before=self.num_text(call))

    @abstractmethod
    def processor(self, attend: Attend) -> Any:
        """An attention processor, a sibling of diffusers' own, that leaves the scores to ``attend``."""


class WanSubject(Subject):
    """Wan: text has an attention of its own."""

    arguments = ("hidden_states", "timestep")
    modules: Mapping[Module, str] = {"self": "attn1", "text": "attn2", "ffn": "ffn"}
    rope_dim = 1
    modulation = 4

    @property
    def layers(self) -> Sequence[Any]:
        blocks: Sequence[Any] = self.model.blocks
        return blocks

    def grid(self, call: Call) -> tuple[int, int, int]:
        sizes = zip(call["hidden_states"].shape[2:], self.model.config.patch_size, strict=True)
        t, h, w = (size // patch for size, patch in sizes)
        return t, h, w

    def processor(self, attend: Attend) -> Any:
        return WanProcessor(attend)


class LtxSubject(Subject):
    """LTX-Video: text has an attention of its own; tokens come in a row."""

    arguments = (*Subject.arguments, "encoder_attention_mask", "num_frames", "height", "width")
    modules: Mapping[Module, str] = {"self": "attn1", "text": "attn2", "ffn": "ff"}
    rope_dim = 1
    modulation = 3

    def grid(self, call: Call) -> tuple[int, int, int]:
        return call["num_frames"], call["height"], call["width"]

    def processor(self, attend: Attend) -> Any:
        return LtxProcessor(attend)


class CogVideoXSubject(Subject):
    """CogVideoX: text and video see each other."""

    states = ("hidden_states", "encoder_hidden_states")

    def grid(self, call: Call) -> tuple[int, int, int]:
        _, frames, _, height, width = call["hidden_states"].shape
        patch, config = self.model.config.patch_size, self.model.config
        return frames // (config.patch_size_t or 1), height // patch, width // patch

    def num_text(self, call: Call) -> int:
        return int(call["encoder_hidden_states"].shape[1])

    def processor(self, attend: Attend) -> Any:
        return CogVideoXProcessor(attend)


class HunyuanSubject(Subject):
    """HunyuanVideo: text and video see each other, in layers of two kinds; text is padded, and padding masked."""

    arguments = ("hidden_states", "timestep")
    states = ("hidden_states", "encoder_hidden_states")

    @property
    def layers(self) -> Sequence[Any]:
        return [*self.model.transformer_blocks, *self.model.single_transformer_blocks]

    def attention(self, layer: Any) -> Any:
        return layer.attn

    def grid(self, call: Call) -> tuple[int, int, int]:
        _, _, frames, height, width = call["hidden_states"].shape
        patch, config = self.model.config.patch_size, self.model.config
        return frames // config.patch_size_t, height // patch, width // patch

    def num_text(self, call: Call) -> int:
        lengths = call["encoder_attention_mask"].sum(1).int().tolist()
        if len(set(lengths)) > 1:
            raise InputError(f"accelerate: the prompts of one call have {lengths} tokens, but must have as many each")
        return int(lengths[0])

    def processor(self, attend: Attend) -> Any:
        return HunyuanProcessor(attend)


SUBJECTS: dict[type, type[Subject]] = {
    WanTransformer3DModel: WanSubject,
    LTXVideoTransformer3DModel: LtxSubject,
    CogVideoXTransformer3DModel: CogVideoXSubject,
    HunyuanVideoTransformer3DModel: HunyuanSubject,
}


def subject_of(model: Any) -> Subject:
    """Raises InputError for a transformer that is not known."""
    for kind, subject in SUBJECTS.items():
        if isinstance(model, kind):
            return subject(model)
    known = ", ".join(kind.__name__ for kind in SUBJECTS)
    raise InputError(f"accelerate: {type(model).__name__} is not supported; these are: {known}")


# ---------------------------------------------------------------------------------------------------------- processors


class PolicyProcessor:
    """What the processors below share."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend

    def project_out(self, attn: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What attention gives to a layer, through its output projection."""
        out: Tensor = attn.to_out[0](self.attend(query, key, value).flatten(2).type_as(query))
        return out


class WanProcessor(PolicyProcessor):
    """Of a Wan layer's self-attention."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rope | None = None,
    ) -> Tensor:
        query, key, value = _own_projections(attn, hidden_states)
        if rotary_emb is not None:
            query, key = rotate(query, rotary_emb), rotate(key, rotary_emb)
        return self.project_out(attn, query, key, value)


class LtxProcessor(PolicyProcessor):
    """Of an LTX layer's self-attention: its rotary rows are for all heads side by side."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rope | None = None,
    ) -> Tensor:
        query, key, value = _own_projections(attn, hidden_states)
        if image_rotary_emb is not None:
            cos, sin = (table.unflatten(2, (attn.heads, -1)) for table in image_rotary_emb)
            query, key = rotate(query, (cos, sin)), rotate(key, (cos, sin))
        return self.project_out(attn, query, key, value)


class CogVideoXProcessor(PolicyProcessor):
    """Of a CogVideoX layer: text, then video."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        image_rotary_emb: Rope | None = None,
    ) -> tuple[Tensor, Tensor]:
        num_text = encoder_hidden_states.shape[1]
        joined = torch.cat([encoder_hidden_states, hidden_states], 1)
        query, key, value = (x(joined).unflatten(2, (attn.heads, -1)) for x in (attn.to_q, attn.to_k, attn.to_v))
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (_rotate_behind(x, num_text, image_rotary_emb) for x in (query, key))
        out: Tensor = attn.to_out[0](self.attend(query, key, value).flatten(2).type_as(query))
        return out[:, num_text:], out[:, :num_text]


class HunyuanProcessor(PolicyProcessor):
    """Of a HunyuanVideo layer of either kind. Padding is left out, and gets nothing."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rope | None = None,
    ) -> tuple[Tensor, Tensor]:
        num_padded, num_text = encoder_hidden_states.shape[1], self.attend.num_text
        text, video = dual_projections(attn, encoder_hidden_states, hidden_states)
        joined = [torch.cat([a[:, :num_text], b], 1) for a, b in zip(text, video, strict=True)]
        if image_rotary_emb is not None:
            joined[:2] = [_rotate_behind(x, num_text, image_rotary_emb) for x in joined[:2]]
        out = self.attend(*joined).flatten(2).type_as(hidden_states)
        padding = out.new_zeros(out.shape[0], num_padded - num_text, out.shape[2])
        return dual_outputs(attn, torch.cat([out[:, :num_text], padding, out[:, num_text:]], 1), num_padded)


def _own_projections(attn: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with a norm over all heads, [B, S, H, D]."""
    query, key = attn.norm_q(attn.to_q(hidden)), attn.norm_k(attn.to_k(hidden))
    query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, attn.to_v(hidden)))
    return query, key, value


def _rotate_behind(x_BLHD: Tensor, num_text: int, tables: Rope) -> Tensor:
    """Video behind text, rotated by tables [S, D]."""
    rope = tables[0][None, :, None], tables[1][None, :, None]
    return torch.cat([x_BLHD[:, :num_text], rotate(x_BLHD[:, num_text:], rope)], 1)
