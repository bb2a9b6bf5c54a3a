"""The overview that `longvid plan` prints: what a render will do and hold, from the plan and its schedule alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby, takewhile
from typing import Any

from longvid.cache.settings import plan_cache
from longvid.memory import Dealt, StageMemory, stage_memory
from longvid.models.parts import ModelPart
from longvid.parallel.actions import Action
from longvid.parallel.decode_program import StageDecoding
from longvid.parallel.decoding import DecodeAction, Decoding, deal_work
from longvid.parallel.findings import Report
from longvid.parallel.partition import Costs
from longvid.parallel.rehearsal import rehearse_schedule, stage_costs
from longvid.parallel.rules import rules_of
from longvid.parallel.schedule import make_schedule
from longvid.parallel.topology import AXES, Topology
from longvid.parallel.verify import grid, simulate
from longvid.parallel.verify_decoding import simulate_decoding
from longvid.plan import ModelFacts, Plan, SceneSpan, Shot
from longvid.settings import Settings

GRID_ROUNDS = 24
"""The picture of the schedule grows with the square of the rounds, and soon repeats itself."""


@dataclass(frozen=True)
class Overview:
    """A plan, and the report of its schedule's simulation."""

    plan: Plan
    settings: Settings
    facts: ModelFacts
    report: Report
    topology: Topology
    bubble: float
    """The share of the ranks' time without work, if all layers cost the same and nothing else costs anything."""
    memory: tuple[StageMemory, ...]
    decoding: StageDecoding | None = None
    """How stages decode, if they do: here as though that cost nothing."""

    @classmethod
    def of(
        cls,
        plan: Plan,
        settings: Settings,
        facts: ModelFacts,
        topology: Topology | None = None,
        weights: Callable[[ModelPart, int], int] = lambda part, itemsize: 0,
    ) -> Overview:
        """Simulate the plan's whole schedule, and rehearse it on the mesh (None: a lone rank).

        An error in it is ours (ScheduleError). `weights` says how many bytes a part of the transformer takes, with so
        many bytes a number.
        """
        actions, rules, steps = make_schedule(plan, settings), rules_of(settings), settings.sampler.steps
        report = simulate(actions, plan.chunks, steps, rules)
        topology = topology or Topology()
        costs = Costs((1.0,) * facts.num_layers)
        share = plan_cache(settings.cache, steps, facts.num_layers).share
        bounds, shares = deal_work(costs, topology.stage, settings.mesh.decode)
        decoding = StageDecoding(Decoding.of(shares, plan, rules, steps, facts.decoder_passes)) if shares else None
        if decoding:
            simulate_decoding(decoding.plan.spread(make_schedule(plan, settings)), plan.chunks, plan.films)
        cost = stage_costs(costs, topology, bounds, steps, share)
        buffers = settings.mesh.buffers
        rehearsal = rehearse_schedule(lambda: make_schedule(plan, settings), topology, buffers, cost, decoding)
        dealt = Dealt(topology, bounds, decoding.plan if decoding else None)
        memory = stage_memory(plan, settings, facts, report, dealt, weights)
        return cls(plan, settings, facts, report, topology, rehearsal.bubble, memory, decoding)

    def as_json(self) -> dict[str, Any]:
        """All of it as plain data. `latents_mb` (10^6 bytes) is the most that latents in flight take, in fp32."""
        plan, report = self.plan, self.report
        return {
            "model": self.facts.name,
            "width": plan.width,
            "height": plan.height,
            "fps": plan.fps,
            "frames": plan.num_frames,
            "seconds": plan.num_frames / plan.fps,
            "schedule": self.settings.schedule,
            "steps": self.settings.sampler.steps,
            "chunks": len(plan.chunks),
            "rounds": report.num_rounds,
            "units": report.num_units,
            "forecasts": report.num_forecasts,
            "tokens_per_latent": self.tokens_per_latent,
            "max_unit_latents": self.max_unit_latents,
            "max_unit_tokens": self.max_unit_latents * self.tokens_per_latent,
            "max_live_latents": report.max_live_latents,
            "max_live_kv": report.max_live_kv,
            "latents_mb": self.latents_mb,
            "cache_mb": sum(stage.cache_mb for stage in self.memory),
            "memory": [asdict(stage) for stage in self.memory],
            "ranks": self.topology.num_ranks,
            "mesh": dict(zip(AXES, self.topology.sizes, strict=True)),
            "layers": [[span.start, span.stop] for span in self.layers],
            "bubble_predicted": self.bubble,
            "shots": [
                {**asdict(shot), "scenes": [self._scene(scene) for scene in scenes]} for shot, scenes in self._shots()
            ],
        }

    def as_text(self) -> str:
        """The same for people."""
        plan, report, steps, chunks = self.plan, self.report, self.settings.sampler.steps, len(self.plan.chunks)
        size, tokens = f"{plan.width} x {plan.height}", self.tokens_per_latent
        units = f"{report.num_units} units" + (f" and {report.num_forecasts} forecasts" if report.num_forecasts else "")
        work = f"{chunks} chunks × {steps} steps = {units} in {report.num_rounds} rounds"
        live = f"{report.max_live_latents} chunks' latents ({self.latents_mb:.1f} MB), K/V of {report.max_live_kv}"
        lines = [
            f"film      {_seconds(plan, plan.num_frames)}, {plan.num_frames} frames of {size} at {plan.fps:g} fps",
            f"model     {self.facts.name}: {self.facts.num_layers} layers, {tokens} tokens a latent",
            f"schedule  {self.settings.schedule}: {work}",
            f"a unit    at most {self.max_unit_latents} latents with context, {self.max_unit_latents * tokens} tokens",
            f"at once   at most {live}",
        ]
        for index, stage in enumerate(self.memory):
            kinds = {
                "weights": stage.weights_mb,
                "K/V": stage.kv_mb,
                "latents": stage.latents_mb,
                "cache": stage.cache_mb,
            }
            parts = ", ".join(f"{kind} {size:.1f} MB" for kind, size in kinds.items() if size)
            lines.append(f"{f'stage {index}':10}{parts}")
        if self.topology.num_ranks > 1:
            spans = ", ".join(f"{span.start}-{span.stop - 1}" for span in self.layers)
            lines.append(f"mesh      {self.topology}")
            lines.append(f"stages    layers {spans} if all cost the same; bubble {self.bubble * 100:.1f} %")
        for shot, scenes in self._shots():
            lines.append(f"shot {shot.index}    {shot.num_latents} latents in {shot.num_chunks} chunks")
            lines += [
                f"  frame {scene.first_frame:>6}  {_seconds(plan, scene.num_frames):>7}  {plan.prompts[scene.prompt]}"
                for scene in scenes
            ]
        return "\n".join(lines)

    def grid(self) -> str:
        """Rounds by chunks with the step that each takes; for a long film, its beginning."""
        actions: Iterable[Action | DecodeAction] = make_schedule(self.plan, self.settings)
        if self.decoding:
            actions = self.decoding.plan.spread(actions)
        if self.report.num_rounds <= GRID_ROUNDS:
            return grid(actions)
        beginning = grid(takewhile(lambda action: action.round < GRID_ROUNDS, actions))
        return f"{beginning}\nand so on, to round {self.report.num_rounds - 1}"

    @property
    def layers(self) -> tuple[range, ...]:
        """Each stage's layers, if all cost the same: a render measures what they cost."""
        costs, chosen = Costs((1.0,) * self.facts.num_layers), self.settings
        return deal_work(costs, self.topology.stage, chosen.mesh.decode)[0]

    @property
    def tokens_per_latent(self) -> int:
        return self.facts.grid.tokens_per_latent(self.plan.width, self.plan.height)

    @property
    def max_unit_latents(self) -> int:
        return max(chunk.num_left + chunk.num_latents + chunk.num_right for chunk in self.plan.chunks)

    @property
    def latents_mb(self) -> float:
        width, height = self.facts.grid.latent_size(self.plan.width, self.plan.height)
        largest = max(chunk.num_latents for chunk in self.plan.chunks)
        return self.report.max_live_latents * largest * self.facts.latent_channels * width * height * 4 / 1e6

    def _shots(self) -> Iterator[tuple[Shot, list[SceneSpan]]]:
        scenes = groupby(self.plan.scenes, key=lambda scene: scene.shot)
        for shot, (_, members) in zip(self.plan.shots, scenes, strict=True):
            yield shot, list(members)

    def _scene(self, scene: SceneSpan) -> dict[str, Any]:
        return {**asdict(scene), "prompt": self.plan.prompts[scene.prompt]}


def _seconds(plan: Plan, num_frames: int) -> str:
    return f"{num_frames / plan.fps:.1f} s"
