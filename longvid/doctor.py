"""The doctor: what this machine has, and what longvid will use of it."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

REQUIRED = ("torch", "diffusers", "transformers", "safetensors", "numpy", "av", "pydantic")
OPTIONAL = ("flash-attn", "triton", "deepspeed", "xfuser", "ray", "mpi4py")
"""Distributions of the extras `gpu`, `deepspeed`, `xfuser`, `ray` and `mpi`."""
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "neon", "asimd", "sve", "bf16")


def examine() -> dict[str, Any]:
    """Facts about this machine as plain data. `problems` says what keeps a render from working."""
    packages = {name: package_version(name) for name in REQUIRED}
    encoder, model = _encoder(), _model()
    problems = [f"{name} is not installed" for name, found in packages.items() if found is None]
    if not encoder["libx264"]:
        problems.append("PyAV has no libx264: no film can be written")
    if model is None:
        problems.append("the embedded model is not there: give --model a directory")
    return {
        "longvid": package_version("longvid"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "optional_packages": {name: package_version(name) for name in OPTIONAL},
        "cpu": cpu_facts(),
        "memory_mb": _memory_mb(),
        "torch": _torch() if packages["torch"] else None,
        "encoder": encoder,
        "embedded_model": model,
        "problems": problems,
    }


def as_text(facts: dict[str, Any]) -> str:
    """The facts of `examine` for people."""
    cpu, memory, torch, encoder = facts["cpu"], facts["memory_mb"], facts["torch"], facts["encoder"]
    lines = [
        f"longvid    {facts['longvid']}, Python {facts['python']}, {facts['platform']}",
        f"packages   {_versions(facts['packages'])}",
        f"optional   {_versions(facts['optional_packages'])}",
        f"cpu        {cpu['name']}, {cpu['cores']} cores, {' '.join(cpu['flags'])}",
    ]
    if memory:
        lines.append(f"memory     {memory['total'] / 1000:.1f} GB, {memory['available'] / 1000:.1f} GB free")
    if torch:
        lines += [f"torch      {torch['threads']} threads, CPU kernels for {torch['cpu_capability']}"]
        lines += [f"device     {gpu['name']}, {gpu['memory_mb'] / 1000:.1f} GB" for gpu in torch["gpus"]]
        lines += [
            f"device     runtime.device=auto means {torch['device']}",
            f"attention  dense: {torch['attention']}",
            f"attention  block-sparse: {torch['sparse_attention']}",
        ]
    model, x264 = facts["embedded_model"], "with libx264" if encoder["libx264"] else "without libx264"
    lines.append(f"encoder    FFmpeg {encoder['ffmpeg']} {x264}")
    lines.append(f"model      {model['path']}, {model['mb']:.1f} MB" if model else "model      none embedded")
    lines += [f"problem    {problem}" for problem in facts["problems"]] or ["all is well"]
    return "\n".join(lines)


def package_version(distribution: str) -> str | None:
    """The version of an installed distribution; None where it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def cpu_facts() -> dict[str, Any]:
    """The processor's name, the cores that this process may use, and the features that matter to matrix products."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
    }


def _memory_mb() -> dict[str, float] | None:
    """Total and available memory in 10^6 bytes; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kib = {key: int(value.split()[0]) for key, _, value in (line.partition(":") for line in lines)}
    return {"total": kib["MemTotal"] * 1024 / 1e6, "available": kib["MemAvailable"] * 1024 / 1e6}


def _torch() -> dict[str, Any]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "device": device,
        "gpus": [{"name": gpu.name, "memory_mb": gpu.total_memory / 1e6} for gpu in gpus],
        "attention": _dense_attention(device),
        "sparse_attention": _sparse_kernel(device),
    }


def _dense_attention(device: str) -> str:
    """Who computes dense attention."""
    from longvid.kernels import native

    of_torch = f"torch scaled_dot_product_attention, {_dense_kernel(device)}"
    if device == "cpu" and native.isa() == "amx":
        return f"the C++ kernel for amx in fp32 and bf16, else {of_torch}"
    return of_torch


def _dense_kernel(device: str) -> str:
    """The kernel that torch chooses for dense attention with heads of 64, such as FLASH_ATTENTION."""
    import torch
    from torch.nn.attention import SDPBackend

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q_BHSD = torch.zeros(1, 1, 64, 64, dtype=dtype, device=device)
    return SDPBackend(torch._fused_sdp_choice(q_BHSD, q_BHSD, q_BHSD)).name


def _sparse_kernel(device: str) -> str:
    """Who computes block-sparse attention, and why."""
    import torch

    from longvid.kernels import native
    from longvid.kernels.dispatch import backend_for

    backend = backend_for(torch.device(device))
    if backend == "triton":
        return "triton, since there is a CUDA device"
    if backend == "cpu":
        return f"cpu, the C++ kernels for {native.isa()}, the best that this processor has"
    missing = "triton is not installed" if device == "cuda" else "the C++ kernels were not built at installation"
    return f"gather (torch, slower), since {missing}"


def _encoder() -> dict[str, Any]:
    """The FFmpeg that PyAV brings, and whether it can write H.264."""
    try:
        import av
    except ImportError:
        return {"ffmpeg": None, "libx264": False}
    try:
        av.codec.Codec("libx264", "w")
    except ValueError:  # UnknownCodecError
        return {"ffmpeg": av.ffmpeg_version_info, "libx264": False}
    return {"ffmpeg": av.ffmpeg_version_info, "libx264": True}


def _model() -> dict[str, Any] | None:
    """Where the embedded model lies and its size in 10^6 bytes; None where it is not installed."""
    folder = Path(str(files("longvid"))) / "assets" / "mini"
    if not (folder / "model_index.json").is_file():
        return None
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {"path": str(folder), "mb": size / 1e6}


def _versions(packages: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {found or '-'}" for name, found in packages.items())
