"""Layers of a transformer as a stage of the queue: passes through them, with a cache and sparse attention.

Shapes: l tokens of a unit on this rank, E their width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from longvid.cache.plan import Module, StepPlan
from longvid.cache.regions import Active
from longvid.cache.runtime import CacheRuntime
from longvid.models.linear import take_linears
from longvid.parallel.around import Around, KvPart, without_scene
from longvid.parallel.attention import Attention, DenseAttention
from longvid.parallel.sequence import SequenceAttention, WholeSequence
from longvid.parallel.stage import Begun, Output, Unit
from longvid.sparsity.runtime import Place, SparseRuntime
from longvid.sparsity.tokens import TokenMap

BranchKv = list[list[KvPart]]
"""K/V of a span of latents: [branch][layer], of the branches and layers that this stage runs."""

RunModule = Callable[[int, Module, Callable[[], Tensor]], Tensor]
"""Gives what a module of a layer (an index in the stage) computes, or in its place what a cache forecasts."""


def run_module(_index: int, _module: Module, compute: Callable[[], Tensor]) -> Tensor:
    """Without a cache."""
    return compute()


def dense_everywhere(_index: int) -> Attention:
    """Without a policy of sparse attention."""
    return DenseAttention()


def equal_costs(_index: int) -> None:
    """Without a policy that makes some heads cost more than others."""


@dataclass(frozen=True, kw_only=True)
class LayerContext:
    """What attention needs besides its input: one a forward pass and guidance branch.

    ``left`` and ``right`` hold the neighbours' K/V a layer, ``num_left`` is how many tokens the left one's are. K/V of
    the spans in ``store`` (of the unit's tokens) are appended to ``stored``, a layer each. ``attention`` and
    ``head_costs`` give those of a layer of the stage. A layer of which no K/V are computed stores those that an earlier
    step stored: for each span a layer's, ``kept``.

    Layers in ``sharing`` also read ``shared``, how the scene before ended, in the place before token ``shared_stop`` of
    the tokens that positions are given to; with ``stores_scene`` the last of ``store`` is such an end, kept by them
    alone.
    """

    left: list[KvPart] | None = None
    right: list[KvPart] | None = None
    num_left: int = 0
    store: tuple[slice, ...] = ()
    stored: list[list[KvPart]] = field(default_factory=list)
    attention: Callable[[int], Attention] = dense_everywhere
    head_costs: Callable[[int], Sequence[float] | None] = equal_costs
    kept: tuple[list[KvPart], ...] = ()
    shared: list[KvPart] | None = None
    shared_stop: int = 0
    stores_scene: bool = False
    sharing: range = range(0)

    def shared_at(self, index: int) -> KvPart | None:
        """How the scene before ended, for a layer that reads it."""
        return self.shared[index] if self.shared and index in self.sharing else None

    def store_at(self, index: int) -> tuple[slice, ...]:
        """The spans of which a layer stores K/V."""
        return self.store if index in self.sharing else without_scene(self.store, self.stores_scene)

    def around(self, index: int, **more: Any) -> Around:
        """What a layer's attention reads besides its input; ``more`` are the fields that not all families share."""
        fields: dict[str, Any] = {
            "left": self.left[index] if self.left else None,
            "right": self.right[index] if self.right else None,
            "num_left": self.num_left,
            "store": self.store_at(index),
            "head_costs": self.head_costs(index),
            "shared": self.shared_at(index),
            "shared_stop": self.shared_stop,
        }
        return Around(**fields, **more)

    def keep_earlier(self, index: int) -> None:
        """For a layer of which no K/V are computed."""
        self.stored.append([span[index] for span in self.kept])


@dataclass
class Pass:
    """One branch of a unit on its way through the layers: `hidden` [1, l, E] entered the stage as `entering`.

    `layer` runs the stage's layer of an index; `head` makes the velocity of the last one's output. `anchor` is what
    entered the step's span of layers, where a cache remembers what that adds. Of `hidden`, the rows from `first_row` on
    are latents' tokens: of the unit's `num_tokens` those from `start` on; or `active`, where a cache leaves tokens out.
    """

    branch: int
    hidden: Tensor
    anchor: Tensor | None
    context: LayerContext
    layer: Callable[[int, Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    num_tokens: int
    start: int = 0
    first_row: int = 0
    active: Active | None = None
    entering: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.entering = self.hidden


class LayerStage(ABC):
    """Some layers of a transformer; implements the executor's Stage.

    ``first_layer`` is the first one's place in the model. ``branches`` are those that it runs: 0 follows the prompts,
    1 the negatives. ``sequence`` spreads a unit's tokens over ranks, ``attention`` makes self-attention sparse,
    ``cache`` leaves layers or modules out, ``linear`` is the setting `runtime.linear`. A family says how a unit enters,
    how a layer is run, and what the last one's output means (`passes`).
    """

    def __init__(
        self,
        *,
        branches: Sequence[int] = (0,),
        is_first: bool = True,
        is_last: bool = True,
        first_layer: int = 0,
        sequence: SequenceAttention | None = None,
        attention: SparseRuntime | None = None,
        cache: CacheRuntime | None = None,
        linear: str = "auto",
    ) -> None:
        self.branches = tuple(branches)
        self.is_first, self.is_last = is_first, is_last
        self.first_layer = first_layer
        self.sequence = sequence or WholeSequence()
        self.attention, self.cache = attention, cache
        self._linear = linear

    @property
    @abstractmethod
    def layers(self) -> Sequence[nn.Module]:
        """The stage's own, in order."""

    def _take_linears(self) -> None:
        """To be called by a family when the layers are there."""
        if self._linear == "auto":
            take_linears(self.layers)

    @property
    def num_branches(self) -> int:
        return len(self.branches)

    @property
    def caches_modules(self) -> bool:
        """Whether a cache may forecast single modules of layers."""
        return self.cache is not None and bool(self.cache.plan.kept_modules)

    @abstractmethod
    def passes(self, unit: Unit) -> list[Pass]:
        """Each branch of a unit as it enters the stage."""

    def conditioned(self, unit: Unit) -> Unit:
        """The unit with what else the film is to follow; asked once a unit, before its first layer here."""
        return unit

    def leave(self, hidden: Tensor, num_tokens: int) -> Tensor:
        """A branch's hidden states as they travel to the next stage: of a shape that does not depend on the prompts."""
        return hidden

    @torch.no_grad()
    def forward(self, unit: Unit) -> Output:
        """Hidden states, or on the last stage the velocity of the unit's own latents; and the K/V that it asks for."""
        if self.cache and self.cache.plan.gate and self.is_first:
            return self.go_on(self.begin(unit), is_left_out=False)
        unit = self.conditioned(unit)
        passes = self.passes(unit)
        self._run(passes, unit, range(len(self.layers)), is_left_out=unit.is_left_out)
        return self._end(passes, unit)

    @torch.no_grad()
    def begin(self, unit: Unit) -> Begun:
        """The layers up to the cache's gate; what it looks at where this rank has the prompt's branch."""
        assert self.cache and self.cache.plan.gate
        unit = self.conditioned(unit)
        passes = self.passes(unit)
        self._run(passes, unit, range(self.cache.plan.gate.layers), is_left_out=False)
        one = passes[0]
        if one.branch != 0:
            return Begun(unit, None, passes)
        entering, hidden = one.entering[:, one.first_row :], one.hidden[:, one.first_row :]
        return Begun(unit, self.cache.probe(entering, hidden, one.start, one.num_tokens), passes)

    @torch.no_grad()
    def go_on(self, begun: Begun, *, is_left_out: bool) -> Output:
        """The layers behind the gate, or what they would have added."""
        assert self.cache and self.cache.plan.gate
        unit, passes = begun.unit, begun.work
        assert isinstance(passes, list)
        if begun.probe is not None and not is_left_out:
            self.cache.learn_gate(unit.chunk.index, unit.step, begun.probe)
        self._run(passes, unit, range(self.cache.plan.gate.layers, len(self.layers)), is_left_out=is_left_out)
        return self._end(passes, unit)

    def run_module(self, unit: Unit, branch: int) -> RunModule:
        """How modules of layers are run in one pass: with a table, not all of them are."""
        cache = self.cache
        if not cache or not self.caches_modules:
            return run_module

        def run(index: int, module: Module, compute: Callable[[], Tensor]) -> Tensor:
            place = unit.chunk.index, branch, self.first_layer + index
            return cache.module(place, module, unit.step, compute)

        return run

    def layer_attention(
        self, unit: Unit, branch: int, tokens: TokenMap, device: torch.device
    ) -> Callable[[int], Attention]:
        """Self-attention of each layer of the stage in one pass of a unit."""
        runtime = self.attention
        if runtime is None:
            return dense_everywhere

        def at(index: int) -> Attention:
            place = Place(unit.chunk.index, branch, self.first_layer + index, unit.step)
            return runtime.at(place, tokens, device) or DenseAttention()

        return at

    def layer_costs(self, index: int) -> Sequence[float] | None:
        """What each head of a layer of the stage costs beside the others."""
        return self.attention.policy.head_costs(self.first_layer + index) if self.attention else None

    def entering(self, unit: Unit) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        """What each branch begins with where the stage is not the first: [1, l, E] as the stage before left it.

        And what entered the step's span of layers, if this stage begins inside it.
        """
        assert unit.hidden is not None
        count = min(unit.num_branches, self.num_branches)
        parts = unit.hidden.split(1)
        return parts[:count], parts[count:] or [None] * count

    def _run(self, passes: Sequence[Pass], unit: Unit, indices: range, *, is_left_out: bool) -> None:
        """Some of the stage's layers, but for those of the step's span if it is left out."""
        plan = self.cache.at(unit.step) if self.cache else StepPlan()
        is_left_out |= plan.treatment == "forecast"
        for one in passes:
            for index in indices:
                layer = self.first_layer + index
                if layer == plan.span.start and not is_left_out:
                    one.anchor = one.hidden
                if is_left_out and layer in plan.span:
                    one.context.keep_earlier(index)
                else:
                    one.hidden = one.layer(index, one.hidden)
                if layer == plan.span.stop - 1:
                    self._end_span(one, unit, is_left_out=is_left_out)

    def _end_span(self, one: Pass, unit: Unit, *, is_left_out: bool) -> None:
        """Behind the last layer of the step's span: add what its layers added before, or remember what they did."""
        assert self.cache
        series = self.cache.span(unit.chunk.index, one.branch, unit.step)
        if is_left_out:
            one.hidden = one.hidden + series.forecast(unit.step)
        else:
            assert one.anchor is not None
            series.learn(one.hidden - one.anchor, unit.step)

    def _end(self, passes: Sequence[Pass], unit: Unit) -> Output:
        """What the stage gives, when all its layers are done; policies forget what no later step reads."""
        output = self._output(passes, unit)
        for runtime in (self.attention, self.cache):
            if runtime:
                runtime.end_step(unit.chunk.index, unit.step)
        return output

    def _output(self, passes: Sequence[Pass], unit: Unit) -> Output:
        stored = [one.context.stored for one in passes]
        kv = tuple(
            [[layer[span] for layer in layers] for layers in stored] + _of_branches(unit, span, len(passes))
            for span in range(len(unit.store))
        )
        if self.is_last:
            return Output(velocity=torch.stack([one.head(one.hidden) for one in passes]), kv=kv)
        leaving = [(one.hidden, one.num_tokens) for one in passes]
        if self._ends_inside(unit):
            leaving += [(one.anchor, one.num_tokens) for one in passes if one.anchor is not None]
        hidden = torch.cat([self.leave(*states) for states in leaving])
        if active := passes[0].active:
            hidden = torch.cat([hidden, active.as_rows(hidden).expand(len(hidden), -1, -1)], dim=1)
        return Output(hidden=hidden, kv=kv)

    def _ends_inside(self, unit: Unit) -> bool:
        """Whether the next stage begins inside the step's span of layers."""
        span = self.cache.at(unit.step).span if self.cache else range(0)
        return span.start < self.first_layer + len(self.layers) < span.stop


class CachedFeedForward(nn.Module):
    """A layer's feed-forward, with a cache in front. ``run`` is the pass's at hand."""

    def __init__(self, index: int, inner: nn.Module) -> None:
        super().__init__()
        self.index, self.inner = index, inner
        self.run: RunModule = run_module

    def forward(self, hidden: Tensor) -> Tensor:
        return self.run(self.index, "ffn", lambda: self.inner(hidden))


def token_map(unit: Unit, num_before: int, num_after: int, grid: tuple[int, int], *, text_before: int = 0) -> TokenMap:
    """Where a unit's tokens are, with so many latents of neighbours' K/V before and after them, and text first."""
    chunk = unit.chunk
    stop = chunk.start + chunk.num_latents
    start = stop - len(unit.timesteps)
    queries, keys = range(start, stop), range(start - num_before, stop + num_after)
    return TokenMap(queries, keys, range(chunk.start, stop), *grid, text_before=text_before)


def neighbours(unit: Unit) -> tuple[int, int]:
    """Latents of the left and of the right neighbour of which the unit is given K/V."""
    return unit.chunk.num_left if unit.left is not None else 0, unit.chunk.num_right if unit.right is not None else 0


def context_of(unit: Unit, index: int, per_latent: int) -> dict[str, Any]:
    """The fields of a `LayerContext` that follow from the unit, for a branch of the stage."""
    return {
        "left": _of_branch(unit.left, index),
        "right": _of_branch(unit.right, index),
        "num_left": neighbours(unit)[0] * per_latent,
        "store": tuple(slice(span.start * per_latent, span.stop * per_latent) for span in unit.store),
        "kept": tuple(layers for span in unit.kept if (layers := _of_branch(span, index))),
        "shared": _of_branch(unit.shared, index),
        "shared_stop": unit.chunk.num_left * per_latent,
        "stores_scene": unit.stores_scene,
        "sharing": unit.sharing,
    }


def _of_branches(unit: Unit, span: int, start: int) -> BranchKv:
    """K/V that an earlier step stored of the branches from one on, which did not run."""
    if not unit.kept:
        return []
    kept = unit.kept[span]
    assert isinstance(kept, list)
    return kept[start:]


def _of_branch(kv: object, branch: int) -> list[KvPart] | None:
    if kv is None:
        return None
    assert isinstance(kv, list)
    layers: list[KvPart] = kv[branch]
    return layers
