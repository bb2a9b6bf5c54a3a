"""Decoding on a rank: a decoder for several films, and its state as bytes that go to the rank that goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from longvid.models.checkpoint import StreamDecoder
from longvid.plan import Chunk, Plan

ALIGNMENT = 64
"""Bytes; where each tensor begins among those of a state."""


class DecoderStates(Protocol):
    """Where decoding is in every film, as the leader asks for it."""

    def load(self, film: int, state: Mapping[str, Tensor]) -> None:
        """Decoding goes on from here."""
        ...

    def state(self, film: int) -> Mapping[str, Tensor]:
        """Where it is when a checkpoint or the film's end asks."""
        ...

    def end(self, film: int) -> None:
        """A film is complete: its state is of no use."""
        ...


@dataclass
class FilmDecoders:
    """One decoder for several films: each goes on where it was."""

    decoder: StreamDecoder
    _states: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)
    _at: int = 0

    def at(self, film: int) -> StreamDecoder:
        """The decoder, in its place in a film."""
        if film != self._at:
            self._states[self._at] = self.decoder.state()
            self._at = film
            self.decoder.reset()
            if state := self._states.pop(film, None):
                self.decoder.load_state(state)
        return self.decoder

    def load(self, film: int, state: Mapping[str, Tensor]) -> None:
        """Put the decoder where it was in a film."""
        self.at(film).load_state(state)

    def state(self, film: int) -> Mapping[str, Tensor]:
        """Where it is in a film."""
        return self.at(film).state()

    def end(self, film: int) -> None:
        """A film is complete: its state is of no use."""
        self.at(film).reset()


@dataclass
class StageDecoders:
    """A rank's part where stages decode: the executor's `PieceDecoder`, and on the leader `DecoderStates`.

    `resting` says of which films the state is here when work begins. What the leader is asked for, other ranks gave it.
    """

    films: FilmDecoders
    plan: Plan
    resting: frozenset[int]
    keeps_endings: bool
    _kept: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)

    def decode(self, film: int, chunk: Chunk, latents: range, values: Tensor) -> Tensor:
        """Frames uint8 [T, H, W, 3] of the next latents of a film, fp32 [C, F, h, w]: some of a chunk's."""
        return push(self.films.at(film), self.plan, chunk, latents, values)

    def packed(self, film: int) -> Tensor:
        """Where the decoder is in a film, as bytes."""
        return pack_state(self.films.state(film))

    def forget(self, film: int) -> None:
        """Another rank goes on, or the film is complete."""
        self.films.end(film)

    def go_on(self, film: int, packed: Tensor) -> None:
        """Go on where another rank was."""
        self.films.load(film, unpack_state(packed))

    def keep(self, film: int, packed: Tensor) -> None:
        """This is where a decoder was, for `state`."""
        self._kept[film] = unpack_state(packed)

    def load(self, film: int, state: Mapping[str, Tensor]) -> None:
        """Decoding goes on from here, if it does so on this rank."""
        if film in self.resting:
            self.films.load(film, state)

    def state(self, film: int) -> Mapping[str, Tensor]:
        """Where decoding was when the leader was told last; before a film's first piece, its beginning."""
        return self._kept[film] if film in self._kept else self.films.state(film)

    def end(self, film: int) -> None:
        """A film is complete."""
        self._kept.pop(film, None)


def push(decoder: StreamDecoder, plan: Plan, chunk: Chunk, latents: range, values: Tensor) -> Tensor:
    """Frames uint8 [T, H, W, 3] of some of a chunk's latents. Every shot starts a decode of its own."""
    if chunk.start == 0 and latents.start == 0:
        decoder.reset()
    shot = plan.shots[chunk.shot]
    is_last_chunk = chunk.index == shot.first_chunk + shot.num_chunks - 1
    return decoder.push(values, is_last_chunk and latents.stop == chunk.num_latents)


def pack_state(state: Mapping[str, Tensor]) -> Tensor:
    """A decoder's state as uint8 [n] on the CPU. Strides are kept: how kernels round may depend on them."""
    entries, parts, size = [], [], 0
    for name, tensor in state.items():
        value = tensor.detach().cpu()
        if value.untyped_storage().nbytes() != value.nbytes:
            value = value.contiguous()
        flat = value.as_strided((value.numel(),), (1,)).view(torch.uint8)
        entries.append([name, str(value.dtype).removeprefix("torch."), value.shape, value.stride(), size, len(flat)])
        parts.append((size, flat))
        size += -(-len(flat) // ALIGNMENT) * ALIGNMENT
    said = json.dumps(entries).encode()
    first = -(-(8 + len(said)) // ALIGNMENT) * ALIGNMENT
    packed = torch.empty(first + size, dtype=torch.uint8)
    packed[:8] = torch.tensor([len(said)]).view(torch.uint8)
    packed[8 : 8 + len(said)] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
    for at, flat in parts:
        packed[first + at : first + at + len(flat)] = flat
    return packed


def unpack_state(packed: Tensor) -> dict[str, Tensor]:
    """What `pack_state` packed."""
    count = int(packed[:8].clone().view(torch.int64))
    first = -(-(8 + count) // ALIGNMENT) * ALIGNMENT
    state = {}
    for name, dtype, shape, stride, at, size in json.loads(packed[8 : 8 + count].numpy().tobytes()):
        flat = packed[first + at : first + at + size].clone().view(getattr(torch, dtype))
        state[name] = flat.as_strided(shape, stride)
    return state


def join_states(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One state of a whole decoder, of the parts that ranks have: of layers, or of `rows` (start, stop, height)."""
    found: dict[str, list[tuple[int, Tensor]]] = {}
    for part in parts:
        first_row = int(part["rows"][0]) if "rows" in part else 0
        for name in part.keys() - {"rows"}:
            found.setdefault(name, []).append((first_row, part[name]))
    return {name: _join_rows(pieces) for name, pieces in found.items()}


def _join_rows(pieces: list[tuple[int, Tensor]]) -> Tensor:
    """Rows [1, C, T, H, W] of several ranks, or what is the same on all; the channels stay innermost in memory."""
    if len(pieces) == 1 or pieces[0][1].dim() < 5:
        return pieces[0][1]
    in_order = [rows.permute(0, 2, 3, 4, 1) for _, rows in sorted(pieces, key=lambda piece: piece[0])]
    return torch.cat(in_order, dim=2).permute(0, 4, 1, 2, 3)
