"""`longvid train cache`: which steps or modules a model can do without, by films that are denoised and not written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from longvid.cache.plan import MODULES, CachePlan, Module, StepPlan
from longvid.cache.runtime import CacheRuntime, Place
from longvid.cache.search import Matrix, choose_modules, choose_steps, forecast_errors
from longvid.cache.settings import NoCache
from longvid.cache.table import Row, computed_share, write_table
from longvid.engine import Engine
from longvid.errors import InputError
from longvid.models.loader import open_checkpoint
from longvid.parallel.mesh import lone_mesh
from longvid.plan import Plan
from longvid.ranks import set_threads
from longvid.sampler import Sampler, Solver
from longvid.script import load_script
from longvid.settings import Settings

Method = Literal["steps", "bac", "harmonica"]

MAX_TOKENS = 64
"""Of every module's output so many tokens are looked at, evenly spaced."""


@dataclass(frozen=True)
class Calibration:
    """What was found: for `steps` the computed steps, else what each step leaves out. `share` of the work is left."""

    method: Method
    share: float
    computed: tuple[int, ...] = ()
    rows: tuple[Row, ...] = ()
    model: str = ""
    num_layers: int = 0


def calibrate(
    story: Path,
    settings: Settings,
    *,
    method: Literal["steps", "bac"],
    share: float,
    bubble: float,
    on_done: Callable[[int, int], None],
) -> Calibration:
    """Find what can be left out so that about `share` of the steps, or of each module's, are computed.

    `on_done` hears how many films are done, of how many. Raises InputError for a wrong storyboard or model.
    """
    set_threads(settings)
    settings = settings.model_copy(update={"cache": NoCache()})
    count = max(2, round(share * settings.sampler.steps))
    films = _Films(story, settings)
    return _steps(films, count, on_done) if method == "steps" else _modules(films, count, bubble, on_done)


class _Films:
    """The same film, denoised in several ways."""

    def __init__(self, story: Path, settings: Settings) -> None:
        self.settings, self.script = settings, load_script(story)
        self.checkpoint = open_checkpoint(settings.model.path)

    def engine(self, cache: CacheRuntime | None = None) -> tuple[Engine, Plan]:
        engine = Engine(self.checkpoint, self.settings, lone_mesh(), cache=cache)
        return engine, engine.plan(self.script)


# --------------------------------------------------------------------------------------------------------- whole steps


class _RecordingSampler:
    """A sampler that keeps every velocity, or has one step's forecast by the two before it."""

    def __init__(self, sampler: Sampler, forecast: int | None = None) -> None:
        self._sampler, self.forecast = sampler, forecast
        self.velocities: list[list[Tensor]] = []

    @property
    def num_steps(self) -> int:
        return self._sampler.num_steps

    def timestep(self, step: int) -> float:
        return self._sampler.timestep(step)

    def new_solver(self) -> _RecordingSolver:
        self.velocities.append([])
        return _RecordingSolver(self._sampler.new_solver(), self.velocities[-1], self.forecast)


class _RecordingSolver:
    def __init__(self, solver: Solver, velocities: list[Tensor], forecast: int | None) -> None:
        self._solver, self._velocities, self._forecast = solver, velocities, forecast

    def step(self, velocity: Tensor, step: int, sample: Tensor) -> Tensor:
        if step == self._forecast:
            before, last = self._velocities[-2:]
            velocity = 2 * last - before
        self._velocities.append(velocity.float())
        return self._solver.step(velocity, step, sample)

    def state(self) -> dict[str, Tensor]:
        return self._solver.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._solver.load_state(state)


def _steps(films: _Films, count: int, on_done: Callable[[int, int], None]) -> Calibration:
    """Steps by what an error at each of them does to the film: every step is once forecast alone."""
    engine, plan = films.engine()
    num_steps = films.settings.sampler.steps

    def denoise(forecast: int | None) -> tuple[Tensor, list[list[Tensor]]]:
        made: list[_RecordingSampler] = []

        def record(sampler: Sampler) -> Sampler:
            made.append(_RecordingSampler(sampler, forecast))
            return made[-1]

        engine.wrap_sampler = record
        latents = torch.cat([finished.latents for finished in engine.denoise(plan)], dim=1)
        return latents, made[-1].velocities

    whole, velocities = denoise(None)
    gram = np.mean([_gram(torch.stack(chunk)) for chunk in velocities], axis=0)
    candidates = range(2, num_steps - 1)
    on_done(1, 1 + len(candidates))
    sensitivity = np.zeros(num_steps)
    for done, step in enumerate(candidates, 2):
        latents, _ = denoise(step)
        error = float((latents - whole).norm() / whole.norm())
        sensitivity[step] = error / max(forecast_errors(gram, step - 2, step - 1, 1)[step], 1e-9)
        on_done(done, 1 + len(candidates))
    sensitivity[1] = sensitivity[2:-1].max(initial=1.0)  # the second step has only one before it
    computed = choose_steps(gram, sensitivity, count, 1)
    return Calibration("steps", len(computed) / num_steps, computed=computed)


# ------------------------------------------------------------------------------------------------------ single modules


class _Recorder(CacheRuntime):
    """Leaves nothing out, and sees what every module gives at every step of the chunks in flight."""

    def __init__(self, num_steps: int, num_layers: int) -> None:
        everything = frozenset((layer, module) for layer in range(num_layers) for module in MODULES)
        super().__init__(CachePlan(tuple(StepPlan(modules=everything) for _ in range(num_steps))))
        self._values: dict[int, dict[tuple[int, Module], list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        self.grams: dict[tuple[int, Module], list[Matrix]] = defaultdict(list)

    def module(self, place: Place, module: Module, step: int, compute: Callable[[], Tensor]) -> Tensor:
        value = compute()
        chunk, branch, layer = place
        if branch == 0:
            stride = -(-value.shape[1] // MAX_TOKENS)
            self._values[chunk][layer, module].append(value[0, ::stride].float().flatten())
        return value

    def end_step(self, chunk: int, step: int) -> None:
        if step == len(self.plan.steps) - 1:
            for name, values in self._values.pop(chunk).items():
                self.grams[name].append(_gram(torch.stack(values)))


def _modules(films: _Films, count: int, bubble: float, on_done: Callable[[int, int], None]) -> Calibration:
    facts, num_layers = films.checkpoint.facts, films.checkpoint.facts.num_layers
    if facts.joint_text:
        reason = "layers take text and video together, so none of their modules is left out: use --method steps"
        raise InputError(f"train cache: {facts.name}: its {reason}")
    recorder = _Recorder(films.settings.sampler.steps, num_layers)
    engine, plan = films.engine(recorder)
    for done, _ in enumerate(engine.denoise(plan), 1):
        on_done(done, len(plan.chunks))
    grams: dict[tuple[int, Module], Matrix] = {name: np.mean(found, axis=0) for name, found in recorder.grams.items()}
    rows = choose_modules(grams, count, bubble)
    return Calibration("bac", computed_share(rows, num_layers), rows=rows, model=facts.name, num_layers=num_layers)


def _gram(values: Tensor) -> Matrix:
    """Inner products of all steps' values, in the scale of their mean square."""
    flat = values.flatten(1).double()
    gram = flat @ flat.T
    found: Matrix = (gram / gram.diagonal().mean()).cpu().numpy()
    return found


def write_preset(found: Calibration, path: Path, steps: int) -> None:
    """A preset that uses what was found; rows go to a table beside it."""
    if found.method == "steps":
        cache = [f"computed: [{', '.join(map(str, found.computed))}]", "order: 1"]
    else:
        table = path.with_suffix(".json")
        write_table(table, found.rows, method=found.method, model=found.model, num_layers=found.num_layers)
        cache = [f"table: {table}"]
    lines = ["sampler:", f"  steps: {steps}", "cache:", "  policy: static", *(f"  {line}" for line in cache)]
    path.write_text("\n".join(lines) + "\n")
