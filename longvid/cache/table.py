"""Tables of caches: which modules of which layers are left out at which step, as `longvid train cache` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os.path import expanduser
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from longvid.cache.plan import MODULES, Module
from longvid.errors import InputError

Row = frozenset[tuple[int, Module]]
"""The modules (layer, module) that one step leaves out."""


class Table(BaseModel):
    """The file. `reused` has a mapping of modules to layers for each step; `method` and `model` are for people."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    method: str
    model: str
    layers: int
    reused: list[dict[Module, list[int]]]


def computed_share(rows: Sequence[Row], num_layers: int) -> float:
    """The share of all modules of all steps that is computed."""
    return 1 - sum(map(len, rows)) / (len(rows) * num_layers * len(MODULES))


def read_table(path: str, num_steps: int, num_layers: int) -> tuple[Row, ...]:
    """The rows of a table for a number of steps. Raises InputError for a file that is none, or is another model's."""
    place = f"cache.table: {path}"
    try:
        table = Table.model_validate_json(Path(expanduser(path)).read_bytes())
    except OSError as error:
        raise InputError(f"{place}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{place}: is not a table of `longvid train cache` ({where}: {first['msg']})") from None
    if (len(table.reused), table.layers) != (num_steps, num_layers):
        made = f"{len(table.reused)} steps of {table.layers} layers"
        raise InputError(f"{place}: was made for {made}, and this is {num_steps} steps of {num_layers}")
    rows = tuple(frozenset((layer, module) for module in row for layer in row[module]) for row in table.reused)
    if rows[0] or rows[-1]:
        raise InputError(f"{place}: the first and the last step must be computed")
    if any(not 0 <= layer < num_layers for row in rows for layer, _ in row):
        raise InputError(f"{place}: names a layer that the model lacks")
    return rows


def write_table(path: Path, rows: Sequence[Row], *, method: str, model: str, num_layers: int) -> None:
    """Write a table, a line a step."""
    reused = [{module: sorted(at for at, kind in row if kind == module) for module in MODULES} for row in rows]
    table = Table(method=method, model=model, layers=num_layers, reused=reused)
    head: Mapping[str, object] = table.model_dump(exclude={"reused"})
    lines = ",\n".join(f"  {json.dumps(row)}" for row in table.reused)
    path.write_text(f'{json.dumps(head)[:-1]}, "reused": [\n{lines}\n]}}\n')
