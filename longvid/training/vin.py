"""``longvid train vin``: global tokens for a frozen Wan transformer, learned end to end on what its queue shows.

A step takes films of several chunks, all with noise of their own: at one level, as when chunks are denoised together,
or on a staircase, as in the queue. The adapter makes tokens of the films' key latents, the transformer denoises the
chunks one by one with them, and the loss is that of the transformer's own training. Gradients pass through the frozen
layers to the tokens and from there to what made them.

Shapes: B films, n chunks, C channels, F latents of a film, K key latents, G tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from numpy.typing import NDArray
from torch import Tensor, nn

from longvid.models.vin import Vin, VinLayer
from longvid.models.vin_config import VinConfig
from longvid.parallel.sequence import Rope, rotate
from longvid.training.dit import SelfAttention, TextAttention, attend, block_forward, window_velocity
from longvid.training.latents import LatentSet, draw_windows
from longvid.training.levels import STEP_COUNTS, shift_levels
from longvid.training.text import tokenize
from longvid.training.train_dit import World, encode_captions


@dataclass(frozen=True)
class FilmLayout:
    """How films are cut into chunks: the first owns the left context that it lacks, as in the queue."""

    chunks: int = 4
    chunk_latents: int = 6
    context_latents: int = 2
    spacing: int = 3
    denoised: int = 2
    """How many of a film's chunks a step denoises: the tokens are of all."""

    @property
    def owned(self) -> list[range]:
        """Each chunk's own latents."""
        sizes = [self.chunk_latents + self.context_latents] + [self.chunk_latents] * (self.chunks - 1)
        ends = list(accumulate(sizes))
        return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]

    @property
    def windows(self) -> list[range]:
        """What each chunk sees: all are equally long."""
        context, length = self.context_latents, self.chunk_latents + 2 * self.context_latents
        starts = [max(0, own.start - context) for own in self.owned]
        return [range(start, start + length) for start in starts]

    @property
    def num_latents(self) -> int:
        return self.windows[-1].stop

    @property
    def num_frames(self) -> int:
        return 4 * self.num_latents - 3

    def keys(self, chunk: int) -> list[int]:
        """A chunk's key latents."""
        return [latent for latent in self.owned[chunk] if latent % self.spacing == 0]


@dataclass(frozen=True)
class Moment:
    """What a film is at one moment: unshifted noise levels (1 pure noise, 0 clean) and which latents are key.

    ``windows`` are chunks that take a step, at ``own`` [n] each, beside neighbours at ``left`` and ``right`` [n].
    ``keys`` are latents of the film, noisy as ``key_levels`` say, ``places`` latents before the newest.
    """

    windows: list[int]
    own: NDArray[np.float64]
    left: NDArray[np.float64]
    right: NDArray[np.float64]
    keys: list[int]
    key_levels: NDArray[np.float64]
    places: NDArray[np.float64]


KINDS = ("together", "staircase", "memory")


def draw_moment(rng: np.random.Generator, layout: FilmLayout, shares: Sequence[float] = (0.25, 0.4, 0.35)) -> Moment:
    """A moment of a film: all chunks at one level; or on a staircase, whose key latents stood a step earlier.

    In a "memory" the first chunk was finished long ago. The keys of one chunk in ten are left out: dropping all tokens
    would teach a frozen transformer nothing.
    """
    kind = KINDS[rng.choice(3, p=shares)]
    steps, count = int(rng.choice(STEP_COUNTS)), layout.chunks
    level = 1 - rng.integers(0, steps) / steps
    if kind == "together":
        own = np.full(count, level)
        key_levels, stairs = own.copy(), 0.0
    else:
        at = count - 1 if kind == "memory" else int(rng.integers(0, count))
        stairs = 1 / steps
        own = level + (np.arange(count) - at) * stairs
        key_levels = np.maximum(own + stairs, 0)
    if kind == "memory":
        own[0] = key_levels[0] = 0.0
    tiny = 1e-9
    # Latents that are pure noise say nothing: the queue leaves them out. Together, all are there from the start.
    told = [i for i in range(count) if (kind == "together" or key_levels[i] < 1 - tiny) and rng.random() < 0.9]
    keys = [(latent, key_levels[i], i) for i in told for latent in layout.keys(i)]
    newest = max((latent for latent, _, _ in keys), default=0)
    places = np.array([float(newest - latent) for latent, _, _ in keys])
    if kind == "memory":
        long_ago = np.array([i == 0 for _, _, i in keys], dtype=bool)
        places[long_ago] += 2 ** rng.uniform(0, 11)
    in_flight = [i for i in range(count) if tiny < own[i] < 1 + tiny]
    windows = sorted(rng.choice(in_flight, layout.denoised, replace=len(in_flight) < layout.denoised).tolist())
    level_of = own[windows]
    return Moment(
        windows,
        np.minimum(level_of, 1.0),
        np.maximum(level_of - stairs, 0.0),
        np.minimum(level_of + stairs, 1.0),
        [latent for latent, _, _ in keys],
        np.array([level for _, level, _ in keys]),
        places,
    )


@dataclass(frozen=True)
class FilmBatch:
    """Clean films fp32 [B, C, F, h, w] with their noise; captions, and which of them each latent follows [B, F]."""

    clean: Tensor
    noise: Tensor
    captions: list[str]
    index: Tensor
    moment: Moment


def draw_batch(
    data: LatentSet, layout: FilmLayout, rng: np.random.Generator, films: int, moment: Moment | None = None
) -> FilmBatch:
    """Films from their first latent on, some without captions."""
    batch = draw_windows(
        data, rng, batch=films, num_latents=layout.num_latents, first=0, max_captions=2 * films, dropout=0.1
    )
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    noise = torch.randn(batch.clean.shape, generator=generator)
    return FilmBatch(batch.clean, noise, batch.captions, batch.index, moment or draw_moment(rng, layout))


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

    def forward(self, batch: FilmBatch, pull: float = 0.5) -> tuple[Tensor, Tensor]:
        """Mean squared error of the velocity of the chunks' own latents, and that of the transformer alone.

        With a ``pull``, guidance is inside the objective, as in the transformer's own training (`window_loss`): the
        target is moved as the transformer alone moves it. So what the tokens tell is learned, and guidance stays.
        """
        target = self._windows(batch.noise - batch.clean, batch)
        with torch.autocast(batch.clean.device.type, torch.bfloat16):
            with torch.no_grad():
                alone = self._velocity(batch, batch.captions, None)
                if pull:
                    unguided = self._velocity(batch, [""] * len(batch.captions), None)
                    target = target + pull * (alone.float() - unguided.float())
            tokens = self.vin_tokens(batch)
            velocity = self._velocity(batch, batch.captions, tokens)
        return self._error(velocity, target, batch), self._error(alone, target, batch)

    def vin_tokens(self, batch: FilmBatch) -> Tensor:
        """The films' global tokens [B, G, D], each film's beside its own captions."""
        moment, films = batch.moment, len(batch.clean)
        sigma = torch.from_numpy(shift_levels(moment.key_levels, self._shift)).float()
        level = sigma[None, None, :, None, None]
        latents = (1 - level) * batch.clean[:, :, moment.keys] + level * batch.noise[:, :, moment.keys]
        places = torch.from_numpy(moment.places).float()
        out, lse = self.vin.partial(latents, 1000 * sigma.expand(films, -1), places.expand(films, -1))
        texts = [
            torch.cat([self._embedded(batch.captions[i]) for i in batch.index[film].unique().tolist()])
            for film in range(films)
        ]
        return torch.stack([self.vin.finish(out[b], lse[b], text) for b, text in enumerate(texts)])

    def _error(self, velocity: Tensor, target: Tensor, batch: FilmBatch) -> Tensor:
        """Over own latents alone: nobody steps the context."""
        spans = [(self._layout.owned[i], self._layout.windows[i]) for i in batch.moment.windows]
        of_film = velocity.float().unflatten(0, (len(batch.clean), -1)), target.unflatten(0, (len(batch.clean), -1))
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

    def _velocity(self, batch: FilmBatch, captions: list[str], tokens: Tensor | None) -> Tensor:
        """Of every window, films by chunks: [B·n, C, window, h, w]."""
        moment, count = batch.moment, len(batch.moment.windows)
        sigma = self._levels(moment)
        level = self._of_films(sigma, batch)[:, None, :, None, None]
        x = (1 - level) * self._windows(batch.clean, batch) + level * self._windows(batch.noise, batch)
        index = torch.stack([batch.index[:, self._seen(i)] for i in moment.windows], dim=1).flatten(0, 1)
        text = encode_captions(self._world, captions, index)
        with self._held.of(None if tokens is None else tokens.repeat_interleave(count, dim=0)):
            return window_velocity(self.dit, x, self._of_films(sigma, batch), text, self._run_block)

    def _levels(self, moment: Moment) -> Tensor:
        """Noise levels of the windows' latents, [n, window]."""
        rows = []
        for j, i in enumerate(moment.windows):
            own, seen = self._layout.owned[i], self._layout.windows[i]
            before, after = own.start - seen.start, seen.stop - own.stop
            levels = [moment.left[j]] * before + [moment.own[j]] * len(own) + [moment.right[j]] * after
            rows.append(shift_levels(np.array(levels), self._shift))
        return torch.from_numpy(np.stack(rows)).float()

    def _of_films(self, of_window: Tensor, batch: FilmBatch) -> Tensor:
        return of_window.repeat(len(batch.clean), 1)

    def _windows(self, films: Tensor, batch: FilmBatch) -> Tensor:
        """[B·n, C, window, h, w] of [B, C, F, h, w]."""
        return torch.stack([films[:, :, self._seen(i)] for i in batch.moment.windows], dim=1).flatten(0, 1)

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
