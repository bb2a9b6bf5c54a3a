"""Settings of sparse attention: one class a policy, with the defaults that its paper publishes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field

from longvid.document import Section, with_policy

Share = Annotated[float, Field(ge=0, le=1)]
Tile = Annotated[int, Field(ge=16, le=256)]
Cuboid = Annotated[
    tuple[Annotated[int, Field(ge=1, le=64)], Annotated[int, Field(ge=1, le=64)], Annotated[int, Field(ge=1, le=64)]],
    Field(strict=False),
]
"""Extent in latents, and in rows and columns of tokens."""


class Dense(Section):
    """All scores are computed."""

    policy: Literal["dense"] = "dense"


class Sparse(Section):
    """What all sparse policies have: the first steps of a chunk and the first layers of the model may stay dense.

    Both are shares: 0.2 of 50 steps are 10. `crossover: auto` computes densely where tiles would be slower, as measured
    for each kernel; `always` never does.
    """

    dense_steps: Share = 0.0
    dense_layers: Share = 0.0
    crossover: Literal["auto", "always"] = "auto"


class AdaSpa(Sparse):
    """AdaSpa: tiles of the largest attention mass, searched for with the cached LSE; head budgets follow recall."""

    policy: Literal["adaspa"]
    dense_steps: Share = 0.2
    tile: Tile = 64
    sparsity: Share = 0.8
    search_at: Annotated[tuple[Share, ...], Field(strict=False, min_length=1)] = (0.2, 0.6)
    recall: Share = 0.8
    sample_every: Annotated[int, Field(ge=1, le=64)] = 7
    """Every n-th query of a tile is looked at in a search; 1: all, as in the paper.

    Better no divisor or multiple of a latent's row: then all that are looked at stand in the same columns. On the
    included model the tiles that every 7th query finds hold 0.98 of the mass or more that an exact search's hold, and
    those of every 8th 0.94.
    """


class SparseVdit(Sparse):
    """Sparse-vDiT: each head's pattern from an offline search, kept in a profile (`longvid tune`)."""

    policy: Literal["sparse_vdit"]
    profile: Annotated[str, Field(min_length=1)]


class TileFrames(Sparse):
    """Efficient-vDiT: every latent sees itself and some latents evenly spread over the film."""

    policy: Literal["tile"]
    profile: Annotated[str, Field(min_length=1)] | None = None
    """Each layer's number of global latents, from a search (`longvid tune`), and the tile."""
    global_latents: Annotated[int, Field(ge=0, le=1024)] = 4
    tile: Tile = 64


class Sta(Sparse):
    """Sliding tile attention: windows of whole cuboids, with the centre clamped at the borders."""

    policy: Literal["sta"]
    profile: Annotated[str, Field(min_length=1)] | None = None
    """Each head's window, from a search (`longvid tune`), and the tile."""
    dense_steps: Share = 0.24
    tile: Cuboid = (6, 8, 8)
    window: Cuboid = (3, 3, 3)


class Radial(Sparse):
    """Radial attention: the further two latents are from each other, the narrower the band that is seen."""

    policy: Literal["radial"]
    dense_steps: Share = 0.24
    dense_layers: Share = 0.025
    tile: Tile = 128
    decay: Annotated[float, Field(gt=0, le=16)] = 1.0


class Grat(Sparse):
    """GRAT: cuboid groups see groups that share their t, h or w (`cross`), or their neighbours (`neighbours`)."""

    policy: Literal["grat"]
    group: Cuboid = (4, 8, 8)
    pattern: Literal["cross", "neighbours"] = "cross"


class Svg2(Sparse):
    """Sparse VideoGen 2: queries and keys ordered by k-means, pairs of clusters kept to a share of the mass."""

    policy: Literal["svg2"]
    dense_steps: Share = 0.2
    dense_layers: Share = 0.03
    query_clusters: Annotated[int, Field(ge=1, le=65536)] = 300
    key_clusters: Annotated[int, Field(ge=1, le=65536)] = 1000
    top_p: Share = 0.9
    min_keep: Share = 0.1
    first_iterations: Annotated[int, Field(ge=1, le=1000)] = 50
    iterations: Annotated[int, Field(ge=0, le=1000)] = 2
    sample_every: Annotated[int, Field(ge=1, le=64)] = 3
    """All iterations of a step but the last look at every n-th token; 1: at all, as in the paper. So does SVG-EAR for
    the error of a centroid, at every n-th key of its cluster.

    Better no divisor or multiple of a latent's row: see `AdaSpa.sample_every`.
    """


class SvgEar(Svg2):
    """SVG-EAR: SVG2 in which skipped clusters count as their centroids, and the worst approximated are exact."""

    policy: Literal["svg_ear"]  # type: ignore[assignment]


class Rettention(Sparse):
    """Re-ttention: a window, rescaled by the share of the whole softmax that it held when that was last computed."""

    policy: Literal["rettention"]
    dense_steps: Share = 0.3
    keep: Share = 0.031
    """Of the keys, in a window around each tile."""
    refresh_every: Annotated[int, Field(ge=1, le=1000)] = 5
    growth: Annotated[float, Field(ge=0, le=1)] = 0.04
    """Added to the share at every step; 1: nothing is rescaled, which is a plain window."""
    residual: bool = True
    """Also keep what the window missed at the last dense step, a hidden state for each layer of a chunk. Without it the
    output shrinks; on the included model it is then further from dense attention's than a plain window's."""
    tile: Tile = 64


class Asa(Sparse):
    """BLADE's adaptive sparse attention, training-free: tiles along a space-filling curve, scored on sampled tokens."""

    policy: Literal["asa"]
    tile: Tile = 128
    sample: Annotated[int, Field(ge=1, le=256)] = 16
    mass: Share = 0.95
    min_keep: Share = 0.05
    max_keep: Share = 0.5
    pooled: bool = False
    """Also see the mean of every skipped tile (ASA_G)."""


def _with_policy(data: Any) -> Any:
    return with_policy(data, "dense", POLICIES)


SparseSettings = AdaSpa | SparseVdit | TileFrames | Sta | Radial | Grat | Svg2 | SvgEar | Rettention | Asa

AttentionSettings = Annotated[Dense | SparseSettings, Discriminator("policy"), BeforeValidator(_with_policy)]

POLICIES = ("dense", "adaspa", "sparse_vdit", "tile", "sta", "radial", "grat", "svg2", "svg_ear", "rettention", "asa")
