"""What a render is asked for: films as plans, with the checkpoint or the ending that they go on from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longvid.checkpoint import Ended, copy_ending, save_ending
from longvid.ending import Ending, longer_script
from longvid.errors import InputError
from longvid.films import first_rounds, join, num_lanes
from longvid.fingerprint import Machine, describe_folder, describe_model, fingerprint
from longvid.manifest import ENDING, Manifest, find_manifest, has_checkpoint, is_complete, state_folder
from longvid.parallel.rules import QueueRules
from longvid.parallel.topology import Topology
from longvid.plan import ModelFacts, Plan, make_plan
from longvid.ranks import describe_kernels
from longvid.sampler import Sampler
from longvid.script import Scene, Script, load_script, storyboard_text
from longvid.settings import Settings, with_whole_paths
from longvid.together import Film, Job
from longvid.writer import WriterState, check_path


@dataclass(frozen=True)
class Orders:
    """Takes orders for films of one engine: `join` on every rank, all else on the leader alone.

    ``root`` is the model's directory, ``vin`` its adapter's, if there is one; ``sampler_of`` gives a plan's sampler.
    """

    settings: Settings
    facts: ModelFacts
    root: Path | None
    vin: Path | None
    device: torch.device
    topology: Topology
    is_sparse: bool
    sampler_of: Callable[[Plan], Sampler]

    def film(self, story: str | Path | Script, path: Path, resume: bool) -> Film:
        """What the leader knows of a film before it begins."""
        check_path(path)
        script = story if isinstance(story, Script) else load_script(story)
        plan = make_plan(script, self.settings, self.facts)
        if self.root is None:
            if resume:
                raise InputError("a model that is not a directory has no checkpoints: nothing can be resumed")
            return Film(path, script, plan)
        marks = self._fingerprint(script, plan)
        manifest = find_manifest(path) if resume else None
        if manifest:
            manifest.require(path, marks)
        return Film(path, script, plan, manifest, marks)

    def films_to_make(
        self, stories: Sequence[str | Path | Script], paths: Sequence[Path], resume: bool
    ) -> Iterator[Film]:
        """Those of several films that are not complete; one without a checkpoint begins anew."""
        for story, path in zip(stories, paths, strict=True):
            if not (resume and is_complete(path)):
                yield self.film(story, path, resume and has_checkpoint(path))

    def longer(self, film: Path, scenes: tuple[Scene, ...], path: Path, resume: bool) -> Film:
        """What the leader knows of a longer film before it begins; the state is where it will be."""
        check_path(path)
        if self.settings.schedule == "chunks" or self.vin:
            reason = (
                "only the queue recalls latents, and no global tokens of them: schedule=chunks and vin are not for it"
            )
            raise InputError(f"{film}: cannot go on: {reason}")
        source = path if resume and path != film and (state_folder(path) / ENDING).exists() else film
        ending = Ending.read(source)
        script = longer_script(ending.script(), scenes, f"{film} and what is added")
        plan = make_plan(script, self.settings, self.facts, (*ending.ends, ending.frames))
        marks = self._fingerprint(script, plan)
        ending.require(film, marks)
        marks["extends"] = {"frames": ending.frames}
        if source != path:
            copy_ending(source, path, ending)
        manifest = Manifest.read(path) if resume else None
        if manifest:
            manifest.require(path, marks)
        return Film(path, script, plan, manifest, marks, ending)

    def join(self, films: Sequence[Film]) -> Job:
        """The films as one plan, each from where its checkpoint is."""
        rules, chosen = QueueRules.of(self.settings), self.settings
        if len(films) > 1 and chosen.schedule == "chunks":
            raise InputError(
                "several films go side by side through the queue; with schedule=chunks render one at a time"
            )
        lanes = num_lanes(chosen.mesh.films, self.topology.stage, chosen.sampler.steps, rules)
        done = [film.manifest.round if film.manifest else -1 for film in films]
        plans = [film.plan for film in films]
        start, firsts = first_rounds(plans, done, lanes, rules)
        levels = {tuple(self.sampler_of(plan).timestep(k) for k in range(chosen.sampler.steps)) for plan in plans}
        if len(levels) > 1:
            raise InputError(
                "films that are made together must have the same noise levels, and this model chooses them by the size "
                "of a film's largest chunk: render them one by one"
            )
        return Job(tuple(films), join(plans, firsts), start - 1)

    def keep_ending(self, film: Film, ended: Ended, written: WriterState) -> None:
        """Keep what a film that goes on from here needs, in place of what it went on from itself."""
        before = film.ending
        settings = with_whole_paths(self.settings).model_dump(mode="json")
        if Path(settings["model"]["path"]).is_dir():
            settings["model"]["path"] = str(Path(settings["model"]["path"]).resolve())
        marks = {name: value for name, value in film.fingerprint.items() if name != "extends"}
        save_ending(
            film.path,
            ended,
            frames=film.plan.num_frames,
            ends=[*before.ends, before.frames] if before else [],
            segments=written.segments,
            short=list(written.short),
            storyboard=storyboard_text(film.script),
            settings=settings,
            fingerprint=marks,
        )

    def _fingerprint(self, script: Script, plan: Plan) -> dict[str, Any]:
        if self.root is None:
            raise InputError("a model that is not a directory has no mark: films of it cannot go on")
        kernels = describe_kernels(self.device, sparse=self.is_sparse)
        machine = Machine(self.device.type, torch.get_num_threads(), self.topology, kernels)
        model = describe_model(self.root) | (describe_folder(self.vin) if self.vin else {})
        return fingerprint(script, plan, self.settings, self.facts, model=model, machine=machine)
