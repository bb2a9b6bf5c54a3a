"""What `longvid tune` finds, as JSON files: each head's sparse pattern, or its choice of options. Pure."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from longvid.document import Section, read_document, validate
from longvid.errors import InputError
from longvid.sparsity.settings import Cuboid, Share

Mode = Literal["full", "skip", "diagonal", "multi_diagonal", "vertical"]


class Pattern(Section):
    """What a head sees. `window` is in the mode's own unit; `full` and `skip` have none.

    `diagonal`: in latents, the distance along the film up to which tokens are seen. `multi_diagonal`: the same within
    every latent, as a share of it. `vertical`: latents that all see, evenly spread; besides, each tile sees itself.
    """

    mode: Mode
    window: Annotated[float, Field(ge=0, le=1024)] = 0.0

    def __str__(self) -> str:
        return f"{self.mode} {self.window:g}" if self.window else self.mode


FULL, SKIP = Pattern(mode="full"), Pattern(mode="skip")

Seconds = Annotated[float, Field(ge=0)]


class Costs(Section):
    """What one head's attention costs on the machine of the search: seconds a score, and a tile and a token besides."""

    score_s: Seconds
    tile_s: Seconds
    token_s: Seconds
    dense_score_s: Annotated[float, Field(gt=0)]

    def saving(self, num_queries: int, num_keys: int, density: float, num_tiles: int) -> float:
        """The share of dense attention's time that is saved; negative where tiles are slower."""
        scores, tokens = num_queries * num_keys, num_queries + num_keys
        sparse_s = density * scores * self.score_s + num_tiles * self.tile_s + tokens * self.token_s
        return 1 - sparse_s / (scores * self.dense_score_s)


_Layer = Annotated[tuple[Pattern, ...], Field(strict=False, min_length=1)]


class Stored(Section):
    """A file about the heads of one model. `model` is its mark."""

    format: Literal[1] = 1
    model: str
    num_layers: Annotated[int, Field(ge=1)]
    num_heads: Annotated[int, Field(ge=1)]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises InputError, with file and line, for a file that is not there or not a profile."""
        return validate(cls, read_document(path))

    def write(self, path: Path) -> None:
        """Replaces the file as a whole. Raises InputError where it cannot be written."""
        beside = path.with_name(f"{path.name}.part")
        try:
            beside.write_text(self.model_dump_json(indent=1) + "\n")
            os.replace(beside, path)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror})") from error

    def require(self, name: str, *, num_layers: int, num_heads: int, model: str | None = None) -> None:
        """Raise InputError, under the profile's name, where it is of another model."""
        if model is not None and model != self.model:
            raise InputError(f"{name}: is the profile of {self.model!r}, but the model is {model!r}; tune this one")
        for what, mine, other in (("layers", self.num_layers, num_layers), ("heads", self.num_heads, num_heads)):
            if mine != other:
                raise InputError(f"{name}: is of a model with {mine} {what}, but this one has {other}; tune this one")

    def check_heads(self, layers: Sequence[Sequence[object]]) -> None:
        """Raise ValueError where the entries are not one for each head of each layer."""
        if len(layers) != self.num_layers:
            raise ValueError(f"layers holds {len(layers)}, but num_layers is {self.num_layers}")
        for number, heads in enumerate(layers):
            if len(heads) != self.num_heads:
                raise ValueError(f"layer {number} holds {len(heads)} heads, but num_heads is {self.num_heads}")


class Profile(Stored):
    """The pattern of each head of each layer. `tile` is the size of tiles in tokens.

    `times` are the patterns' shares of dense attention's time, by their names, where they were searched for.
    """

    tile: Annotated[int, Field(ge=16, le=256)]
    costs: Costs
    times: dict[str, Seconds] = Field(default_factory=dict)
    layers: Annotated[tuple[_Layer, ...], Field(strict=False)]

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        self.check_heads(self.layers)
        return self

    def time_of(self, pattern: Pattern) -> float:
        """A pattern's share of dense attention's time, as far as it is known."""
        return 0.0 if pattern == SKIP else self.times.get(str(pattern), 1.0)

    def patterns(self) -> tuple[Pattern, ...]:
        """All that some head computes, each once, in a fixed order."""
        found = {pattern for heads in self.layers for pattern in heads} - {SKIP}
        return tuple(sorted(found, key=lambda pattern: (pattern.mode, pattern.window)))


class Option(Section):
    """One setting of a fixed pattern: a window in cuboids (`sta`), or how many latents all see (`tile`)."""

    value: Cuboid | Annotated[int, Field(ge=0, le=1024)]
    density: Share
    """The share of scores that it computed in the search."""


_Chosen = Annotated[tuple[Annotated[tuple[int, ...], Field(strict=False)], ...], Field(strict=False)]


class Choices(Stored):
    """The option of each head of each layer, for each span of a chunk's steps. `tile` is that of the policy's settings.

    A span begins at its share of the steps and ends where the next begins. `chosen` holds places in `options`, by span,
    layer and head; only options that are chosen are kept. `error` and `density` are means over all of them, as in the
    search; errors are shares of the variance of a layer's output. `even_error` is that of one option for all, the one
    of the settings.
    """

    policy: Literal["sta", "tile"]
    tile: Cuboid | Annotated[int, Field(ge=16, le=256)]
    density: Share
    error: Annotated[float, Field(ge=0)]
    even_density: Share
    even_error: Annotated[float, Field(ge=0)]
    options: Annotated[tuple[Option, ...], Field(strict=False, min_length=1)]
    spans: Annotated[tuple[Share, ...], Field(strict=False, min_length=1)]
    chosen: Annotated[tuple[_Chosen, ...], Field(strict=False)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.spans[0] != 0 or list(self.spans) != sorted(set(self.spans)):
            raise ValueError("spans must begin at 0 and grow")
        if len(self.chosen) != len(self.spans):
            raise ValueError(f"chosen holds {len(self.chosen)} spans, but spans is {len(self.spans)} long")
        for layers in self.chosen:
            self.check_heads(layers)
            if any(not 0 <= place < len(self.options) for heads in layers for place in heads):
                raise ValueError(f"chosen must hold places in options, 0 to {len(self.options) - 1}")
        is_window = [isinstance(value, tuple) for value in (self.tile, *(option.value for option in self.options))]
        if any(it is not (self.policy == "sta") for it in is_window):
            raise ValueError("sta has cuboids as tile and values, tile has numbers")
        return self

    def span_of(self, step: int, num_steps: int) -> int:
        """The span that a step is in."""
        return max(place for place, share in enumerate(self.spans) if step >= round(share * num_steps))
