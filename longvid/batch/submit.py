"""Handing jobs in: every film is planned before any worker starts, so that what is wrong is told at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from longvid.batch.folder import BatchFolder
from longvid.batch.jobs import Defaults, Job, Refused, read_jobs
from longvid.batch.table import Table
from longvid.errors import InputError
from longvid.fingerprint import Plain
from longvid.models.facts import NAMES, facts_of, find_model
from longvid.plan import make_plan
from longvid.settings import with_whole_paths


@dataclass(frozen=True)
class Planned:
    """Jobs that can be done, with their shapes, and what is none."""

    jobs: list[tuple[Job, str]]
    refused: list[Refused]


def plan_jobs(paths: Sequence[Path], defaults: Defaults) -> Planned:
    """Read and plan the jobs of these files. Raises InputError for what concerns all: settings, model, paths."""
    facts_of(defaults.settings().model.path)
    planned = Planned([], [])
    for item in read_jobs(paths, defaults):
        try:
            if isinstance(item, Refused):
                planned.refused.append(item)
            else:
                job = from_anywhere(item)
                planned.jobs.append((job, shape_of(job)))
        except InputError as error:
            planned.refused.append(Refused(item.name, item.place, _with_place(str(error), item.place)))
    return planned


def submit(planned: Planned, folder: BatchFolder, table: Table) -> None:
    """Enter jobs in a batch's table, and as failed what is none.

    Raises InputError, and enters nothing, for jobs that changed under their names and for films in the folder that are
    not of this batch.
    """
    known = {row.name for row in table.rows()}
    for job, _ in planned.jobs:
        if job.name not in known and folder.is_there(job.name):
            raise InputError(f"{folder.film(job.name)}: is there already, and not of this batch; move it away")
    table.add(planned.jobs)
    table.refuse(planned.refused)


def shape_of(job: Job) -> str:
    """Films of one shape run the same kernels on the same sizes: `64x64, 6 latents`. Raises InputError."""
    plan = make_plan(job.script, job.settings, facts_of(job.settings.model.path))
    return f"{plan.width}x{plan.height}, {max(chunk.num_latents for chunk in plan.chunks)} latents"


def from_anywhere(job: Job) -> Job:
    """The same from any folder: a batch may go on elsewhere than where it began."""
    settings, name = with_whole_paths(job.settings), job.settings.model.path
    if name not in NAMES:
        model = settings.model.model_copy(update={"path": str(find_model(name).absolute())})
        settings = settings.model_copy(update={"model": model})

    def whole(part: Plain) -> Plain:
        image = part.get("image")
        return {**part, "image": str((Path(job.place).parent / image).absolute())} if image else part

    story = {**whole(job.story), "scenes": [whole(scene) for scene in job.story["scenes"]]}
    return replace(job, settings=settings, story=story)


def _with_place(text: str, place: str) -> str:
    return text if text.startswith(place) else f"{place}: {text}"
