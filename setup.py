"""The C++ kernels, which pyproject.toml cannot describe. Without a compiler longvid installs without them."""

from setuptools import Extension, setup

SOURCES = (
    "amx",
    "sparse",
    "portable",
    "avx2",
    "avx512",
    "sparse_amx",
    "rows",
    "rows_portable",
    "rows_avx2",
    "rows_avx512",
)
HEADERS = ("isa.h", "amx.inc", "sparse.h", "variant.inc", "rows.h", "rows.inc", "vector.inc")

setup(
    ext_modules=[
        Extension(
            "longvid.kernels._native",
            sources=[f"kernels/csrc/{name}.cpp" for name in SOURCES],
            depends=[f"kernels/csrc/{name}" for name in HEADERS],
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
