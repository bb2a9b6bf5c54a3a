"""Sparse attention, caches and ranks in somebody else's diffusers pipeline: one call, and one to undo it.

Shapes: B batch, L tokens, H heads, D of a head.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from longvid.cache.settings import CacheSettings, NoCache, RegionAdaptive, StaticTable, plan_cache
from longvid.document import Document, validate
from longvid.errors import InputError
from longvid.kernels.dense import attend
from longvid.models.accelerate_cache import CacheAcceleration
from longvid.models.accelerate_sequence import PipelineSequence, join_sequence
from longvid.models.accelerate_subjects import PolicyProcessor, Subject, subject_of
from longvid.models.clock import PipelineClock
from longvid.parallel.attention import Attention, DenseAttention
from longvid.settings import Settings
from longvid.sparsity.make import make_policy
from longvid.sparsity.policy import Heads, Policy
from longvid.sparsity.runtime import Place, SparseRuntime
from longvid.sparsity.settings import Dense
from longvid.sparsity.tokens import TokenMap

Pipeline = TypeVar("Pipeline")

_ANY_STEPS = 2
"""Whether a cache fits a model's layers does not depend on the steps."""

TRANSFORMERS = ("transformer", "transformer_2")


def accelerate(
    pipe: Pipeline,
    attention: str | Mapping[str, Any] = "dense",
    cache: str | Mapping[str, Any] = "none",
    *,
    seq: int = 1,
    ring: int = 1,
) -> Pipeline:
    """Give the transformers of a loaded diffusers pipeline sparse attention, a cache, ranks, or all three. Returns it.

    For Wan, HunyuanVideo, CogVideoX and LTX-Video. ``attention`` and ``cache`` are names of policies, or mappings as in
    a preset's sections: ``attention={"policy": "adaspa", "tile": 128}, cache="taylorseer"``. Text that is among the
    tokens is always seen. ``seq`` spreads the tokens over so many ranks, all that a launcher (torchrun) started, and
    ``ring`` is the part of it that passes K/V around in a ring, as ``mesh.seq`` and ``mesh.ring`` of the engine. All
    ranks then call this, and the pipeline, with the same inputs and seeds; each gets the film.

    The pipeline is used as before; its scheduler says which step it is at. Accelerating again replaces what was there.
    Raises InputError for wrong settings, and for a transformer or ranks that they do not fit.
    """
    sections = {"attention": _section(attention), "cache": _section(cache)}
    settings = validate(Settings, Document("accelerate", sections))
    subjects = _subjects(pipe)
    for subject in subjects:
        _require_cache(settings.cache, subject)
    chosen = settings.attention
    policy_of = None if isinstance(chosen, Dense) else lambda: make_policy(chosen)
    if policy_of and ring > 1 and policy_of().data_dependent:
        reason = "looks at all keys, which no rank of a ring has"
        raise InputError(f"accelerate: ring must be 1, not {ring}: attention {chosen.policy} {reason}")
    always = not isinstance(chosen, Dense) and chosen.crossover == "always"
    mesh = join_sequence(seq, ring, next(subjects[0].model.parameters()).device)
    sequences = [PipelineSequence(subject, mesh) if seq > 1 else None for subject in subjects]
    restore(pipe)
    for subject, sequence in zip(subjects, sequences, strict=True):
        if policy_of or sequence:
            policy = policy_of() if policy_of else None
            _Acceleration(subject, pipe, policy, sequence, always=always)
        if not isinstance(settings.cache, NoCache):
            CacheAcceleration(subject, pipe, settings.cache, sequence)
    return pipe


def restore(pipe: Pipeline) -> Pipeline:
    """Undo ``accelerate``: what stood in its place before stands there again. Ranks that have joined stay together."""
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
    if not (isinstance(cache, StaticTable) and cache.table):  # a table is of a number of steps, which a run will tell
        plan_cache(cache, _ANY_STEPS, len(subject.layers))
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
    """One transformer with a policy, or over ranks: our processors in its attention, and hooks that see its calls."""

    def __init__(
        self, subject: Subject, pipe: Any, policy: Policy | None, sequence: PipelineSequence | None, *, always: bool
    ) -> None:
        self._subject, self._policy, self._always = subject, policy, always
        self.sequence = sequence
        self.clock = PipelineClock(pipe)
        self.runtime: SparseRuntime | None = None
        self.tokens: TokenMap | None = None
        self._layers = [subject.attention(layer) for layer in subject.layers]
        self._before = [layer.processor for layer in self._layers]
        for index, layer in enumerate(self._layers):
            layer.set_processor(subject.processor(PolicyAttend(index, self)))
        self._hook = subject.model.register_forward_pre_hook(self._begin, with_kwargs=True)
        if sequence:
            sequence.install()

    def remove(self) -> None:
        self._hook.remove()
        if self.sequence:
            self.sequence.remove()
        for layer, processor in zip(self._layers, self._before, strict=True):
            layer.set_processor(processor)

    def _begin(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward pass: the step it is at, by its timestep among the scheduler's."""
        call = self._subject.call(args, kwargs)
        is_new, tokens = self.clock.tick(call["timestep"]), self._subject.tokens(call)
        if self._policy:
            self._prepare(self._policy, tokens, call["hidden_states"].device, is_new=is_new)
        self.tokens = tokens

    def _prepare(self, policy: Policy, tokens: TokenMap, device: torch.device, *, is_new: bool) -> None:
        """A new run begins with a memory of its own; where the policy would be slower, say so."""
        if is_new or self.runtime is None:
            self.runtime = SparseRuntime(policy, len(self._layers), self.clock.num_steps, always=self._always)
        if tokens != self.tokens and not self.runtime.pays(tokens, device):
            warnings.warn(
                f"longvid.accelerate: attention to {tokens.num_keys} tokens is faster dense here, so it stays dense",
                stacklevel=2,
            )


class PolicyAttend:
    """Attention of one layer in which a policy chooses the scores, or which other ranks share."""

    def __init__(self, index: int, owner: _Acceleration) -> None:
        self._index, self.owner = index, owner

    @property
    def num_text(self) -> int:
        assert self.owner.tokens is not None
        return self.owner.tokens.num_text

    def __call__(self, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
        attention, sequence = self._attention(q_BLHD.device), self.owner.sequence
        if attention is None and sequence is None:
            return attend(q_BLHD, k_BLHD, v_BLHD)
        with torch.no_grad():
            attention = attention or DenseAttention()
            if sequence is None:
                return attention.whole(q_BLHD, k_BLHD, v_BLHD, Heads.all(q_BLHD.shape[2]))
            return sequence.attend((q_BLHD, k_BLHD, v_BLHD), self.num_text, attention)

    def _attention(self, device: torch.device) -> Attention | None:
        """By the policy; None: dense."""
        clock, runtime, tokens = self.owner.clock, self.owner.runtime, self.owner.tokens
        if runtime is None:
            return None
        assert tokens is not None
        return runtime.at(Place(clock.run, clock.branch, self._index, clock.step), tokens, device)
