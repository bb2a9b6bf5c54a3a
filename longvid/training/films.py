"""Long drawn films, seen in part, for the training of global tokens: chunks in a row, and keys of finished ones before.

A young film is seen from its beginning. An old one is seen from its chunk ``first`` on, beside key latents of the
chunks that the queue remembers then: the first, and one in each octave back. Both are drawn on one track, so that what
the far past shows (speed, size, the line on which an object moves) holds for what is seen.

Shapes: F latents seen, K remembered key latents, C channels.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray
from torch import Tensor

from longvid.training import world
from longvid.training.latents import LatentSet, encode_clips, missing_shards, save_shard

SHARD = 64
OLD_SHARE = 2 / 3
CHANGE_SHARE = 0.2
"""Films whose look changes in the midst of what is seen."""
LEAD = 2
"""Latents that are encoded before those that are wanted: the first of a clip holds one frame, not four."""


@dataclass(frozen=True)
class FilmLayout:
    """How films are cut into chunks: the first owns the left context that it lacks, as in the queue."""

    chunks: int = 8
    chunk_latents: int = 6
    context_latents: int = 2
    spacing: int = 3
    denoised: int = 2
    """How many of a film's chunks a step denoises: the tokens are of all."""
    octaves: int = 4
    farthest: int = 9
    """Old films are seen from up to 2 to the power of this many chunks on."""

    def __post_init__(self) -> None:
        if self.chunk_latents % self.spacing:
            raise ValueError(f"spacing {self.spacing} must divide chunk_latents {self.chunk_latents}")

    @property
    def windows(self) -> list[range]:
        """What each chunk sees of the latents seen: all are equally long."""
        length = self.chunk_latents + 2 * self.context_latents
        return [range(i * self.chunk_latents, i * self.chunk_latents + length) for i in range(self.chunks)]

    def owned(self, *, young: bool) -> list[range]:
        """Each chunk's own latents."""
        starts = [window.start + self.context_latents for window in self.windows]
        own = [range(start, start + self.chunk_latents) for start in starts]
        return [range(own[0].stop), *own[1:]] if young else own

    @property
    def num_latents(self) -> int:
        return self.windows[-1].stop

    def keys(self, chunk: int, *, young: bool) -> list[int]:
        """A chunk's key latents."""
        return [latent for latent in self.owned(young=young)[chunk] if latent % self.spacing == 0]

    def remembered_keys(self, chunk: int) -> list[int]:
        """Key latents of any chunk of a shot, counted from the shot's first."""
        start = chunk * self.chunk_latents + (self.context_latents if chunk else 0)
        stop = (chunk + 1) * self.chunk_latents + self.context_latents
        return [latent for latent in range(start, stop) if latent % self.spacing == 0]

    @property
    def memory(self) -> list[range]:
        """Places of each remembered chunk's keys among all remembered: the first chunk, then the far octaves first."""
        counts = [len(self.remembered_keys(0))] + [len(self.remembered_keys(1))] * self.octaves
        ends = np.cumsum(counts).tolist()
        return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


@dataclass(frozen=True)
class FilmSet:
    """Encoded films; the latents of an old one are those seen, then the remembered ones.

    ``before`` [old films, K] is how many latents each remembered one lies before the first that is seen.
    """

    young: LatentSet
    old: LatentSet
    before: NDArray[np.int64]

    def part(self, rows: slice) -> FilmSet:
        """Some of the young and some of the old."""
        return FilmSet(_part(self.young, rows), _part(self.old, rows), self.before[rows])


@dataclass(frozen=True)
class FilmBatch:
    """Clean films fp32 [B, C, F or F + K, h, w] with their noise, and ``places`` [B, F or F + K] of latents in time.

    ``captions``, and which of them each latent follows: ``index`` [B, F or F + K].
    """

    clean: Tensor
    noise: Tensor
    captions: list[str]
    index: Tensor
    places: Tensor


def draw_films(films: FilmSet, layout: FilmLayout, rng: np.random.Generator, count: int, *, young: bool) -> FilmBatch:
    """Films of one kind with noise of their own; a tenth is without captions."""
    data = films.young if young else films.old
    rows = rng.integers(0, len(data), count)
    clean = torch.from_numpy(data.latents[rows].astype(np.float32)).transpose(1, 2).contiguous()
    captions: list[str] = []
    index = []
    for row in rows.tolist():
        silent = rng.random() < 0.1
        index.append(len(captions) + data.look_of_latent[row])
        captions += ["" if silent else world.caption(look, rng) for look in data.looks[row]]
    captions += [""] * (2 * count - len(captions))
    places = np.tile(np.arange(layout.num_latents), (count, 1))
    if not young:
        places = np.concatenate([places, -films.before[rows]], axis=1)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    noise = torch.randn(clean.shape, generator=generator)
    return FilmBatch(clean, noise, captions, torch.from_numpy(np.stack(index)), torch.from_numpy(places))


def encode_films(
    vae: AutoencoderKLWan,
    folder: Path,
    layout: FilmLayout,
    *,
    count: int,
    side: int,
    seed: int,
    on_shard: Callable[[int], None] = lambda _: None,
) -> None:
    """Draw and encode films into ``folder`` in shards; shards that are there stay."""
    vae = vae.to(torch.bfloat16).eval()
    old = round(OLD_SHARE * count)
    for kind, total in (("young", count - old), ("old", old)):
        for path, numbers in missing_shards(folder, kind, total, SHARD):
            rngs = [np.random.default_rng((seed, 8, kind == "old", i)) for i in numbers]
            _save_films(path, vae, [draw_film(rng, layout, side, young=kind == "young") for rng in rngs])
            on_shard(numbers.stop)


def load_films(folder: Path) -> FilmSet:
    """All shards of a folder."""
    young, old = (_load_kind(sorted(folder.glob(f"{kind}_*[0-9].npz"))) for kind in ("young", "old"))
    return FilmSet(young[0], old[0], old[1])


@dataclass(frozen=True)
class DrawnFilm:
    """What is drawn of a film: clips, and which of each clip's latents are kept; looks, and whose each latent is."""

    clips: list[NDArray[np.uint8]]
    kept: list[list[int]]
    looks: tuple[world.Look, ...]
    look_of_latent: NDArray[np.int64]
    before: list[int]


def draw_film(rng: np.random.Generator, layout: FilmLayout, side: int, *, young: bool) -> DrawnFilm:
    """A film of one look, or of two that change in the midst of what is seen."""
    looks, num_latents = [world.sample_look(rng)], layout.num_latents
    first = 0 if young else round(2 ** rng.uniform(layout.octaves, layout.farthest))
    start = first * layout.chunk_latents
    change = None
    if rng.random() < CHANGE_SHARE:
        looks.append(world.change_look(rng, looks[0]))
        change = int(rng.integers(2, max(3, num_latents - 2)))
    num_frames = 4 * (start + num_latents)
    changes = [0] if change is None else [0, 4 * (start + change) - 3]
    film = world.Travel.draw(rng, looks, changes, num_frames)
    lead = 0 if young else LEAD
    clips = [film.frames(4 * (start - lead), 4 * (num_latents + lead) - 3, side)]
    kept, before = [list(range(lead, lead + num_latents))], []
    for chunk in [] if young else _remembered(rng, layout, first):
        keys, begin = layout.remembered_keys(chunk), chunk * layout.chunk_latents
        clips.append(film.frames(4 * begin, 4 * (layout.chunk_latents + layout.context_latents) - 3, side))
        kept.append([key - begin for key in keys])
        before += [start - key for key in keys]
    owner = np.zeros(num_latents + len(before), np.int64)
    if change is not None:
        owner[change:num_latents] = 1
    return DrawnFilm(clips, kept, tuple(looks), owner, before)


def _remembered(rng: np.random.Generator, layout: FilmLayout, first: int) -> list[int]:
    """The chunks that are remembered when chunk `first` is the oldest in flight."""
    octaves = reversed(range(layout.octaves))
    return [0] + [max(1, first - int(rng.integers(1 << octave, 2 << octave))) for octave in octaves]


def _save_films(path: Path, vae: AutoencoderKLWan, films: list[DrawnFilm]) -> None:
    kept = films[0].kept
    parts = []
    for number, latents in enumerate(kept):
        parts.append(encode_clips(vae, [film.clips[number] for film in films])[:, latents])
    save_shard(
        path,
        latents=np.concatenate(parts, axis=1),
        looks=np.array([json.dumps([asdict(look) for look in film.looks]) for film in films]),
        owner=np.stack([film.look_of_latent for film in films]),
        before=np.array([film.before for film in films], np.int64).reshape(len(films), -1),
    )


def _load_kind(paths: list[Path]) -> tuple[LatentSet, NDArray[np.int64]]:
    shards = []
    for path in paths:
        with np.load(path) as shard:
            shards.append({name: shard[name] for name in ("latents", "looks", "owner", "before")})
    latents, owner, before = (np.concatenate([s[name] for s in shards]) for name in ("latents", "owner", "before"))
    looks = [[world.Look(**look) for look in json.loads(str(text))] for shard in shards for text in shard["looks"]]
    return LatentSet(latents, looks, owner), before


def _part(data: LatentSet, rows: slice) -> LatentSet:
    return LatentSet(data.latents[rows], data.looks[rows], data.look_of_latent[rows])
