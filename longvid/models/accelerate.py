"""Sparse attention and caches in somebody else's diffusers pipeline: one call, and one to undo it.

Shapes: B batch, L tokens, H heads, D of a head; hidden states of a Wan transformer [B, C, latents, h, w].
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from longvid.cache.settings import NoCache, RegionAdaptive
from longvid.document import Document, validate
from longvid.errors import InputError
from longvid.kernels.dense import attend
from longvid.models.accelerate_cache import CacheAcceleration
from longvid.models.clock import PipelineClock
from longvid.parallel.sequence import Rope, rotate
from longvid.settings import Settings
from longvid.sparsity.make import make_policy
from longvid.sparsity.policy import Heads, Policy
from longvid.sparsity.runtime import Place, SparseRuntime
from longvid.sparsity.settings import Dense
from longvid.sparsity.tokens import TokenMap

Pipeline = TypeVar("Pipeline")

TRANSFORMERS = ("transformer", "transformer_2")


def accelerate(
    pipe: Pipeline, attention: str | Mapping[str, Any] = "dense", cache: str | Mapping[str, Any] = "none"
) -> Pipeline:
    """Give the transformers of a loaded diffusers pipeline sparse self-attention, a cache, or both. Returns it.

    ``attention`` and ``cache`` are names of policies, or mappings as in a preset's sections:
    ``attention={"policy": "adaspa", "tile": 128}, cache="taylorseer"``. The pipeline is used as before; its scheduler
    says which step it is at. Accelerating again replaces what was there. Raises InputError for wrong settings, and for
    a pipeline whose transformer is not a Wan model.
    """
    sections = {"attention": _section(attention), "cache": _section(cache)}
    settings = validate(Settings, Document("accelerate", sections))
    if isinstance(settings.cache, RegionAdaptive):
        raise InputError("accelerate: cache ras is the engine's; in a pipeline's own layers all tokens go through")
    models = _transformers(pipe)
    restore(pipe)
    for model in models:
        if not isinstance(settings.attention, Dense):
            policy = make_policy(settings.attention)
            _Acceleration(model, pipe, policy, always=settings.attention.crossover == "always")
        if not isinstance(settings.cache, NoCache):
            CacheAcceleration(model, pipe, settings.cache)
    return pipe


def restore(pipe: Pipeline) -> Pipeline:
    """Undo ``accelerate``: what stood in its place before stands there again."""
    for model in _transformers(pipe):
        processor = model.blocks[0].attn1.processor
        if isinstance(processor, PolicySelfAttention):
            processor.owner.remove()
        cache = getattr(model.forward, "owner", None)
        if isinstance(cache, CacheAcceleration):
            cache.remove()
    return pipe


def _section(policy: str | Mapping[str, Any]) -> dict[str, Any]:
    return {"policy": policy} if isinstance(policy, str) else dict(policy)


def _transformers(pipe: Any) -> list[WanTransformer3DModel]:
    found = [model for name in TRANSFORMERS if (model := getattr(pipe, name, None)) is not None]
    for model in found:
        if not isinstance(model, WanTransformer3DModel):
            raise InputError(f"accelerate: {type(model).__name__} is not supported; WanTransformer3DModel is")
    if not found or not hasattr(pipe, "scheduler"):
        raise InputError(f"accelerate: {type(pipe).__name__} is not a pipeline with a transformer and a scheduler")
    return found


class _Acceleration:
    """One transformer with a policy: processors of ours in its self-attention, and a hook that sees where it is."""

    def __init__(self, model: WanTransformer3DModel, pipe: Any, policy: Policy, *, always: bool) -> None:
        self._policy, self._always = policy, always
        self.clock = PipelineClock(pipe)
        self.runtime: SparseRuntime | None = None
        self.tokens: TokenMap | None = None
        self._patch, self._num_layers = model.config.patch_size, len(model.blocks)
        self._layers = [block.attn1 for block in model.blocks]
        self._before = [layer.processor for layer in self._layers]
        for index, layer in enumerate(self._layers):
            layer.set_processor(PolicySelfAttention(index, self))
        self._hook = model.register_forward_pre_hook(self._begin, with_kwargs=True)

    def remove(self) -> None:
        self._hook.remove()
        for layer, processor in zip(self._layers, self._before, strict=True):
            layer.set_processor(processor)

    def _begin(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward pass: the step it is at, by its timestep among the scheduler's."""
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        if self.clock.tick(timestep) or self.runtime is None:
            self.runtime = SparseRuntime(self._policy, self._num_layers, self.clock.num_steps, always=self._always)
        t, h, w = (size // patch for size, patch in zip(hidden.shape[2:], self._patch, strict=True))
        tokens = TokenMap(range(t), range(t), range(t), h, w)
        if tokens != self.tokens and not self.runtime.pays(tokens, hidden.device):
            warnings.warn(
                f"longvid.accelerate: attention to {tokens.num_keys} tokens is faster dense here, so it stays dense",
                stacklevel=2,
            )
        self.tokens = tokens


class PolicySelfAttention:
    """Attention processor of one Wan layer, a sibling of diffusers' own, in which a policy chooses the scores."""

    def __init__(self, index: int, owner: _Acceleration) -> None:
        self._index, self.owner = index, owner

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rope | None = None,
    ) -> Tensor:
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, attn.to_v(hidden_states)))
        if rotary_emb is not None:
            query, key = rotate(query, rotary_emb), rotate(key, rotary_emb)
        out: Tensor = attn.to_out[0](self._attend(query, key, value).flatten(2).type_as(query))
        return out

    def _attend(self, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
        clock, runtime, tokens = self.owner.clock, self.owner.runtime, self.owner.tokens
        assert runtime is not None and tokens is not None
        place = Place(clock.run, clock.branch, self._index, clock.step)
        sparse = runtime.at(place, tokens, q_BLHD.device)
        if sparse is None:
            return attend(q_BLHD, k_BLHD, v_BLHD)
        with torch.no_grad():
            return sparse.whole(q_BLHD, k_BLHD, v_BLHD, Heads.all(q_BLHD.shape[2]))
