"""Decoding on stages beside their layers: pieces of finished chunks, their frames, and the decoder's state on its way.

The executor calls it for the Actions and messages of decoding. What is decoded where is said by `decoding.py`, and when
by `decode_program.py`; the decoder itself is `longvid/decode.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longvid.parallel.decisions import Decisions
from longvid.parallel.decoding import Piece
from longvid.parallel.message_shapes import NOTHING
from longvid.parallel.rank_actions import (
    DecoderState,
    Halfway,
    KeepState,
    KeptState,
    Message,
    PieceFrames,
    PieceLatents,
    Show,
)
from longvid.parallel.run_state import Finished, Live
from longvid.parallel.stage import PieceDecoder
from longvid.plan import Plan


@dataclass(frozen=True)
class PieceDecoding:
    """One rank's part in it; `decoder` and `shown` are the executor's."""

    decoder: PieceDecoder | None
    shown: Callable[[Finished], Finished]
    decisions: Decisions

    def decode(self, piece: Piece, plan: Plan, live: Live) -> None:
        """Here the peers of a stage would join in, each with some rows of the latents."""
        latents, chunk = range(piece.first, piece.stop), plan.chunks[piece.chunk]
        values = live.pieces.pop(piece) if piece in live.pieces else self._part(piece, plan, live)
        frames = self._decoder().decode(piece.film, chunk, latents, values)
        live.frames[piece.chunk, piece.first] = frames

    def keep_state(self, action: KeepState) -> None:
        if len(state := self._kept_state(action)):
            self._decoder().keep(action.film, state)

    def show(self, action: Show, plan: Plan, live: Live) -> Finished:
        """A chunk of which all pieces are decoded."""
        i = action.chunk
        parts = sorted(key for key in live.frames if key[0] == i)
        frames = torch.cat([live.frames.pop(part) for part in parts])
        return Finished(plan.chunks[i], live.finished.pop(i).clone(), frames)

    def of(self, message: Message, plan: Plan, live: Live) -> Tensor:
        """What a message between stages that decode holds."""
        match message:
            case PieceLatents(piece=piece):
                return self._part(piece, plan, live)
            case PieceFrames(piece=piece):
                return live.frames.pop((piece.chunk, piece.first))
            case DecoderState(piece=piece):
                state = self._decoder().packed(piece.film)
                self._decoder().forget(piece.film)
                return state
            case KeptState(is_asked=False):
                return self._kept_state(message)
        return NOTHING

    def take(self, message: Message, value: Tensor, live: Live) -> None:
        """Put away what came."""
        match message:
            case PieceLatents(piece=piece):
                live.pieces[piece] = value
            case Halfway(chunk=i):
                live.halfway[i] = value
            case PieceFrames(piece=piece):
                live.frames[piece.chunk, piece.first] = value
            case DecoderState(piece=piece):
                self._decoder().go_on(piece.film, value)
            case KeptState(film=film, is_asked=False) if len(value):
                self._decoder().keep(film, value)

    def _part(self, piece: Piece, plan: Plan, live: Live) -> Tensor:
        finished = Finished(plan.chunks[piece.chunk], live.finished[piece.chunk])
        return self.shown(finished).latents[:, piece.first : piece.stop]

    def _kept_state(self, action: KeepState | KeptState) -> Tensor:
        """Where a film's decoder is, if a checkpoint or the film's end needs it."""
        decoder = self._decoder()
        is_needed = decoder.keeps_endings if action.is_end else self.decisions.save_at == action.round
        state = decoder.packed(action.film) if is_needed else NOTHING.to(torch.uint8)
        if action.is_end:
            decoder.forget(action.film)
        return state

    def _decoder(self) -> PieceDecoder:
        assert self.decoder is not None, "a rank that decodes needs a decoder"
        return self.decoder
