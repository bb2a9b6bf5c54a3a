"""The manifest of a checkpoint: what a resumed render needs to know before anything is loaded. Pure.

A film's working folder `film.mp4.longvid/` holds `state/`. There every rank wrote a file for the state after a round,
and the manifest, replaced as a whole, says which files are one checkpoint:

    state/manifest.json
    state/round_000012/rank_000.safetensors, rank_001.safetensors, ...
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from longvid.errors import InputError
from longvid.fingerprint import differences

MANIFEST = "manifest.json"
ENDING = "ending.json"
ANEW = "leave --resume out to begin anew"
_MAX_LISTED = 12


def working_folder(film: Path) -> Path:
    """What is kept of a film while it renders."""
    return film.with_name(f"{film.name}.longvid")


def state_folder(film: Path) -> Path:
    """Where a film's checkpoints are."""
    return working_folder(film) / "state"


def file_name(done: int, rank: int) -> str:
    """A rank's file of the checkpoint after round `done`, in the state folder."""
    return f"round_{done:06d}/rank_{rank:03d}.safetensors"


FileName = Annotated[str, Field(pattern=r"^round_[0-9]+/rank_[0-9]+\.safetensors$")]
Count = Annotated[int, Field(ge=0)]


class Manifest(BaseModel):
    """A checkpoint after round `round`: its files and their bytes, and the names of the values in them.

    Values live on across the round: `latents` as (chunk, version), `kv` as (chunk, round, edge), and the chunks that
    have `solvers`. Round -1 is that of K/V that a cache keeps. The film has `segments` on the disk, of which some are
    `short` (segment, frames). `fingerprint` says of which render it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = 1
    round: Count
    files: dict[FileName, Count]
    latents: list[tuple[Count, Count]]
    kv: list[tuple[Count, Annotated[int, Field(ge=-1)], Literal["first", "last", "scene"]]]
    solvers: list[Count]
    segments: Count
    short: list[tuple[Count, Count]] = []
    fingerprint: dict[str, Any]

    @classmethod
    def read(cls, film: Path) -> Self:
        """That of a film. Raises InputError where it is not there or not right, or a file that it names is not."""
        state = state_folder(film)
        path = state / MANIFEST
        try:
            manifest = cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise InputError(
                f"{film}: there is no checkpoint in {state}: the render ended before its first; {ANEW}"
            ) from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(
                f"{path}: is damaged ({'.'.join(map(str, first['loc']))}: {first['msg']}); {ANEW}"
            ) from None
        for name, size in manifest.files.items():
            file = state / name
            if not file.is_file() or file.stat().st_size != size:
                raise InputError(f"{file}: is missing or damaged, and the checkpoint needs it; {ANEW}")
        return manifest

    def require(self, film: Path, fingerprint: dict[str, Any]) -> None:
        """Raise InputError, with what changed, where a render with this fingerprint would not go on the same film."""
        changed = differences(self.fingerprint, fingerprint)
        if changed:
            more = len(changed) - _MAX_LISTED
            listed = [*changed[:_MAX_LISTED], *([f"and {more} more"] if more > 0 else [])]
            raise InputError(
                f"{film}: cannot be resumed, for the film would not be the same:\n"
                + "\n".join(f"  {line}" for line in listed)
                + f"\nundo this, or {ANEW}"
            )


def is_complete(film: Path) -> bool:
    """Whether a film is there, and nothing of its making but how it ended."""
    is_kept = (state_folder(film) / ENDING).exists() and not has_checkpoint(film)
    return film.exists() and (is_kept or not working_folder(film).exists())


def has_checkpoint(film: Path) -> bool:
    """Whether a render of a film left a checkpoint."""
    return (state_folder(film) / MANIFEST).exists()


def find_manifest(film: Path) -> Manifest | None:
    """The checkpoint that `--resume` goes on from; None where the film was never begun, so that it begins now.

    Raises InputError where there is a working folder without a checkpoint, and where the film is complete.
    """
    if is_complete(film):
        raise InputError(f"{film}: is complete: there is nothing to resume; leave --resume out to render it anew")
    if not working_folder(film).exists():
        return None
    return Manifest.read(film)
