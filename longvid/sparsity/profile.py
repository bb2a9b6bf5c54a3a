"""The profile of a model's heads: which sparse pattern each has. A JSON file that `longvid tune` writes. Pure."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from longvid.document import Section, read_document, validate
from longvid.errors import InputError

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


class Profile(Section):
    """The pattern of each head of each layer. `tile` is the size of tiles in tokens, `model` whose heads they are.

    `times` are the patterns' shares of dense attention's time, by their names, where they were searched for.
    """

    format: Literal[1] = 1
    model: str
    num_layers: Annotated[int, Field(ge=1)]
    num_heads: Annotated[int, Field(ge=1)]
    tile: Annotated[int, Field(ge=16, le=256)]
    costs: Costs
    times: dict[str, Seconds] = Field(default_factory=dict)
    layers: Annotated[tuple[_Layer, ...], Field(strict=False)]

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        if len(self.layers) != self.num_layers:
            raise ValueError(f"layers holds {len(self.layers)}, but num_layers is {self.num_layers}")
        for number, heads in enumerate(self.layers):
            if len(heads) != self.num_heads:
                raise ValueError(f"layer {number} holds {len(heads)} heads, but num_heads is {self.num_heads}")
        return self

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

    def time_of(self, pattern: Pattern) -> float:
        """A pattern's share of dense attention's time, as far as it is known."""
        return 0.0 if pattern == SKIP else self.times.get(str(pattern), 1.0)

    def patterns(self) -> tuple[Pattern, ...]:
        """All that some head computes, each once, in a fixed order."""
        found = {pattern for heads in self.layers for pattern in heads} - {SKIP}
        return tuple(sorted(found, key=lambda pattern: (pattern.mode, pattern.window)))
