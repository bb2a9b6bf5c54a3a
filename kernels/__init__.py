"""Attention kernels and their oracles.

With the repository root on `sys.path` this folder can also be found as `kernels`, which is the name of a Hugging Face
distribution that transformers and diffusers look for. Under that name it steps aside.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path


def _step_aside() -> None:
    """Put the installed `kernels` in our place, or look like a name that nothing is installed under."""
    global __file__, __path__
    root = Path(__file__).resolve().parent.parent
    spec = PathFinder.find_spec("kernels", [entry for entry in sys.path if Path(entry).resolve() != root])
    if spec is not None and spec.loader is not None:
        module = sys.modules["kernels"] = module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        # To transformers a module without a file is not installed; an ImportError would end its own import.
        __file__, __path__ = None, []  # type: ignore[assignment]


if __name__ == "kernels":
    _step_aside()
