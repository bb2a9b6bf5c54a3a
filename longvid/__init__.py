"""Films of any length from a storyboard, with video diffusion transformers, on one CPU or many GPUs.

    import longvid

    engine = longvid.Engine.load("mini")
    engine.render("story.yaml", "film.mp4")

Importing this package loads no torch: `Engine` arrives with its first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longvid.engine import Engine

__all__ = ["Engine"]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from longvid.engine import Engine

        return Engine
    raise AttributeError(f"module 'longvid' has no attribute {name!r}")
