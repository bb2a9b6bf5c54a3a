"""The C++ of `csrc/`, where it was built at installation."""

from __future__ import annotations

import ctypes
import functools
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, Literal

Isa = Literal["portable", "avx2", "avx512", "amx"]
ISAS: tuple[Isa, ...] = ("portable", "avx2", "avx512", "amx")
"""The variants of the kernels, in the order of the C++ and of speed; `amx` is AVX-512 with matrix units for bf16."""


@functools.cache
def library() -> Any:
    """The shared library; None where it was not built."""
    # It is packaged as an extension module so that setuptools builds and places it, but nothing imports it: building
    # it needs a compiler and no headers of Python.
    for suffix in EXTENSION_SUFFIXES:
        file = Path(__file__).parent / f"_native{suffix}"
        if file.is_file():
            return ctypes.CDLL(str(file))
    return None


def is_available() -> bool:
    """Whether the C++ was built when longvid was installed."""
    return library() is not None


@functools.cache
def isa() -> Isa | None:
    """The variant that this processor runs fastest; None where nothing was built."""
    return ISAS[library().longvid_best_isa()] if is_available() else None


def isa_index(wanted: Isa | None) -> int:
    """Of a variant, or of the fastest, as the C++ counts them. Raises ValueError for one that this processor lacks."""
    best = ISAS.index(isa() or "portable")
    index = best if wanted is None else ISAS.index(wanted)
    if index > best:
        raise ValueError(f"this processor runs {', '.join(ISAS[: best + 1])}, not {wanted}")
    return index
