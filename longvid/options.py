"""Options that several commands have, and what they mean as settings."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str | None, typer.Option(help="mini, or the folder of a diffusers WanPipeline.", show_default="mini")]
Preset = Annotated[str | None, typer.Option(help="A preset's name, or a YAML file.", show_default="default")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change one setting; may be given many times.")
]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS|local",
        help="Have a Ray cluster do the work; local: one of this machine, while it lasts.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def all_overrides(model: str | None, overrides: list[str] | None) -> list[str]:
    """What `--set` and `--model` say, as overrides of settings."""
    return [*(overrides or []), *([f"model.path={model}"] if model is not None else [])]
