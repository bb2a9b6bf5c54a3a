"""Results of commands, for people or as JSON."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import typer


@contextlib.contextmanager
def json_alone() -> Iterator[None]:
    """Send what libraries print to stderr: stdout is for the result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def show(result: dict[str, Any], text: str, as_json: bool) -> None:
    """Print a result as it was asked for."""
    if as_json:
        print_json(result)
    else:
        typer.echo(text)


def print_json(value: dict[str, Any]) -> None:
    """Print a value for programs. Raises ValueError for what is not JSON."""
    # NaN is not JSON, so a measure that has no value must be None.
    typer.echo(json.dumps(value, indent=2, allow_nan=False))
