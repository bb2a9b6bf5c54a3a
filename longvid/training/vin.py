"""``longvid train vin``: global tokens for a frozen Wan transformer, learned end to end on what its queue shows.

A step takes films of several chunks, all with noise of their own: at one level, as when chunks are denoised together,
or on a staircase, as in the queue, beside what a film remembers of chunks that were finished long ago. The adapter
makes tokens of the films' key latents, the transformer denoises the chunks one by one with them, and the loss is that
of the transformer's own training. Gradients pass through the frozen layers to the tokens and from there to what made
them.

Shapes: B films, n chunks, C channels, F latents of a film, K key latents, G tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from numpy.typing import NDArray
from torch import Tensor, nn

from longvid.models.vin import Vin, VinLayer
from longvid.models.vin_config import VinConfig
from longvid.parallel.around import Rope, rotate
from longvid.training.dit import SelfAttention, TextAttention, attend, block_forward, window_velocity
from longvid.training.films import FilmBatch, FilmLayout
from longvid.training.levels import STEP_COUNTS, shift_levels
from longvid.training.text import tokenize
from longvid.training.train_dit import World, encode_captions


@dataclass(frozen=True)
class Moment:
    """What films are at one moment: unshifted noise levels (1 pure noise, 0 clean) and which latents are key.

    ``windows`` are chunks that take a step, at ``own`` [n] each, beside neighbours at ``left`` and ``right`` [n].
    ``keys`` are latents of the films, of which those behind the ones that are seen are remembered; they are noisy as
    ``key_levels`` say.
    """

    young: bool
    windows: list[int]
    own: NDArray[np.float64]
    left: NDArray[np.float64]
    right: NDArray[np.float64]
    keys: list[int]
    key_levels: NDArray[np.float64]


KINDS = ("together", "staircase", "memory")
SHARES = (0.25, 0.2, 0.55)
TINY = 1e-9


def draw_moment(rng: np.random.Generator, layout: FilmLayout, shares: Sequence[float] = SHARES) -> Moment:
    """A moment of films: all chunks at one level; or on a staircase, whose key latents stood a step earlier.

    On a "staircase" films are young, and chunks that are finished are seen. In a "memory" they are old: the first
    chunk that is seen is the oldest in flight. Chunks "together" are the first of a film, or of a later group, with
    which far ones stand at the same level, or, as those of earlier groups, finished.
    """
    kind = KINDS[rng.choice(3, p=shares)]
    steps, count = int(rng.choice(STEP_COUNTS)), layout.chunks
    own: NDArray[np.float64]
    key_levels: NDArray[np.float64]
    young = kind == "staircase" or (kind == "together" and rng.random() < 0.5)
    if kind == "together":
        finished = not young and rng.random() < 0.5
        level = 1 - rng.integers(0 if finished else 1, steps) / steps
        own, far, stairs = np.full(count, level), 0.0 if finished else level, 0.0
        key_levels = own
    else:
        stairs, far = 1 / steps, 0.0
        if kind == "staircase":
            own = np.asarray(1 - rng.integers(0, steps) / steps + (np.arange(count) - rng.integers(0, count)) * stairs)
        else:
            own = np.asarray((1 + rng.integers(0, max(1, steps - count + 1)) + np.arange(count)) * stairs)
        key_levels = np.maximum(own + stairs, 0)
    keys = _told(rng, layout, young, key_levels) + _recalled(rng, layout, young, far)
    in_flight = [i for i in range(count) if TINY < own[i] < 1 + TINY]
    windows = sorted(rng.choice(in_flight, layout.denoised, replace=len(in_flight) < layout.denoised).tolist())
    level_of = own[windows]
    return Moment(
        young,
        windows,
        np.minimum(level_of, 1.0),
        np.maximum(level_of - stairs, 0.0),
        np.minimum(level_of + stairs, 1.0),
        [latent for latent, _ in keys],
        np.array([level for _, level in keys]),
    )


def _told(
    rng: np.random.Generator, layout: FilmLayout, young: bool, levels: NDArray[np.float64]
) -> list[tuple[int, float]]:
    """Key latents of seen chunks with their levels. Pure noise says nothing and is left out, and one chunk in ten."""
    told = [i for i, level in enumerate(levels) if level < 1 - TINY and rng.random() < 0.9]
    return [(latent, float(levels[i])) for i in told for latent in layout.keys(i, young=young)]


def _recalled(rng: np.random.Generator, layout: FilmLayout, young: bool, level: float) -> list[tuple[int, float]]:
    """Key latents of remembered chunks: all but one in ten, or the first alone, or the nearest so many, or none."""
    if young:
        return []
    groups, chance = layout.memory, rng.random()
    if chance < 0.2:
        groups = groups[:1]
    elif chance < 0.3:
        groups = groups[len(groups) - int(rng.integers(0, len(groups))) :]
    kept = [group for group in groups if rng.random() < 0.9]
    return [(layout.num_latents + place, level) for group in kept for place in group]


class TokenSelfAttention:
    """Attention processor over a window, with a layer's part of the adapter beside it."""

    def __init__(self, layer: VinLayer, held: HeldTokens) -> None:
        self.layer, self.held = layer, held
        self.plain = SelfAttention()

    def __call__(self, attn: WanAttention, hidden_states: Tensor, context: None, mask: None, rope: Rope) -> Tensor:
        tokens = self.held.tokens
        if tokens is None:
            return self.plain(attn, hidden_states, context, mask, rope)
        batch, length, _ = hidden_states.shape
        shape = (batch, length, attn.heads, -1)
        query = attn.norm_q(attn.to_q(hidden_states)).view(shape)
        key = rotate(attn.norm_k(attn.to_k(hidden_states)).view(shape), rope)
        value = attn.to_v(hidden_states).view(shape)
        far_key, far_value = self.layer.kv(tokens)
        q, k, v = (x.transpose(1, 2).to(value.dtype) for x in (rotate(query, rope), key, value))
        far_q, far_k, far_v = (x.transpose(1, 2).to(value.dtype) for x in (query, far_key, far_value))
        out = attend(q, k, v).transpose(1, 2) + self.layer.gated(attend(far_q, far_k, far_v).transpose(1, 2))
        projected: Tensor = attn.to_out[0](out.reshape(batch, length, -1))
        return projected


@dataclass
class HeldTokens:
    """The tokens [windows, G, D] that the transformer's layers read at the moment; None: it is as it was."""

    tokens: Tensor | None = None

    @contextmanager
    def of(self, tokens: Tensor | None) -> Iterator[None]:
        self.tokens = tokens
        try:
            yield
        finally:
            self.tokens = None


class VinTrainee(nn.Module):
    """A frozen transformer with an adapter in its layers; its forward is the loss of a batch of films."""

    def __init__(
        self,
        dit: WanTransformer3DModel,
        vin: Vin,
        world: World,
        layout: FilmLayout,
        shift: float,
        run_block: Any = block_forward,
    ) -> None:
        super().__init__()
        self.dit, self.vin = dit.requires_grad_(False), vin
        self._world, self._layout, self._shift, self._run_block = world, layout, shift, run_block
        self._held = HeldTokens()
        for index, block in enumerate(dit.blocks):
            block.attn1.set_processor(TokenSelfAttention(vin.layer(index), self._held))
            block.attn2.set_processor(TextAttention())

    def forward(self, batch: FilmBatch, moment: Moment, pull: float = 0.5) -> tuple[Tensor, Tensor]:
        """Mean squared error of the velocity of the chunks' own latents, and that of the transformer alone.

        With a ``pull``, guidance is inside the objective, as in the transformer's own training (`window_loss`): the
        target is moved as the transformer alone moves it. So what the tokens tell is learned, and guidance stays.
        """
        target = self._windows(batch.noise - batch.clean, moment)
        with torch.autocast(batch.clean.device.type, torch.bfloat16):
            with torch.no_grad():
                alone = self._velocity(batch, moment, batch.captions, None)
                if pull:
                    unguided = self._velocity(batch, moment, [""] * len(batch.captions), None)
                    target = target + pull * (alone.float() - unguided.float())
            tokens = self.vin_tokens(batch, moment)
            velocity = self._velocity(batch, moment, batch.captions, tokens)
        return self._error(velocity, target, moment), self._error(alone, target, moment)

    def vin_tokens(self, batch: FilmBatch, moment: Moment) -> Tensor:
        """The films' global tokens [B, G, D], each film's beside its own captions."""
        films = len(batch.clean)
        sigma = torch.from_numpy(shift_levels(moment.key_levels, self._shift)).float()
        level = sigma[None, None, :, None, None]
        latents = (1 - level) * batch.clean[:, :, moment.keys] + level * batch.noise[:, :, moment.keys]
        at = batch.places[:, moment.keys]
        places = at.amax(dim=1, keepdim=True) - at if moment.keys else at
        out, lse = self.vin.partial(latents, 1000 * sigma.expand(films, -1), places)
        texts = [
            torch.cat([self._embedded(batch.captions[i]) for i in batch.index[film].unique().tolist()])
            for film in range(films)
        ]
        return torch.stack([self.vin.finish(out[b], lse[b], text) for b, text in enumerate(texts)])

    def _error(self, velocity: Tensor, target: Tensor, moment: Moment) -> Tensor:
        """Over own latents alone: nobody steps the context."""
        owned = self._layout.owned(young=moment.young)
        spans = [(owned[i], self._layout.windows[i]) for i in moment.windows]
        of_film = [x.float().unflatten(0, (-1, len(spans))) for x in (velocity, target)]
        errors = [
            (of_film[0][:, j] - of_film[1][:, j])[:, :, own.start - seen.start : own.stop - seen.start].square().mean()
            for j, (own, seen) in enumerate(spans)
        ]
        return torch.stack(errors).mean()

    @torch.no_grad()
    def _embedded(self, caption: str) -> Tensor:
        """A caption's embedded states, [L, D]."""
        ids, mask = tokenize(self._world.tokenizer, [caption])
        states = self._world.encoder(ids, mask).last_hidden_state[0]
        embedded: Tensor = self.dit.condition_embedder.text_embedder(states)
        return embedded

    def _velocity(self, batch: FilmBatch, moment: Moment, captions: list[str], tokens: Tensor | None) -> Tensor:
        """Of every window, films by chunks: [B·n, C, window, h, w]."""
        count = len(moment.windows)
        sigma = self._levels(moment)
        level = self._of_films(sigma, batch)[:, None, :, None, None]
        x = (1 - level) * self._windows(batch.clean, moment) + level * self._windows(batch.noise, moment)
        index = torch.stack([batch.index[:, self._seen(i)] for i in moment.windows], dim=1).flatten(0, 1)
        text = encode_captions(self._world, captions, index)
        with self._held.of(None if tokens is None else tokens.repeat_interleave(count, dim=0)):
            return window_velocity(self.dit, x, self._of_films(sigma, batch), text, self._run_block)

    def _levels(self, moment: Moment) -> Tensor:
        """Noise levels of the windows' latents, [n, window]."""
        rows, owned = [], self._layout.owned(young=moment.young)
        for j, i in enumerate(moment.windows):
            own, seen = owned[i], self._layout.windows[i]
            before, after = own.start - seen.start, seen.stop - own.stop
            levels = [moment.left[j]] * before + [moment.own[j]] * len(own) + [moment.right[j]] * after
            rows.append(shift_levels(np.array(levels), self._shift))
        return torch.from_numpy(np.stack(rows)).float()

    def _of_films(self, of_window: Tensor, batch: FilmBatch) -> Tensor:
        return of_window.repeat(len(batch.clean), 1)

    def _windows(self, films: Tensor, moment: Moment) -> Tensor:
        """[B·n, C, window, h, w] of [B, C, F, h, w]."""
        return torch.stack([films[:, :, self._seen(i)] for i in moment.windows], dim=1).flatten(0, 1)

    def _seen(self, chunk: int) -> slice:
        seen = self._layout.windows[chunk]
        return slice(seen.start, seen.stop)


def config_for(dit: Any, layout: FilmLayout, tokens: int, processors: int) -> VinConfig:
    """The config of an adapter for a Wan transformer."""
    sizes = dit.config
    return VinConfig(
        hidden_size=sizes.num_attention_heads * sizes.attention_head_dim,
        latent_channels=sizes.out_channels,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_attention_heads,
        tokens=tokens,
        spacing=layout.spacing,
        processors=processors,
        heads=sizes.num_attention_heads,
    )
