"""`longvid train`: options to calls, a log on the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from longvid.errors import Interrupted
from longvid.options import Model, Overrides, Preset, Story, chosen_settings

train_app = typer.Typer(help="Train the parts of a model of the drawn world, on this machine.", no_args_is_help=True)


Folder = Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the run lives; a run there goes on.")]
Seed = Annotated[int, typer.Option(min=0)]
Threads = Annotated[int, typer.Option(min=0, max=1024, help="0: torch decides.")]


@train_app.command("vae")
def train_vae(
    out: Folder,
    steps: Annotated[int, typer.Option(min=1)] = 1000,
    batch: Annotated[int, typer.Option(min=1)] = 6,
    lr: Annotated[float, typer.Option(min=0)] = 2e-3,
    seed: Seed = 0,
    threads: Threads = 0,
    decoder_only: Annotated[
        bool, typer.Option("--decoder-only", help="Refine a trained VAE's decoder; its latents stay what they are.")
    ] = False,
) -> None:
    """Train the video VAE. Ctrl-C saves; the same command goes on."""
    with _training("vae", steps) as on_log:
        from longvid.training.recipe import run_vae, vae_settings

        settings = vae_settings(steps=steps, batch=batch, lr=lr, seed=seed, threads=threads, decoder_only=decoder_only)
        done = run_vae(out, settings, on_log)
    typer.echo(f"the VAE is in {done}")


@train_app.command("dit")
def train_dit(
    out: Folder,
    steps: Annotated[int, typer.Option(min=1)] = 5300,
    batch: Annotated[int, typer.Option(min=2)] = 48,
    lr: Annotated[float, typer.Option(min=0)] = 2e-3,
    seed: Seed = 0,
    threads: Threads = 0,
    clips: Annotated[int, typer.Option(min=1, help="Clips to encode and learn from.")] = 16384,
    images: Annotated[int, typer.Option(min=1, help="First frames to encode and learn from.")] = 24576,
) -> None:
    """Train text encoder and video model on the VAE in DIR. Ctrl-C saves; the same command goes on."""
    with _training("dit", steps) as on_log:
        from longvid.training.recipe import dit_recipe, run_dit

        recipe = dit_recipe(steps=steps, batch=batch, lr=lr, seed=seed, threads=threads, clips=clips, images=images)
        done = run_dit(out, recipe, on_log)
    typer.echo(f"the model is in {done}")


@train_app.command("vin")
def train_vin(
    out: Folder,
    model: Annotated[str, typer.Option(help="mini, or the folder of a diffusers WanPipeline.")] = "mini",
    steps: Annotated[int, typer.Option(min=1)] = 2000,
    batch: Annotated[int, typer.Option(min=1, help="Films a step.")] = 6,
    lr: Annotated[float, typer.Option(min=0)] = 2e-3,
    clips: Annotated[int, typer.Option(min=1, help="Films that are drawn and encoded beforehand.")] = 1024,
    tokens: Annotated[int, typer.Option(min=1, max=4096, help="Global tokens.")] = 32,
    guidance: Annotated[float, typer.Option(min=1, help="Guidance that the model gives in one pass; 1: none.")] = 2.0,
    side: Annotated[
        int | None, typer.Option(min=16, help="Pixels of a film's side.", show_default="the model's")
    ] = None,
    start: Annotated[Path | None, typer.Option(help="An adapter to begin with, not afresh.")] = None,
    seed: Seed = 0,
    threads: Threads = 0,
    deepspeed: Annotated[
        Literal["zero2", "zero3"] | None, typer.Option(help="Split what a step holds over the ranks of torchrun.")
    ] = None,
) -> None:
    """Train global tokens that tie far chunks together, for a model that stays as it is. Ctrl-C saves."""
    with _training("vin", steps) as on_log:
        from longvid.training.train_vin import run_vin, vin_settings

        settings = vin_settings(
            steps=steps, batch=batch, lr=lr, seed=seed, threads=threads, tokens=tokens, guidance=guidance, clips=clips
        )
        done = run_vin(out, model, replace(settings, side=side), deepspeed, on_log, start)
    typer.echo(f"--set vin.policy=on --set vin.path={done}")


@train_app.command("cache")
def train_cache(
    story: Story,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="PRESET", help="The preset to write, a YAML file.")],
    method: Annotated[
        Literal["steps", "bac", "harmonica"],
        typer.Option(
            help="steps: whole steps, by what each does to the film; modules of layers: bac, by how much they change; "
            "harmonica, by a router that is trained."
        ),
    ] = "steps",
    share: Annotated[
        float, typer.Option(min=0.01, max=1, help="steps and bac: of the work, what is to be computed.")
    ] = 0.4,
    bubble: Annotated[float, typer.Option(min=0, max=1, help="bac: share of layers that count as volatile.")] = 0.2,
    price: Annotated[
        float,
        typer.Option(min=0, help="harmonica: what a computed module costs, beside relative errors of velocities."),
    ] = 1e-3,
    runs: Annotated[int, typer.Option(min=1, help="harmonica: denoising runs to train on.")] = 200,
    model: Model = None,
    preset: Preset = None,
    overrides: Overrides = None,
) -> None:
    """Find what a model can do without, on a short film, for cache.policy=static."""
    settings = chosen_settings(model, preset, overrides)

    from longvid.calibrate import calibrate, write_preset
    from longvid.writer import check_file

    check_file("--out", out)

    if method == "harmonica":
        from longvid.training.harmonica import HarmonicaSettings, run_harmonica

        def tell(run: int, error: float, computed: float) -> None:
            typer.echo(f"run {run} of {runs}: error {error:.2e}, {computed:.0%} computed", err=True)

        found = run_harmonica(story, settings, HarmonicaSettings(runs=runs, price=price), tell)
    else:
        found = calibrate(
            story,
            settings,
            method=method,
            share=share,
            bubble=bubble,
            on_done=lambda done, of: typer.echo(f"{done} of {of}", err=True),
        )
    write_preset(found, out, settings.sampler.steps)
    typer.echo(f"{found.share:.0%} of the work is left; render with --preset {out}")


@contextlib.contextmanager
def _training(kind: str, steps: int) -> Iterator[Any]:
    """A callback that shows a training's log; an interruption is told with how to go on."""
    from rich.console import Console

    from longvid.progress import show_training

    try:
        with show_training(Console(stderr=True), kind, steps) as on_log:
            yield on_log
    except KeyboardInterrupt:
        raise Interrupted("interrupted; the run is saved, and the same command goes on with it") from None
