"""Models on the Hugging Face Hub: what a name means there, and its files in the local cache. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from longvid.errors import InputError, RuntimeFailure
from longvid.models.configs import FACTS_FILE, read_json

SHORT_NAMES = {
    "Wan2.1-T2V-1.3B": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "Wan2.1-T2V-14B": "Wan-AI/Wan2.1-T2V-14B-Diffusers",
    "Wan2.2-T2V-A14B": "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
    "Wan2.2-TI2V-5B": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    "HunyuanVideo": "hunyuanvideo-community/HunyuanVideo",
    "CogVideoX-2b": "zai-org/CogVideoX-2b",
    "CogVideoX-5b": "zai-org/CogVideoX-5b",
    "CogVideoX1.5-5B": "zai-org/CogVideoX1.5-5B",
    "LTX-Video": "Lightricks/LTX-Video",
}
CONFIGS = ("model_index.json", FACTS_FILE, "*/config.json", "*/*.index.json")
SUFFIXES = ("json", "safetensors", "txt", "model", "jinja")
"""Files of a part that are of use: configs, weights, vocabularies, templates. Pickles are never fetched."""
VARIANTS = ("*.fp16*", "*.bf16*", "*.fp8*", "*.non_ema*")
"""A second copy of weights, which would be fetched beside the first."""

_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class HubModel:
    """A repository, and of which revision: a branch, a tag or a commit."""

    repo: str
    revision: str = "main"

    @classmethod
    def of(cls, name: str) -> HubModel | None:
        """What a name means: OWNER/NAME, or one of SHORT_NAMES, and maybe @REVISION. None if it cannot mean that."""
        short, at, revision = name.partition("@")
        match = _ID.fullmatch(SHORT_NAMES.get(short, short) + at + revision)
        return cls(match["repo"], match["revision"] or "main") if match else None

    @property
    def published_name(self) -> str:
        """Such as Wan2.1-T2V-14B; "" for a revision, which may have other configs."""
        return next((name for name, repo in SHORT_NAMES.items() if repo == str(self)), "")

    def __str__(self) -> str:
        return self.repo if self.revision == "main" else f"{self.repo}@{self.revision}"

    def fetch(self, *, weights: bool) -> Path:
        """Its folder in the local cache, with all files that are needed; of those, what is not there is downloaded.

        A download that ended early goes on. Of several processes of a machine one downloads, and the others wait. With
        HF_HUB_OFFLINE nothing is asked of the Hub. Raises InputError where there is no such model, or no way to it.
        """
        root = self._snapshot(CONFIGS)
        index = read_json(root / "model_index.json")
        if not weights:
            return root
        parts = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None]
        root = self._snapshot((*CONFIGS, *(f"{part}/*.{suffix}" for part in parts for suffix in SUFFIXES)))
        missing = sorted(part for part in parts if not (root / part).is_dir())
        if missing:
            raise InputError(f"model.path: {self}: {root / missing[0]} is missing; {self._how_to_get_it()}")
        return root

    def _snapshot(self, files: tuple[str, ...]) -> Path:
        from filelock import FileLock
        from huggingface_hub import constants, snapshot_download

        cache, offline = Path(constants.HF_HUB_CACHE), constants.is_offline_mode()
        turn: AbstractContextManager[object] = nullcontext()
        if not offline:
            cache.mkdir(parents=True, exist_ok=True)
            turn = FileLock(cache / f"longvid--{self.repo.replace('/', '--')}.lock")
        with self._errors(cache), turn:
            found = snapshot_download(
                self.repo,
                revision=self.revision,
                local_files_only=offline,
                allow_patterns=list(files),
                ignore_patterns=list(VARIANTS),
            )
        return Path(found)

    @contextmanager
    def _errors(self, cache: Path) -> Iterator[None]:
        """What the Hub's library raises, as ours."""
        from huggingface_hub import constants, errors

        try:
            yield
        except errors.IncompleteSnapshotError as error:
            place = error.snapshot_path
            raise InputError(f"model.path: {self} is not whole in {place}; {self._how_to_get_it()}") from None
        except errors.LocalEntryNotFoundError:
            reason = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "the Hub cannot be reached"
            raise InputError(
                f"model.path: {self} is not in the local cache ({cache}), and {reason}; {self._how_to_get_it()}"
            ) from None
        except errors.GatedRepoError:
            page = "accept its terms on its page, and log in with `hf auth login`"
            raise InputError(f"model.path: {self} is gated: {page}") from None
        except errors.RevisionNotFoundError:
            raise InputError(f"model.path: {self.repo} has no revision {self.revision!r}") from None
        except errors.RepositoryNotFoundError:
            private = "if it is private, log in with `hf auth login`"
            raise InputError(f"model.path: the Hub has no model {self.repo}; {private}") from None
        except errors.HfHubHTTPError as error:
            first = str(error).strip().partition("\n")[0]
            raise RuntimeFailure(f"{self}: its download ended early ({first}); the same command goes on") from error

    def _how_to_get_it(self) -> str:
        revision = "" if self.revision == "main" else f" --revision {self.revision}"
        return f"`hf download {self.repo}{revision}` gets it where there is a network, or give a directory"
