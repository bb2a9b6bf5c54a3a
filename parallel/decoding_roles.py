"""Who decodes, as programs see it: stages that decode beside their layers, and owners that decode with the leader.

`pipeline.py` asks `DecodePart` what a rank does for decoding, and when; `decode_program.py` answers. Without it the
leader decodes what it hands out, alone or with the first of `DecodingOwners`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from longvid.parallel.decoding import DecodeAction, Decoding
from longvid.parallel.rank_actions import RankAction
from longvid.parallel.topology import Coordinate, Topology

When = Literal["now", "late", "awaited"]
"""Of what the leader does for decoding: at once; in its turn behind what is put off; or when that came in its turn."""


class DecodingParts(Protocol):
    """Decoding as all ranks know it."""

    @property
    def plan(self) -> Decoding: ...

    def takes_part(self, place: Coordinate) -> bool: ...

    def part(self, topology: Topology, place: Coordinate) -> DecodePart: ...


class DecodePart(Protocol):
    """A rank's part in decoding."""

    def of(self, action: DecodeAction) -> Iterator[tuple[When, RankAction]]:
        """What the rank does for an action, and when. On later stages all of it is done at once."""
        ...


@dataclass(frozen=True)
class DecodingOwners:
    """The first `size` owners of the `chunk` axis decode together.

    Each has some of the decoder's layers, the last owner the first of them; or some rows, all of the same latent.
    """

    size: int = 1
    by_rows: bool = False

    @property
    def takers(self) -> set[int]:
        """The places of those that finished latents go to."""
        return set(range(self.size)) if self.by_rows else {0, self.size - 1}


LEADER_DECODES = DecodingOwners()
