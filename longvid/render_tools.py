"""What goes along with one render: decoders, savers, what was saved before, and what watches it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from longvid.checkpoint import Ended, Saved
from longvid.decode import FilmDecoders, StageDecoders
from longvid.ledger import Ledger
from longvid.live import LivePrompter
from longvid.parallel.decode_program import StageDecoding
from longvid.parallel.schedule import num_finished
from longvid.plan import Plan
from longvid.preemption import Preemption
from longvid.rank_model import RankModel
from longvid.together import FilmSavers
from longvid.trace import Trace


@dataclass
class Tools:
    """What goes along with one render."""

    trace: Trace | None = None
    ledger: Ledger | None = None
    decoders: FilmDecoders | StageDecoders | None = None
    decoding: StageDecoding | None = None
    """How decoding is dealt out, where stages do it."""
    saver: FilmSavers | None = None
    saved: Sequence[Saved | None] = ()
    done: int = -1
    """The last round that all films have behind them."""
    ended: Ended | None = None
    """What the film goes on from."""
    lasts: dict[int, Tensor] = field(default_factory=dict)
    """On the leader, the last finished latents of each film's shot at hand: see `Engine._last_of_shot`."""
    prompter: LivePrompter | None = None
    preemption: Preemption = field(default_factory=Preemption)


def make_tools(plan: Plan, model: RankModel, **with_them: Any) -> Tools:
    """What goes along with a render, and what decodes it."""
    tools = Tools(**with_them)
    tools.decoding = model.decoding(plan)
    if not model.decodes:
        return tools
    films = FilmDecoders(model.decoder)
    if tools.decoding is None:
        tools.decoders = films if model.mesh.is_leader else None
        return tools
    before = enumerate(num_finished(plan, model.settings, tools.done))
    resting = {i for i, count in before if tools.decoding.plan.resting(i, count) == model.mesh.place.stage}
    keeps = model.settings.output.keep_state or plan.first_chunk > 0
    tools.decoders = StageDecoders(films, plan, frozenset(resting), keeps)
    return tools
