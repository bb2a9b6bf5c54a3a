"""`longvid bench`: options to calls, results to text or JSON."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from longvid.options import AsJson, Overrides
from longvid.results import json_alone, show


def _size(text: str) -> tuple[int, int]:
    """WIDTHxHEIGHT as two numbers."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise typer.BadParameter(f"{text!r} is not of the form WIDTHxHEIGHT, as in 128x128")
    return int(width), int(height)


Size = Annotated[Any, typer.Option(metavar="WIDTHxHEIGHT", parser=_size, help="Pixels of a frame.")]
SIZE = "128x128"
"""64 tokens a latent: the included model's own 64x64 has 16, fewer than any model of the field."""
bench_app = typer.Typer(help="Measure longvid beside others on the same work.", no_args_is_help=True)


@bench_app.command("film")
def bench_film(
    model: Annotated[str, typer.Option(help="mini, or the folder of a diffusers WanPipeline.")] = "mini",
    seconds: Annotated[float, typer.Option(min=0.1, max=3600, help="Length of the film.")] = 60.0,
    steps: Annotated[int, typer.Option(min=1, max=1000)] = 8,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option()] = "float32",
    threads: Annotated[int, typer.Option(min=0, max=1024, help="0: torch decides.")] = 0,
    size: Size = SIZE,
    skip_10min: Annotated[bool, typer.Option("--skip-10min", help="Leave out the film ten times as long.")] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Time stock diffusers and longvid on the same film, each in a process of its own."""
    with json_alone():
        from longvid.bench import film

        bench = film.FilmBench(model, seconds, steps, dtype, threads, size, tuple(overrides or ()))
        result = film.bench_film(bench, with_10min=not skip_10min, say=lambda line: typer.echo(line, err=True))
    show(result, film.as_text(result), as_json)


@bench_app.command("pipeline")
def bench_pipeline(
    seconds: Annotated[float, typer.Option(min=0.1, max=3600, help="Length of the film.")] = 16.0,
    ranks: Annotated[int, typer.Option(min=2, max=64)] = 2,
    steps: Annotated[int, typer.Option(min=1, max=1000)] = 50,
    size: Size = SIZE,
    repeats: Annotated[int, typer.Option(min=1, max=100, help="Of which the medians count.")] = 3,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Time a film on one rank and on several, in turn, with a thread each, and predict it for many."""
    with json_alone():
        from longvid.bench import pipeline

        bench = pipeline.PipelineBench(seconds, ranks, steps, tuple(overrides or ()), size)
        result = pipeline.bench_pipeline(bench, repeats, say=lambda line: typer.echo(line, err=True))
    show(result, pipeline.as_text(result), as_json)


@bench_app.command("chunks")
def bench_chunks(
    seconds: Annotated[float, typer.Option(min=0.1, max=3600, help="Length of the film.")] = 16.0,
    ranks: Annotated[int, typer.Option(min=2, max=64)] = 2,
    steps: Annotated[int, typer.Option(min=1, max=1000)] = 50,
    size: Size = SIZE,
    repeats: Annotated[int, typer.Option(min=1, max=100, help="Of which the medians count.")] = 3,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Time the chunk schedule on one rank and with chunks over several, a thread each, in turn."""
    with json_alone():
        from longvid.bench import chunks, pipeline

        bench = pipeline.PipelineBench(seconds, ranks, steps, tuple(overrides or ()), size)
        result = chunks.bench_chunks(bench, repeats, say=lambda line: typer.echo(line, err=True))
    show(result, chunks.as_text(result), as_json)


@bench_app.command("attention")
def bench_attention(
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Of which the median counts.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Time block-sparse attention on the CPU beside torch's dense attention, and the search for layouts."""
    with json_alone():
        from longvid.bench import attention

        bench = attention.AttentionBench(repeats=repeats)
        result = attention.bench_attention(bench, say=lambda line: typer.echo(line, err=True))
    show(result, attention.as_text(result), as_json)


@bench_app.command("batch")
def bench_batch(
    jobs: Annotated[int, typer.Option(min=1, max=100000)] = 200,
    workers: Annotated[int, typer.Option(min=1, max=1024)] = 2,
    kill_every: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="How often a worker is killed.")] = 8.0,
    as_json: AsJson = False,
) -> None:
    """Time many small films with and without the batch layer, and with a random worker killed every few seconds."""
    with json_alone():
        from longvid.bench import batch

        bench = batch.BatchBench(jobs=jobs, workers=workers, kill_s=kill_every)
        result = batch.bench_batch(bench, say=lambda line: typer.echo(line, err=True))
    show(result, batch.as_text(result), as_json)
