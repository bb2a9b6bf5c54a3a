"""Sparse attention and caches in somebody else's diffusers pipeline: one call, and one to undo it.

Shapes: B batch, L tokens, H heads, D of a head.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from longvid.cache.settings import CacheSettings, NoCache, RegionAdaptive
from longvid.document import Document, validate
from longvid.errors import InputError
from longvid.kernels.dense import attend
from longvid.models.accelerate_cache import CacheAcceleration
from longvid.models.accelerate_subjects import PolicyProcessor, Subject, subject_of
from longvid.models.clock import PipelineClock
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
    """Give the transformers of a loaded diffusers pipeline sparse attention, a cache, or both. Returns it.

    For Wan, HunyuanVideo, CogVideoX and LTX-Video. ``attention`` and ``cache`` are names of policies, or mappings as in
    a preset's sections: ``attention={"policy": "adaspa", "tile": 128}, cache="taylorseer"``. Text that is among the
    tokens is always seen. The pipeline is used as before; its scheduler says which step it is at. Accelerating again
    replaces what was there. Raises InputError for wrong settings, and for a transformer that they do not fit.
    """
    sections = {"attention": _section(attention), "cache": _section(cache)}
    settings = validate(Settings, Document("accelerate", sections))
    subjects = _subjects(pipe)
    for subject in subjects:
        _require_cache(settings.cache, subject)
    restore(pipe)
    for subject in subjects:
        if not isinstance(settings.attention, Dense):
            policy = make_policy(settings.attention)
            _Acceleration(subject, pipe, policy, always=settings.attention.crossover == "always")
        if not isinstance(settings.cache, NoCache):
            CacheAcceleration(subject, pipe, settings.cache)
    return pipe


def restore(pipe: Pipeline) -> Pipeline:
    """Undo ``accelerate``: what stood in its place before stands there again."""
    for subject in _subjects(pipe):
        processor = subject.attention(subject.layers[0]).processor
        if isinstance(processor, PolicyProcessor) and isinstance(processor.attend, PolicyAttend):
            processor.attend.owner.remove()
        cache = getattr(subject.model.forward, "owner", None)
        if isinstance(cache, CacheAcceleration):
            cache.remove()
    return pipe


def _require_cache(cache: CacheSettings, subject: Subject) -> None:
    """Raises InputError for a cache that cannot be put around a pipeline's layers."""
    if isinstance(cache, RegionAdaptive):
        raise InputError("accelerate: cache ras is the engine's; in a pipeline's own layers all tokens go through")
    if cache.negative_every > 1:
        raise InputError(
            "accelerate: cache.negative_every must be 1: a pipeline calls its transformer for the negative"
        )
    if cache.is_of_modules and not subject.modules:
        name = type(subject.model).__name__
        raise InputError(
            f"accelerate: cache.policy {cache.policy}: layers of a {name} take text and video together, so they are "
            "left out whole, not module by module: use cache.level output or last_layer, and no table"
        )


def _section(policy: str | Mapping[str, Any]) -> dict[str, Any]:
    return {"policy": policy} if isinstance(policy, str) else dict(policy)


def _subjects(pipe: Any) -> list[Subject]:
    found = [subject_of(model) for name in TRANSFORMERS if (model := getattr(pipe, name, None)) is not None]
    if not found or not hasattr(pipe, "scheduler"):
        raise InputError(f"accelerate: {type(pipe).__name__} is not a pipeline with a transformer and a scheduler")
    return found


class _Acceleration:
    """One transformer with a policy: processors of ours in its attention, and a hook that sees where it is."""

    def __init__(self, subject: Subject, pipe: Any, policy: Policy, *, always: bool) -> None:
        self._subject, self._policy, self._always = subject, policy, always
        self.clock = PipelineClock(pipe)
        self.runtime: SparseRuntime | None = None
        self.tokens: TokenMap | None = None
        self._layers = [subject.attention(layer) for layer in subject.layers]
        self._before = [layer.processor for layer in self._layers]
        for index, layer in enumerate(self._layers):
            layer.set_processor(subject.processor(PolicyAttend(index, self)))
        self._hook = subject.model.register_forward_pre_hook(self._begin, with_kwargs=True)

    def remove(self) -> None:
        self._hook.remove()
        for layer, processor in zip(self._layers, self._before, strict=True):
            layer.set_processor(processor)

    def _begin(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward pass: the step it is at, by its timestep among the scheduler's."""
        call = self._subject.call(args, kwargs)
        if self.clock.tick(call["timestep"]) or self.runtime is None:
            self.runtime = SparseRuntime(self._policy, len(self._layers), self.clock.num_steps, always=self._always)
        tokens = self._subject.tokens(call)
        if tokens != self.tokens and not self.runtime.pays(tokens, call["hidden_states"].device):
            warnings.warn(
                f"longvid.accelerate: attention to {tokens.num_keys} tokens is faster dense here, so it stays dense",
                stacklevel=2,
            )
        self.tokens = tokens


class PolicyAttend:
    """Attention of one layer in which a policy chooses the scores."""

    def __init__(self, index: int, owner: _Acceleration) -> None:
        self._index, self.owner = index, owner

    @property
    def num_text(self) -> int:
        assert self.owner.tokens is not None
        return self.owner.tokens.num_text

    def __call__(self, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
        clock, runtime, tokens = self.owner.clock, self.owner.runtime, self.owner.tokens
        assert runtime is not None and tokens is not None
        place = Place(clock.run, clock.branch, self._index, clock.step)
        sparse = runtime.at(place, tokens, q_BLHD.device)
        if sparse is None:
            return attend(q_BLHD, k_BLHD, v_BLHD)
        with torch.no_grad():
            return sparse.whole(q_BLHD, k_BLHD, v_BLHD, Heads.all(q_BLHD.shape[2]))
