"""The command line of batches: `longvid batch JOBS... --out DIR`, and `status DIR` and `report DIR` of one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from longvid.errors import InputError
from longvid.options import AsJson, Model, Overrides, Preset, Ray, all_overrides


class _RunUnlessNamed(TyperGroup):
    """`longvid batch JOBS...` is `longvid batch run JOBS...`: only words that name another command are one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


batch_app = typer.Typer(
    cls=_RunUnlessNamed,
    help="Render many films: `longvid batch JOBS... --out DIR` (see `longvid batch run --help`).",
    no_args_is_help=True,
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The batch's folder.")]


@batch_app.command("run")
def run(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the films go.")],
    jobs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="JOBS...", help="Storyboards, folders of them, or prompt files (.txt, .jsonl, .csv)."),
    ] = None,
    model: Model = None,
    preset: Preset = None,
    overrides: Overrides = None,
    length: Annotated[str, typer.Option("--for", metavar="5s", help="How long a film is that does not say it.")] = "5s",
    workers: Annotated[int, typer.Option(min=1, max=1024, help="Films at once.")] = 1,
    ranks_per_film: Annotated[int, typer.Option(min=1, max=1024, help="Ranks of each worker.")] = 1,
    max_retries: Annotated[int, typer.Option(min=0, max=1000, help="Workers that one film may cost, beside one.")] = 3,
    ray: Ray = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in DIR; JOBS may be left out.")] = False,
) -> None:
    """Render many films. Each worker loads the weights once; a worker that dies costs no film.

    What is done is in DIR; the same command, or --resume, goes on. Several batches may share DIR.
    """
    from rich.console import Console

    from longvid.batch.folder import BatchFolder
    from longvid.batch.gangs import hire_from
    from longvid.batch.jobs import Defaults
    from longvid.batch.status import show_batch
    from longvid.batch.submit import plan_jobs, submit
    from longvid.batch.supervisor import BatchPlan, Supervisor, verdict
    from longvid.batch.table import Table
    from longvid.launch.cluster import share_of_processors

    if not jobs and not resume:
        raise InputError("name the jobs, or --resume to go on with those in --out")
    if resume:
        Table.find(out).close()
    plan = BatchPlan(out, workers, ranks_per_film, max_retries)
    with hire_from(ray, plan, lambda line: typer.echo(f"longvid: {line}", err=True)) as crew:
        threads = share_of_processors(crew.processors(), workers * ranks_per_film)
        planned = plan_jobs(jobs or [], Defaults(preset, tuple(all_overrides(model, overrides)), length, threads))
        folder = BatchFolder(out)
        folder.make()
        table = Table(out)
        table.restore(folder.is_there)
        if jobs:
            submit(planned, folder, table)
        if resume:
            table.forgive()
        for refused in planned.refused:
            typer.echo(f"longvid: {refused.reason}; the other films go on", err=True)
        with show_batch(Console(stderr=True)) as on_look:
            Supervisor(plan, on_look, crew).run()
    rows = table.rows()
    verdict(rows)
    typer.echo(f"{len(rows)} films are in {out}; `longvid batch report {out}` shows them", err=True)


@batch_app.command("status")
def status(
    folder: Folder,
    as_json: AsJson = False,
) -> None:
    """Show how a batch stands: live on a terminal, until it is done or Ctrl-C; else once."""
    import time

    from rich.console import Console
    from rich.live import Live

    from longvid.batch import status as shown
    from longvid.batch.table import Table

    table = Table.find(folder)
    console = Console()
    rows = table.rows()
    if as_json:
        typer.echo(json.dumps(shown.as_json(rows, folder), indent=2, allow_nan=False))
        return
    if not console.is_interactive:
        typer.echo("\n".join(shown.as_lines(rows)))
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            rows = table.rows()
            live.update(shown.picture(rows, max(3, console.height - 6)), refresh=True)
            if not any(row.state in ("waiting", "running") for row in rows):
                return
            time.sleep(1.0)


@batch_app.command("report")
def report(
    folder: Folder,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="PAGE.html", help="The page.", show_default="in DIR"),
    ] = None,
) -> None:
    """Write one HTML page with every film: pictures, measures, times, failures and their reasons."""
    from longvid.batch.report import write_report
    from longvid.writer import check_file

    check_file("--output", output)
    path = output or folder / "report.html"
    problems = write_report(folder, path)
    for problem in problems:
        typer.echo(f"longvid: {problem}", err=True)
    typer.echo(path, file=sys.stdout)
