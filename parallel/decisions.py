"""What the leader decides at the end of a round, and all ranks do at a later one: save the state, or change a prompt.

The leader's word travels in the headers of messages (`Decisions.hear`), and names a round by whose end everybody has
it. The executor asks at every `Boundary`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from longvid.parallel.actions import KvVersion, LatentVersion
from longvid.parallel.comm import Header
from longvid.parallel.mesh import Mesh
from longvid.parallel.pipeline import SAVE_NOTICE
from longvid.parallel.rank_actions import Boundary, SaveFilms, SaveLatents
from longvid.parallel.run_state import KEPT, Live
from longvid.parallel.stage import KvSpan
from longvid.plan import Plan
from longvid.sampler import Solver


class Saver(Protocol):
    """Keeps the state of a run at the end of a round, on every rank."""

    def is_due(self, done: int) -> bool:
        """Asked on the leader at the end of every round: whether the state should be saved soon."""
        ...

    def save_kv(self, done: int, kv: dict[KvVersion, KvSpan]) -> None:
        """This rank's K/V that live on after round `done`."""
        ...

    def save_latents(self, done: int, latents: dict[LatentVersion, Tensor], solvers: dict[int, Solver]) -> None:
        """An owner's latents and solvers."""
        ...

    def save_films(self, done: int) -> None:
        """On the leader, behind `save_latents`: all chunks that finished until the end of that round are handed out."""
        ...


class Prompter(Protocol):
    """Changes prompts while a film is made, on every rank."""

    def is_due(self) -> bool:
        """Asked on the leader at the end of every round: whether there is a new prompt."""
        ...

    def announce(self, at: int, plan: Plan) -> None:
        """On the leader: have it ready for all ranks at the end of round `at`."""
        ...

    def change(self, at: int, plan: Plan) -> Plan:
        """The plan for the rounds after `at`: none but prompts may differ."""
        ...


@dataclass
class Decisions:
    """Those of one run, as far as this rank knows them."""

    mesh: Mesh
    saver: Saver | None
    prompter: Prompter | None
    films_come_later: bool
    """Where stages decode, films are saved behind what they decoded."""
    save_at: int = -1
    latents_saved_at: int = -1
    """The last round whose latents were saved: none are of the film's last one."""
    prompt_at: int = -SAVE_NOTICE - 1

    def hear(self, header: Header) -> None:
        """What another rank knows."""
        self.save_at = max(self.save_at, header.save_at)
        self.prompt_at = max(self.prompt_at, header.prompt_at)

    def with_new_prompt(self, done: int, plan: Plan) -> Plan:
        """The plan after a round. The leader decides as it does for checkpoints, and all ranks hear of it in time."""
        if (prompter := self.prompter) is None:
            return plan
        notice = SAVE_NOTICE if self.mesh.topology.num_ranks > 1 else 0
        if self.mesh.is_leader and self.prompt_at <= done - max(1, notice) and prompter.is_due():
            self.prompt_at = done + notice
            prompter.announce(self.prompt_at, plan)
        return prompter.change(done, plan) if self.prompt_at == done else plan

    def boundary(self, action: Boundary, live: Live) -> None:
        """Save this rank's K/V, if that is due; the leader decides whether it will be."""
        if not self.saver:
            return
        if self.mesh.is_leader and self.saver.is_due(action.round) and self.save_at <= action.round - SAVE_NOTICE:
            # A lone rank has nobody to tell.
            self.save_at = action.round + (SAVE_NOTICE if self.mesh.topology.num_ranks > 1 else 0)
        if self.save_at == action.round:
            kept = {KvVersion(chunk, KEPT, edge): kv for (chunk, edge), kv in live.kept.items()}
            self.saver.save_kv(action.round, kept | {version: live.kv[version] for version in action.kv})

    def save_latents(self, action: SaveLatents, live: Live) -> None:
        if self.saver and self.save_at == action.round:
            latents = {version: live.latents[version] for version in action.latents}
            solvers = {i: live.solvers[i] for i in {version.chunk for version in latents} & live.solvers.keys()}
            self.saver.save_latents(action.round, latents, solvers)
            self.latents_saved_at = action.round
            if self.mesh.is_leader and not self.films_come_later:
                self.saver.save_films(action.round)

    def save_films(self, action: SaveFilms) -> None:
        if self.saver and self.latents_saved_at == action.round:
            self.saver.save_films(action.round)
