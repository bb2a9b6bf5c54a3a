"""Options that several commands have, and what they mean as settings."""

from __future__ import annotations

import json
from typing import Annotated

import typer

Model = Annotated[str | None, typer.Option(help="mini, or the folder of a diffusers WanPipeline.", show_default="mini")]
Preset = Annotated[str | None, typer.Option(help="A preset's name, or a YAML file.", show_default="default")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change one setting; may be given many times.")
]
Loras = Annotated[
    list[str] | None, typer.Option("--lora", metavar="FILE[:WEIGHT]", help="Add a LoRA; may be given many times.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def all_overrides(model: str | None, overrides: list[str] | None, loras: list[str] | None = None) -> list[str]:
    """What `--set`, `--model` and `--lora` say, as overrides of settings."""
    chosen = [] if model is None else [f"model.path={model}"]
    if loras:
        chosen.append(f"model.lora={json.dumps([_lora(text) for text in loras])}")
    return [*(overrides or []), *chosen]


def _lora(text: str) -> dict[str, str | float]:
    """FILE or FILE:WEIGHT as a setting; a colon before anything but a number is of the file's name."""
    path, colon, weight = text.rpartition(":")
    try:
        return {"path": path, "weight": float(weight)} if colon else {"path": text}
    except ValueError:
        return {"path": text}
