"""Options that several commands have, and what they mean as settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from longvid.errors import InputError

Story = Annotated[Path, typer.Argument(metavar="STORY", help="The storyboard, a YAML file.")]
Model = Annotated[
    str | None,
    typer.Option(help="mini, the folder of a diffusers pipeline, or its id on the Hub.", show_default="mini"),
]
Preset = Annotated[str | None, typer.Option(help="A preset's name, or a YAML file.", show_default="default")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change one setting; may be given many times.")
]
Loras = Annotated[
    list[str] | None, typer.Option("--lora", metavar="FILE[:WEIGHT]", help="Add a LoRA; may be given many times.")
]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS|local",
        help="Have a Ray cluster do the work; local: one of this machine, while it lasts.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def film_paths(stories: Sequence[Path], output: Path) -> list[Path]:
    """The film of each storyboard: `output`, or where there are several its files, named after them.

    Raises InputError where two would have one name.
    """
    if len(stories) == 1:
        return [output]
    if output.suffix.lower() == ".mp4":
        raise InputError(f"-o {output}: {len(stories)} storyboards make as many films: name a folder")
    films = [output / f"{story.stem}.mp4" for story in stories]
    for film in films:
        if films.count(film) > 1:
            raise InputError(f"two storyboards are named {film.stem}, and both would be {film}: rename one")
    return films


def all_overrides(model: str | None, overrides: list[str] | None, loras: list[str] | None = None) -> list[str]:
    """What `--set`, `--model` and `--lora` say, as overrides of settings."""
    from longvid.settings import text_override

    chosen = [] if model is None else [text_override("model.path", model)]
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


def chosen_settings(model: str | None, preset: str | None, overrides: list[str] | None) -> Any:
    """The settings that a model, a preset and overrides make."""
    from longvid.settings import load_settings

    return load_settings(preset, all_overrides(model, overrides))
