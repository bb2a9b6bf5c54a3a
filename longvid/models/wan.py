"""The Wan family's video model as a stage of the queue: patches in, layers, velocity out.

Shapes: C channels, F latents (left context, then own), S tokens a latent, L = F·S, E text width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from longvid.cache.plan import Module, StepPlan
from longvid.cache.runtime import CacheRuntime
from longvid.models.checkpoint import FilmInputs
from longvid.models.wan_attention import (
    CachedFeedForward,
    QueueSelfAttention,
    RunModule,
    SceneTextAttention,
    SelfContext,
    TextContext,
    TextKv,
    TextSpan,
    run_module,
    text_kv,
)
from longvid.parallel.sequence import Attention, DenseAttention, KvPart, Rope, SequenceAttention, WholeSequence
from longvid.parallel.stage import Begun, Output, Unit
from longvid.plan import PromptBlend
from longvid.sparsity.runtime import Place, SparseRuntime
from longvid.sparsity.tokens import TokenMap

TEXT_COLUMNS = 512
"""Length to which the stock pipeline pads every prompt with zeros, unmasked."""

BranchKv = list[list[KvPart]]
"""K/V of a span of latents: [branch][layer], of the branches and layers that this stage runs."""


@dataclass
class _Pass:
    """One branch of a unit on its way through the layers: `hidden` [1, l, E] entered the stage as `entering`.

    `temb` and `modulation` are those of the unit's timesteps (`WanStage._modulation`). `anchor` is what entered the
    step's span of layers, where a cache remembers what that adds.
    """

    branch: int
    hidden: Tensor
    anchor: Tensor | None
    text: TextContext
    context: SelfContext
    temb: Tensor
    modulation: Tensor
    entering: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.entering = self.hidden


class WanStage:
    """Some layers of a ``WanTransformer3DModel``; implements the executor's Stage.

    ``dit.blocks`` are this stage's layers alone, ``first_layer`` the first one's place in the model. ``branches`` are
    those that it runs: 0 follows the prompts, 1 the negatives. ``attention`` makes self-attention sparse, ``cache``
    leaves layers or modules out. Takes the transformer over: its attention processors are replaced, its layers are not.
    """

    def __init__(
        self,
        dit: WanTransformer3DModel,
        *,
        branches: Sequence[int] = (0,),
        is_first: bool = True,
        is_last: bool = True,
        first_layer: int = 0,
        sequence: SequenceAttention | None = None,
        attention: SparseRuntime | None = None,
        cache: CacheRuntime | None = None,
    ) -> None:
        self.dit = dit.eval()
        self.branches = tuple(branches)
        self.dtype = dit.condition_embedder.text_embedder.linear_1.weight.dtype
        self._is_first, self._is_last = is_first, is_last
        self._sequence = sequence or WholeSequence()
        self._first_layer, self._attention, self._cache = first_layer, attention, cache
        for index, block in enumerate(dit.blocks):
            block.attn1.set_processor(QueueSelfAttention(index, self._sequence))
            block.attn2.set_processor(SceneTextAttention(index))
            if cache and cache.plan.kept_modules:
                block.ffn = CachedFeedForward(index, block.ffn)
        self._texts: list[list[TextKv]] = []
        self._times: dict[float, tuple[Tensor, Tensor]] = {}
        self._ropes: dict[tuple[int, int, int], Rope] = {}

    @property
    def num_branches(self) -> int:
        return len(self.branches)

    def prepare(self, inputs: FilmInputs) -> None:
        """Take what the film to come is to follow."""
        self.set_prompts(inputs.prompts, inputs.negatives)

    @torch.no_grad()
    def set_prompts(self, prompts: Sequence[Tensor], negatives: Sequence[Tensor]) -> None:
        """Compute text K/V of every prompt once. Embeddings are [n, E] each, without padding.

        ``negatives`` belong to the prompts one by one; they are needed where branch 1 is run.
        """
        known: dict[int, TextKv] = {}
        self._texts = [
            [self._text(states, known) for states in (prompts, negatives)[branch]] for branch in self.branches
        ]

    def _text(self, states: Tensor, known: dict[int, TextKv]) -> TextKv:
        if id(states) not in known:
            padded = torch.cat([states, states.new_zeros(1, states.shape[1])]).to(self.dtype)
            embedded = self.dit.condition_embedder.text_embedder(padded)
            known[id(states)] = text_kv(self.dit.blocks, embedded, TEXT_COLUMNS)
        return known[id(states)]

    def hidden_shape(self, num_latents: int, latent_size: Sequence[int]) -> tuple[tuple[int, ...], torch.dtype]:
        """[branches, l, E] for this rank's part of the tokens of F latents."""
        part = self._sequence.part(num_latents * (latent_size[0] // 2) * (latent_size[1] // 2))
        return (self.num_branches, part.stop - part.start, self.dit.scale_shift_table.shape[-1]), self.dtype

    @torch.no_grad()
    def forward(self, unit: Unit) -> Output:
        """Hidden states, or on the last stage the velocity of the unit's own latents; and the K/V that it asks for."""
        if self._cache and self._cache.plan.gate and self._is_first:
            return self.go_on(self.begin(unit), is_left_out=False)
        unit = self.conditioned(unit)
        passes = self._passes(unit)
        self._run(passes, unit, range(len(self.dit.blocks)), is_left_out=unit.is_left_out)
        return self._end(passes, unit)

    @torch.no_grad()
    def begin(self, unit: Unit) -> Begun:
        """The layers up to the cache's gate; what it looks at where this rank has the prompt's branch."""
        assert self._cache and self._cache.plan.gate
        unit = self.conditioned(unit)
        passes = self._passes(unit)
        self._run(passes, unit, range(self._cache.plan.gate.layers), is_left_out=False)
        if passes[0].branch != 0:
            return Begun(unit, None, passes)
        num_tokens = len(unit.timesteps) * math.prod(_token_grid(unit))
        start = self._sequence.part(num_tokens).start
        probe = self._cache.probe(passes[0].entering, passes[0].hidden, start, num_tokens)
        return Begun(unit, probe, passes)

    @torch.no_grad()
    def go_on(self, begun: Begun, *, is_left_out: bool) -> Output:
        """The layers behind the gate, or what they would have added."""
        assert self._cache and self._cache.plan.gate
        unit, passes = begun.unit, begun.work
        assert isinstance(passes, list)
        if begun.probe is not None and not is_left_out:
            self._cache.learn_gate(unit.chunk.index, unit.step, begun.probe)
        self._run(passes, unit, range(self._cache.plan.gate.layers, len(self.dit.blocks)), is_left_out=is_left_out)
        return self._end(passes, unit)

    def conditioned(self, unit: Unit) -> Unit:
        """The unit with what else the film is to follow; asked once a unit, before its first layer here."""
        return unit

    def _passes(self, unit: Unit) -> list[_Pass]:
        """Each branch of a unit as it enters the stage."""
        grid = _token_grid(unit)
        per_latent, num_latents = math.prod(grid), len(unit.timesteps)
        part = self._sequence.part(num_latents * per_latent)
        temb, modulation = self._modulation(unit.timesteps.tolist(), per_latent, part)
        entering, anchors = self._enter(unit, part)
        passes = []
        for index, (branch, texts) in enumerate(zip(self.branches[: unit.num_branches], self._texts, strict=False)):
            run = self._run_module(unit, branch)
            spans = text_spans(unit.chunk.prompts[-num_latents:], texts, per_latent, part)
            context = self._self_context(unit, index, grid, run)
            text = TextContext(spans, run)
            passes.append(_Pass(branch, entering[index], anchors[index], text, context, temb, modulation))
        return passes

    def _run_module(self, unit: Unit, branch: int) -> RunModule:
        """How modules of layers are run in one pass: with a table, not all of them are."""
        cache = self._cache
        if not cache or not cache.plan.kept_modules:
            return run_module

        def run(index: int, module: Module, compute: Callable[[], Tensor]) -> Tensor:
            place = unit.chunk.index, branch, self._first_layer + index
            return cache.module(place, module, unit.step, compute)

        return run

    def _run(self, passes: Sequence[_Pass], unit: Unit, indices: range, *, is_left_out: bool) -> None:
        """Some of the stage's layers, but for those of the step's span if it is left out."""
        plan = self._cache.at(unit.step) if self._cache else StepPlan()
        is_left_out |= plan.treatment == "forecast"
        for one in passes:
            for index in indices:
                layer, block = self._first_layer + index, self.dit.blocks[index]
                if layer == plan.span.start and not is_left_out:
                    one.anchor = one.hidden
                if is_left_out and layer in plan.span:
                    one.context.keep_earlier(index)
                else:
                    if isinstance(block.ffn, CachedFeedForward):
                        block.ffn.run = one.context.run
                    one.hidden = block(one.hidden, one.text, one.modulation, one.context)
                if layer == plan.span.stop - 1:
                    self._end_span(one, unit, is_left_out=is_left_out)

    def _end_span(self, one: _Pass, unit: Unit, *, is_left_out: bool) -> None:
        """Behind the last layer of the step's span: add what its layers added before, or remember what they did."""
        assert self._cache
        series = self._cache.span(unit.chunk.index, one.branch, unit.step)
        if is_left_out:
            one.hidden = one.hidden + series.forecast(unit.step)
        else:
            assert one.anchor is not None
            series.learn(one.hidden - one.anchor, unit.step)

    def _end(self, passes: Sequence[_Pass], unit: Unit) -> Output:
        """What the stage gives, when all its layers are done."""
        for runtime in (self._attention, self._cache):
            if runtime:
                runtime.end_step(unit.chunk.index, unit.step)
        stored = [one.context.stored for one in passes]
        kv = tuple(
            [[layer[span] for layer in layers] for layers in stored] + _of_branches(unit, span, len(passes))
            for span in range(len(unit.store))
        )
        if not self._is_last:
            inside = [one.anchor for one in passes if one.anchor is not None and self._ends_inside(unit)]
            return Output(hidden=torch.cat([*(one.hidden for one in passes), *inside]), kv=kv)
        grid = _token_grid(unit)
        return Output(velocity=torch.stack([self._head(one.hidden, one.temb, unit, grid) for one in passes]), kv=kv)

    def _ends_inside(self, unit: Unit) -> bool:
        """Whether the next stage begins inside the step's span of layers."""
        span = self._cache.at(unit.step).span if self._cache else range(0)
        return span.start < self._first_layer + len(self.dit.blocks) < span.stop

    def _enter(self, unit: Unit, part: slice) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        """What each branch begins with, [1, l, E]: embedded patches, or what the stage before made.

        And what entered the step's span of layers, if this stage begins inside it.
        """
        count = min(unit.num_branches, self.num_branches)
        if not self._is_first:
            assert unit.hidden is not None
            parts = unit.hidden.split(1)
            return parts[:count], parts[count:] or [None] * count
        assert unit.latents is not None
        patches = self.dit.patch_embedding(unit.latents[None].to(self.dtype)).flatten(2).transpose(1, 2)
        return [patches[:, part].contiguous()] * count, [None] * count

    def _self_context(self, unit: Unit, branch: int, grid: tuple[int, int], run: RunModule) -> SelfContext:
        per_latent, num_latents = grid[0] * grid[1], len(unit.timesteps)
        before = unit.chunk.num_left if unit.left is not None else 0
        after = unit.chunk.num_right if unit.right is not None else 0
        return SelfContext(
            rope=self._rope(before + num_latents + after, *grid),
            left=_of_branch(unit.left, branch),
            right=_of_branch(unit.right, branch),
            num_left=before * per_latent,
            store=tuple(slice(span.start * per_latent, span.stop * per_latent) for span in unit.store),
            attention=self._layer_attention(unit, self.branches[branch], token_map(unit, before, after, grid)),
            head_costs=self._head_costs,
            kept=tuple(layers for span in unit.kept if (layers := _of_branch(span, branch))),
            run=run,
            shared=_of_branch(unit.shared, branch),
            shared_stop=unit.chunk.num_left * per_latent,
            stores_scene=unit.stores_scene,
            sharing=unit.sharing,
        )

    def _head_costs(self, index: int) -> Sequence[float] | None:
        return self._attention.policy.head_costs(self._first_layer + index) if self._attention else None

    def _layer_attention(self, unit: Unit, branch: int, tokens: TokenMap) -> Callable[[int], Attention]:
        """Self-attention of each layer of the stage in one pass of a unit."""

        def at(index: int) -> Attention:
            place = Place(unit.chunk.index, branch, self._first_layer + index, unit.step)
            sparse = self._attention.at(place, tokens, self.dit.scale_shift_table.device) if self._attention else None
            return sparse or DenseAttention()

        return at

    def _head(self, hidden: Tensor, temb: Tensor, unit: Unit, grid: tuple[int, int]) -> Tensor:
        """The output layer on the own latents' tokens: fp32 [C, num_latents, h, w], on every rank of the sequence."""
        own, num_tokens = unit.chunk.num_latents * grid[0] * grid[1], len(unit.timesteps) * grid[0] * grid[1]
        if hidden.shape[1] == num_tokens:  # all tokens are here: those of the left context need no velocity
            hidden, temb, num_tokens = hidden[:, -own:], temb[:, -own:], own
        table = self.dit.scale_shift_table.unsqueeze(0)
        shift, scale = (table + temb.unsqueeze(2)).unbind(2)
        hidden = (self.dit.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden)
        patches = self.dit.proj_out(hidden)
        if num_tokens != own or patches.shape[1] != own:
            patches = self._sequence.gather(patches, num_tokens)[:, -own:]
        out = patches.reshape(unit.chunk.num_latents, *grid, 2, 2, -1)
        channels = out.shape[-1]
        velocity: Tensor = out.permute(5, 0, 1, 3, 2, 4).reshape(channels, -1, grid[0] * 2, grid[1] * 2).float()
        return velocity

    def _modulation(self, timesteps: list[float], per_latent: int, part: slice) -> tuple[Tensor, Tensor]:
        """Time embedding [1, l or 1, D] and modulation [1, l, 6, D], or [1, 6, D] when all levels are equal."""
        for t in set(timesteps) - self._times.keys():
            self._times[t] = self._embed_time(t)
        if len(set(timesteps)) == 1:
            temb, modulation = self._times[timesteps[0]]
            return temb[:, None], modulation
        parts = [self._times[t] for t in timesteps]
        temb = torch.cat([temb for temb, _ in parts]).repeat_interleave(per_latent, dim=0)
        modulation = torch.cat([m for _, m in parts]).repeat_interleave(per_latent, dim=0)
        return temb[None, part], modulation[None, part]

    def _embed_time(self, timestep: float) -> tuple[Tensor, Tensor]:
        """Embedding [1, D] and modulation [1, 6, D] of a noise level: once, since steps come again."""
        embedder = self.dit.condition_embedder
        device = embedder.time_embedder.linear_1.weight.device
        frequencies = embedder.timesteps_proj(torch.tensor([timestep], device=device))
        time_dtype = embedder.time_embedder.linear_1.weight.dtype
        temb = embedder.time_embedder(frequencies.to(time_dtype)).to(self.dtype)
        return temb, embedder.time_proj(embedder.act_fn(temb)).unflatten(1, (6, -1))

    def _rope(self, num_latents: int, height: int, width: int) -> Rope:
        """Rotary rows of a chunk-local grid of tokens, from position 0."""
        key = (num_latents, height, width)
        if key not in self._ropes:
            rope = self.dit.rope
            sizes = [rope.t_dim, rope.h_dim, rope.w_dim]
            shapes = [(num_latents, 1, 1, -1), (1, height, 1, -1), (1, 1, width, -1)]
            tables = []
            for table in (rope.freqs_cos, rope.freqs_sin):
                parts = [
                    rows[:count].view(shape).expand(*key, -1)
                    for rows, count, shape in zip(table.split(sizes, dim=1), key, shapes, strict=True)
                ]
                tables.append(torch.cat(parts, dim=-1).reshape(1, math.prod(key), 1, -1))
            self._ropes[key] = (tables[0], tables[1])
        return self._ropes[key]


def text_spans(prompts: Sequence[PromptBlend], texts: Sequence[TextKv], per_latent: int, part: slice) -> list[TextSpan]:
    """Spans of consecutive latents that attend the same text, in the tokens of ``part``, counted from its start."""
    spans, start = [], 0
    for blend, latents in groupby(prompts):
        stop = start + per_latent * len(list(latents))
        inside = slice(max(start, part.start) - part.start, min(stop, part.stop) - part.start)
        if inside.start < inside.stop:
            second = texts[blend.b] if blend.weight and blend.b != blend.a else None
            spans.append(TextSpan(inside, texts[blend.a], second, blend.weight))
        start = stop
    return spans


def token_map(unit: Unit, num_before: int, num_after: int, grid: tuple[int, int]) -> TokenMap:
    """Where a unit's tokens are, with so many latents of neighbours' K/V before and after them."""
    chunk = unit.chunk
    stop = chunk.start + chunk.num_latents
    start = stop - len(unit.timesteps)
    return TokenMap(range(start, stop), range(start - num_before, stop + num_after), range(chunk.start, stop), *grid)


def _token_grid(unit: Unit) -> tuple[int, int]:
    """Rows and columns of a latent's tokens."""
    return unit.latent_size[0] // 2, unit.latent_size[1] // 2


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
