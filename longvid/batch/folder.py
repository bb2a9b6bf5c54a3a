"""A batch's folder: where films, their unfinished work, the table and the logs are.

DIR/NAME.mp4                           a film; whatever has this name is complete
DIR/batch.sqlite                       the table of jobs
DIR/batch.longvid/work/NAME/ATTEMPT/   what one lease works on; NAME.mp4.longvid/film.m3u8 plays while it renders
DIR/batch.longvid/worker_N.log         what workers print
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from longvid.errors import InputError
from longvid.hls import sync
from longvid.manifest import MANIFEST, state_folder


@dataclass(frozen=True)
class BatchFolder:
    """The places in a batch's folder."""

    root: Path

    def make(self) -> None:
        """Make what is missing. Raises InputError."""
        try:
            (self._own / "work").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.root}: cannot be made a batch's folder: {error.strerror}") from error

    @property
    def _own(self) -> Path:
        return self.root / "batch.longvid"

    def film(self, name: str) -> Path:
        """Where a film goes."""
        return self.root / f"{name}.mp4"

    def is_there(self, name: str) -> bool:
        """Whether a film is complete."""
        return self.film(name).is_file()

    def log(self, slot: int) -> Path:
        """What the workers of one slot print."""
        return self._own / f"worker_{slot}.log"

    def draft(self, name: str, attempt: int) -> Path:
        """The film that one lease makes, before it is published."""
        return self._own / "work" / name / str(attempt) / f"{name}.mp4"

    def take_over(self, name: str, attempt: int) -> Path:
        """The draft of a new lease, which goes on with the last one that left something.

        What it left is moved: a worker that was taken for dead and is not finds nothing where it writes, and cannot
        disturb the new one.
        """
        draft = self.draft(name, attempt)
        work = draft.parent.parent
        work.mkdir(exist_ok=True)
        for earlier in sorted((int(folder.name) for folder in work.iterdir()), reverse=True):
            left = self.draft(name, earlier)
            if not draft.parent.exists() and (left.exists() or can_resume(left)):
                left.parent.rename(draft.parent)
            elif earlier != attempt:
                shutil.rmtree(left.parent, ignore_errors=True)
        draft.parent.mkdir(exist_ok=True)
        return draft

    def publish(self, name: str, draft: Path) -> None:
        """Give a complete film its name. After a power cut, too, the name stands for all of it or nothing."""
        sync(draft)
        draft.replace(self.film(name))
        sync(self.root)

    def clear(self, name: str) -> None:
        """Remove what was left of the work on a film."""
        shutil.rmtree(self._own / "work" / name, ignore_errors=True)


def can_resume(draft: Path) -> bool:
    """Whether there is a checkpoint of a film."""
    return (state_folder(draft) / MANIFEST).exists()
