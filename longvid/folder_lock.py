"""A film's working folder belongs to one render at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from dataclasses import dataclass
from pathlib import Path

from longvid.errors import InputError

WAIT_S = 5.0
"""Another render of the film may be about to end: a resumed one often comes right behind."""
_POLL_S = 0.1


@dataclass
class FolderLock:
    """A lock on an open folder, until it is released, or its process ends in whatever way."""

    handle: int | None

    def release(self) -> None:
        handle, self.handle = self.handle, None
        if handle is not None:
            os.close(handle)

    def __del__(self) -> None:
        self.release()


def lock_folder(folder: Path, film: Path) -> FolderLock:
    """Make a folder, and have it alone; no file is needed for that.

    Raises InputError while another render of the film has it, OSError where there can be no folder. Where the file
    system has no locks, nobody has it alone.
    """
    until = time.monotonic() + WAIT_S
    while True:
        folder.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # the other removes its folder when it ends
            lock = FolderLock(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
            if _take(lock) and _is_there(folder, lock):
                return lock
            lock.release()
        if time.monotonic() > until:
            raise InputError(f"{film}: another render is at work on it: wait until it ends, or end it")
        time.sleep(_POLL_S)


def _take(lock: FolderLock) -> bool:
    """Whether nobody else has it, as far as the file system can tell."""
    assert lock.handle is not None
    try:
        fcntl.flock(lock.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        lock.release()
    return True


def _is_there(folder: Path, lock: FolderLock) -> bool:
    """Whether the name still stands for the folder that is locked."""
    return lock.handle is None or os.path.samestat(folder.stat(), os.fstat(lock.handle))
