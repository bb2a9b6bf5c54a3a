"""The Wan family's video model as a stage of the queue: patches in, layers, velocity out.

Shapes: C channels, F latents (left context, then own), S tokens a latent, L = F·S, E text width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from longvid.cache.regions import Active
from longvid.cache.runtime import CacheRuntime
from longvid.kernels import rows
from longvid.models.checkpoint import FilmInputs
from longvid.models.layer_stage import (
    CachedFeedForward,
    LayerStage,
    Pass,
    RunModule,
    context_of,
    neighbours,
    token_map,
)
from longvid.models.vin import Vin
from longvid.models.wan_attention import (
    CompleteKv,
    LayerKv,
    QueueSelfAttention,
    ReadTokens,
    SceneTextAttention,
    SelfContext,
    TextContext,
    TextKv,
    TextSpan,
    text_kv,
)
from longvid.models.wan_layer import Levels, WanLayer, WholePass, join_levels, take_layer
from longvid.parallel.around import Rope
from longvid.parallel.sequence import SequenceAttention
from longvid.parallel.stage import KeyLatents, Unit
from longvid.plan import PromptBlend
from longvid.sparsity.runtime import SparseRuntime

TEXT_COLUMNS = 512
"""Length to which the stock pipeline pads every prompt with zeros, unmasked."""


class WanStage(LayerStage):
    """Some layers of a ``WanTransformer3DModel``: ``dit.blocks`` are this stage's alone.

    ``vin`` makes global tokens and has the layers read them. Takes the transformer over: its layers become
    `WanLayer`, with their weights.
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
        vin: Vin | None = None,
        linear: str = "auto",
    ) -> None:
        super().__init__(
            branches=branches,
            is_first=is_first,
            is_last=is_last,
            first_layer=first_layer,
            sequence=sequence,
            attention=attention,
            cache=cache,
            linear=linear,
        )
        self.dit = dit.eval()
        weight = dit.condition_embedder.text_embedder.linear_1.weight  # every stage has it
        self.dtype, self.device = weight.dtype, weight.device
        for index, block in enumerate(dit.blocks):
            take_layer(block)
            block.attn1.set_processor(QueueSelfAttention(index, self.sequence))
            block.attn2.set_processor(SceneTextAttention(index))
            if self.caches_modules:
                block.ffn = CachedFeedForward(index, block.ffn)
        self._take_linears()
        self._vin = vin
        self._texts: list[list[TextKv]] = []
        self._states: list[list[Tensor]] = []
        self._times: dict[float, tuple[Tensor, Tensor]] = {}
        self._token_kinds: dict[tuple[tuple[int, ...], int, int, int], Tensor] = {}
        self._ropes: dict[tuple[int, int, int], Rope] = {}

    @property
    def layers(self) -> Sequence[nn.Module]:
        blocks: Sequence[nn.Module] = self.dit.blocks
        return blocks

    def prepare(self, inputs: FilmInputs) -> None:
        """Take what the film to come is to follow."""
        self.set_prompts(inputs.prompts, inputs.negatives)

    @torch.no_grad()
    def set_prompts(self, prompts: Sequence[Tensor], negatives: Sequence[Tensor]) -> None:
        """Compute text K/V of every prompt once, by the weights of now. Embeddings are [n, E] each, without padding.

        ``negatives`` belong to the prompts one by one; they are needed where branch 1 is run.
        """
        for layer in self.layers:
            assert isinstance(layer, WanLayer)
            layer.pack()
        known: dict[int, TextKv] = {}
        self._texts = [
            [self._text(states, known) for states in (prompts, negatives)[branch]] for branch in self.branches
        ]
        self._states = [list((prompts, negatives)[branch]) for branch in self.branches]

    def _text(self, states: Tensor, known: dict[int, TextKv]) -> TextKv:
        if id(states) not in known:
            padded = torch.cat([states, states.new_zeros(1, states.shape[1])]).to(self.dtype)
            embedded = self.dit.condition_embedder.text_embedder(padded)
            known[id(states)] = text_kv(self.dit.blocks, embedded, TEXT_COLUMNS)
        return known[id(states)]

    @property
    def num_globals(self) -> int:
        return self._vin.config.tokens if self._vin else 0

    @property
    def key_spacing(self) -> int:
        assert self._vin
        return self._vin.config.spacing

    @torch.no_grad()
    def encode(self, keys: KeyLatents) -> Tensor:
        """Global tokens [branches, G, D]: all branches see the same, each beside its own texts."""
        return self.conclude(self.look(keys), keys.prompts)

    @property
    def part_shape(self) -> tuple[int, int, int]:
        assert self._vin
        config = self._vin.config
        return config.heads, config.tokens, config.hidden_size // config.heads

    @torch.no_grad()
    def look(self, keys: KeyLatents) -> tuple[Tensor, Tensor]:
        assert self._vin
        device = keys.latents.device
        return self._vin.partial(keys.latents.to(self.dtype), keys.timesteps.to(device), keys.places.to(device))

    @torch.no_grad()
    def conclude(self, seen: tuple[Tensor, Tensor], prompts: Sequence[int]) -> Tensor:
        assert self._vin
        embed = self.dit.condition_embedder.text_embedder
        texts = (embed(torch.cat([states[i] for i in prompts]).to(self.dtype)) for states in self._states)
        return torch.stack([self._vin.finish(*seen, text) for text in texts])

    def hidden_shape(self, num_latents: int, latent_size: Sequence[int]) -> tuple[tuple[int, ...], torch.dtype]:
        """[branches, l, E] for this rank's part of the tokens of F latents."""
        part = self.sequence.part(num_latents * (latent_size[0] // 2) * (latent_size[1] // 2))
        return (self.num_branches, part.stop - part.start, self.dit.scale_shift_table.shape[-1]), self.dtype

    def passes(self, unit: Unit) -> list[Pass]:
        """Each branch of a unit as it enters the stage."""
        grid = _token_grid(unit)
        per_latent, num_latents = math.prod(grid), len(unit.timesteps)
        num_tokens = num_latents * per_latent
        part = self.sequence.part(num_tokens)
        levels = self._levels(unit.timesteps.tolist(), per_latent, part)
        active = self._active(unit, per_latent)
        entering, anchors = self._enter(unit, part) if self.is_first else self.entering(unit)
        if active is not None:
            # On a later stage the rows behind the active tokens said who they are.
            entering = [active.of(x) if self.is_first else x[:, : len(active.tokens)] for x in entering]
            levels = levels.of(active.tokens)
        passes = []
        for index, (branch, texts) in enumerate(zip(self.branches[: unit.num_branches], self._texts, strict=False)):
            run = self.run_module(unit, branch)
            spans = text_spans(unit.chunk.prompts[-num_latents:], texts, per_latent, part)
            if active is not None:
                spans = active_spans(spans, active)
            context = self._self_context(unit, index, grid, run, active)
            text = TextContext(spans, run)
            whole = WholePass.of(self.layers, entering[index], text, levels, context)
            layer = partial(self._layer, text, levels, context) if whole is None else whole.run
            head = partial(self._head, levels, unit, grid, branch, active)
            ways = context, layer, head, num_tokens
            passes.append(Pass(branch, entering[index], anchors[index], *ways, start=part.start, active=active))
        return passes

    def _active(self, unit: Unit, per_latent: int) -> Active | None:
        """The tokens that go through the layers, where the step's are not all."""
        regions = self.cache.regions if self.cache else None
        if not regions:
            return None
        assert self.cache
        share, num_tokens = self.cache.at(unit.step).active, len(unit.timesteps) * per_latent
        num_own = unit.chunk.num_latents * per_latent
        if unit.latents is not None:
            own = unit.latents[:, -unit.chunk.num_latents :].unflatten(2, (-1, 2)).unflatten(4, (-1, 2))
            own = own.permute(1, 2, 4, 0, 3, 5).reshape(num_own, -1)  # [C, F, rows, 2, columns, 2] to tokens
            return regions.choose(unit.chunk.index, self.branches, share, own, num_tokens)
        if share == 1:
            return None
        assert unit.hidden is not None
        width = unit.hidden.shape[-1]
        return Active.from_rows(unit.hidden[0, num_tokens // -width :], num_tokens, num_own)

    def _layer(self, text: TextContext, levels: Levels, context: SelfContext, index: int, hidden: Tensor) -> Tensor:
        block = self.dit.blocks[index]
        if isinstance(block.ffn, CachedFeedForward):
            block.ffn.run = context.run
        out: Tensor = block(hidden, text, levels, context)
        return out

    def _enter(self, unit: Unit, part: slice) -> tuple[Sequence[Tensor], Sequence[None]]:
        """What each branch begins with, [1, l, E]: embedded patches."""
        count = min(unit.num_branches, self.num_branches)
        assert unit.latents is not None
        patches = self.dit.patch_embedding(unit.latents[None].to(self.dtype)).flatten(2).transpose(1, 2)
        return [patches[:, part].contiguous()] * count, [None] * count

    def _self_context(
        self, unit: Unit, index: int, grid: tuple[int, int], run: RunModule, active: Active | None
    ) -> SelfContext:
        before, after = neighbours(unit)
        tokens = token_map(unit, before, after, grid)
        return SelfContext(
            **context_of(unit, index, math.prod(grid)),
            rope=self._rope(before + len(unit.timesteps) + after, *grid),
            attention=self.layer_attention(unit, self.branches[index], tokens, self.device),
            head_costs=self.layer_costs,
            run=run,
            queries=active.tokens if active is not None else None,
            complete=self._complete(unit, self.branches[index], active),
            read_tokens=self._read_tokens(unit, index),
        )

    def _read_tokens(self, unit: Unit, index: int) -> ReadTokens | None:
        """How layers get at the unit's global tokens."""
        if unit.tokens is None:
            return None
        tokens, vin = unit.tokens[index : index + 1], self._vin
        assert vin

        def read(layer: int, query: Tensor) -> Tensor:
            found: Tensor = vin.layer(self.first_layer + layer)(query, tokens)
            return found

        return read

    def _complete(self, unit: Unit, branch: int, active: Active | None) -> CompleteKv | None:
        """How layers come by the K/V of tokens that are left out."""
        regions = self.cache.regions if self.cache else None
        if not regions:
            return None

        def complete(index: int, key: Tensor, value: Tensor) -> LayerKv:
            return regions.kv((unit.chunk.index, branch, self.first_layer + index), key, value, active)

        return complete

    def _head(
        self, levels: Levels, unit: Unit, grid: tuple[int, int], branch: int, active: Active | None, hidden: Tensor
    ) -> Tensor:
        """The output layer on the last `num_predicted` latents: fp32 [C, F, h, w], on every rank of the sequence."""
        own, num_tokens = unit.num_predicted * grid[0] * grid[1], len(unit.timesteps) * grid[0] * grid[1]
        if active is not None:
            count = len(active.own)
            hidden, levels, num_tokens = hidden[:, -count:], levels.of(slice(-count, None)), own
        elif hidden.shape[1] == num_tokens:  # all tokens are here: those of the left context need no velocity
            hidden, levels, num_tokens = hidden[:, -own:], levels.of(slice(-own, None)), own
        shift, scale = (self.dit.scale_shift_table.transpose(0, 1) + levels.embedded).float().unbind()
        normed = rows.layer_norm(hidden.contiguous(), 1 + scale, shift, levels.kinds, self.dit.norm_out.eps)
        patches = self.dit.proj_out(normed)
        if self.cache and self.cache.regions:
            last = self.first_layer + len(self.layers) - 1
            patches = self.cache.regions.velocity((unit.chunk.index, branch, last), patches, active)
        elif num_tokens != own or patches.shape[1] != own:
            patches = self.sequence.gather(patches, num_tokens)[:, -own:]
        out = patches.reshape(unit.num_predicted, *grid, 2, 2, -1)
        channels = out.shape[-1]
        velocity: Tensor = out.permute(5, 0, 1, 3, 2, 4).reshape(channels, -1, grid[0] * 2, grid[1] * 2).float()
        return velocity

    def _levels(self, timesteps: list[float], per_latent: int, part: slice) -> Levels:
        """The noise levels of a unit's latents."""
        for t in set(timesteps) - self._times.keys():
            self._times[t] = self._embed_time(t)
        distinct = list(dict.fromkeys(timesteps))
        kinds = self._kinds(tuple(map(distinct.index, timesteps)), per_latent, part) if len(distinct) > 1 else None
        return join_levels([self._times[t] for t in distinct], kinds)

    def _kinds(self, of_latents: tuple[int, ...], per_latent: int, part: slice) -> Tensor:
        """The noise level of each token of ``part``, int32 [l], by those of the unit's latents."""
        key = (of_latents, per_latent, part.start, part.stop)
        if key not in self._token_kinds:
            device = self.dit.condition_embedder.time_embedder.linear_1.weight.device
            kinds = torch.tensor(of_latents, dtype=torch.int32, device=device)
            self._token_kinds[key] = kinds.repeat_interleave(per_latent)[part].contiguous()
        return self._token_kinds[key]

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


def active_spans(spans: Sequence[TextSpan], active: Active) -> list[TextSpan]:
    """The same spans where only some tokens are in the pass."""
    if len(spans) == 1:
        return [replace(spans[0], tokens=slice(0, len(active.tokens)))]
    ends = torch.tensor([span.tokens.stop for span in spans], device=active.tokens.device)
    stops = torch.searchsorted(active.tokens, ends).tolist()
    starts = [0, *stops[:-1]]
    found = (replace(s, tokens=slice(*at)) for s, *at in zip(spans, starts, stops, strict=True))
    return [span for span in found if span.tokens.start < span.tokens.stop]


def _token_grid(unit: Unit) -> tuple[int, int]:
    """Rows and columns of a latent's tokens."""
    return unit.latent_size[0] // 2, unit.latent_size[1] // 2
