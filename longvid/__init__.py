"""Films of any length from a storyboard, with video diffusion transformers, on one CPU or many GPUs.

    import longvid

    engine = longvid.Engine.load("mini")
    engine.render("story.yaml", "film.mp4")

    longvid.accelerate(pipe, attention="adaspa", cache="taylorseer")  # somebody's diffusers pipeline

Importing this package loads no torch: what it offers arrives with its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longvid.engine import Engine
    from longvid.models.accelerate import accelerate, restore

__all__ = ["Engine", "accelerate", "restore"]

_HOMES = {"Engine": "longvid.engine", "accelerate": "longvid.models.accelerate", "restore": "longvid.models.accelerate"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'longvid' has no attribute {name!r}")
