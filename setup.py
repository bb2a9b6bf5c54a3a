"""The C++ kernels, which pyproject.toml cannot describe. Without a compiler longvid installs without them."""

from pathlib import Path

from setuptools import Extension, setup

FOLDER = Path("kernels/csrc")
SOURCES = sorted(map(str, FOLDER.glob("*.cpp")))
HEADERS = sorted(str(path) for ending in ("h", "inc") for path in FOLDER.glob(f"*.{ending}"))

setup(
    ext_modules=[
        Extension(
            "longvid.kernels._native",
            sources=SOURCES,
            depends=HEADERS,
            # Never -ffast-math: the kernels rely on rounding, infinities and NaN.
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",
                "-fopenmp",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-Wno-psabi",
            ],
            extra_link_args=["-fopenmp"],
            language="c++",
            optional=True,
        )
    ]
)
