"""What runs on CUDA, on a machine without: every family's films through tensors that say they are on cuda:0.

Their values are on the CPU, so that whatever the data decides goes on as on a GPU; but an operation that mixes devices
raises as it would there. Kernels of Triton do not run here: torch's operations take their place.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from longvid.checkpoint import read_tensors, write_tensors
from longvid.decode import pack_state, unpack_state
from longvid.engine import Engine
from longvid.errors import InputError
from longvid.kernels import dispatch, pool, score, select
from longvid.kernels.dense import attend_lse, attend_lse_exact
from longvid.models.loader import open_checkpoint
from longvid.models.vin import Vin
from longvid.models.vin_config import VinConfig
from longvid.ranks import pick_device, require_own
from longvid.script import parse_script
from longvid.settings import load_settings

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default, aten._local_scalar_dense.default}
"""What takes tensors of several devices."""
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""What takes indices on the CPU for a tensor on the device."""

KERNELS = {
    aten._scaled_dot_product_flash_attention.default: (torch.bfloat16, torch.float16),
    aten._scaled_dot_product_efficient_attention.default: (torch.float32,),
}
"""Attention on CUDA alone, and what it takes; one on the CPU stands for it."""


class OnDevice(torch.Tensor):
    """Is on cuda:0, as it says; its values are in `host`."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor) -> OnDevice:
        kind = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        made: OnDevice = torch.Tensor._make_wrapper_subclass(cls, host.size(), device=CUDA, **kind)
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def tolist(self) -> Any:
        return self.host.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


class Device(TorchDispatchMode):
    """Where tensors can be made on cuda:0."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation on the values, with the devices that it would have."""
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    check_devices(func, args, given)
    known = {id(x.host): x for x in given if isinstance(x, OnDevice)}
    wanted = kwargs.get("device")
    is_on_device = torch.device(wanted).type == "cuda" if wanted is not None else bool(known)

    def to_host(x: Any) -> Any:
        if isinstance(x, OnDevice):
            return x.host
        return CPU if isinstance(x, torch.device) and x.type == "cuda" else x

    def back(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return known.get(id(x)) if id(x) in known else OnDevice(x) if is_on_device else x

    if func in KERNELS:
        assert all(x.dtype in KERNELS[func] for x in given), "what the kernel takes"
        found = aten._scaled_dot_product_flash_attention_for_cpu.default(*(x.host for x in args[:3]))
        is_tensor = ["Tensor" in str(one.type) for one in func._schema.returns[2:]]
        return tree_map(back, (*found, *(torch.zeros(0) if each else 0 for each in is_tensor)))
    options = {name: to_host(value) for name, value in kwargs.items() if name != "pin_memory"}
    return tree_map(back, func(*tree_map(to_host, args), **tree_map(to_host, options)))


def check_devices(func: Any, args: Any, given: list[Tensor]) -> None:
    """Raise where a GPU would: single numbers on the CPU are taken by pointwise operations alone."""
    if func in MOVES or not any(isinstance(x, OnDevice) for x in given):
        return
    others = [x for x in given if not isinstance(x, OnDevice)]
    if func in INDEXING and isinstance(args[0], OnDevice):
        values = args[2:3]
        others = [x for x in values if isinstance(x, Tensor) and not isinstance(x, OnDevice)]
    takes_numbers = torch.Tag.pointwise in func.tags or func in INDEXING
    wrong = [list(x.shape) for x in others if x.dim() or not takes_numbers]
    assert not wrong, f"{func}: tensors on cuda:0, and on the CPU {wrong}"


GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);
"""
"""torch asks for it wherever a tensor says that it is on CUDA; its builds for a CPU have none."""


@pytest.fixture(scope="module")
def _guard(tmp_path_factory: pytest.TempPathFactory) -> None:
    if torch.backends.cuda.is_built():
        torch._C._ensureCUDADeviceGuardSet()  # one that does nothing, where there is no GPU
        return
    root, folder = Path(torch.__file__).parent, tmp_path_factory.mktemp("guard")
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(GUARD)
    flags = ["-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", f"-L{root / 'lib'}"]
    subprocess.run(["g++", *flags, str(source), "-lc10", "-o", str(library)], check=True)
    ctypes.CDLL(str(library))


@pytest.fixture
def cuda(_guard: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with a GPU, as far as tensors go; without Triton."""
    for name, value in {"is_available": True, "device_count": 1, "current_device": 0}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for module in (dispatch, pool, score, select):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    dispatch.backend_for.cache_clear()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)
    with Device(), sdpa_kernel(SDPBackend.MATH):  # whatever kernels this build of torch has
        yield
    torch._C._set_only_lift_cpu_tensors(False)
    torch.__future__.set_overwrite_module_params_on_conversion(False)
    dispatch.backend_for.cache_clear()


SMALL = ["sampler.steps=2", "queue.chunk_latents=2", "queue.context_latents=1"]
GUIDED = "sampler.guidance=3"
STORY = """
size: [%d, %d]
%s
negative: "blue cat"
scenes:
  - {prompt: "a red circle moving left", for: 13f}
  - {prompt: "a blue square", for: 8f, transition: %s}
"""
BLEND = "{kind: blend, over: 4f}"
KINDS = ["ti2v", "a14b", "i2v 2.1", "ltx", "hunyuan", "cogvideox 2b", "cogvideox 5b", "cogvideox 1.5"]
CheckpointOf = Callable[[str], Path]
Film = tuple[list[Tensor], np.ndarray]


def film(model: Path, story: str, *overrides: str) -> Film:
    """Latents of every chunk, and all frames."""
    engine = Engine.load(model, overrides=[*SMALL, *overrides])
    plan = engine.plan(parse_script(story, "story.yaml"))
    assert len(plan.chunks) > 1
    latents, frames = [], []
    for finished in engine.denoise(plan):
        latents.append(finished.latents)
        frames.append(engine.decode(plan, finished))
    return latents, np.concatenate(frames)


def story_of(kind: str, folder: Path) -> str:
    size = 64 if kind == "ti2v" else 32
    if not kind.startswith("i2v"):
        return STORY % (size, size, "seed: 3", BLEND)
    path = folder / "first.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)).save(path)
    return STORY % (size, size, f"image: {path}", BLEND)


def check_alike(found: Film, expected: Film) -> None:
    for one, other in zip(found[0], expected[0], strict=True):
        assert one.device == CUDA and one.dtype == other.dtype == torch.float32
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-3)
    assert found[1].shape == expected[1].shape
    assert np.abs(found[1].astype(int) - expected[1]).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_films_of_every_family_are_those_of_a_cpu(
    checkpoint_of: CheckpointOf, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model, story = checkpoint_of(kind), story_of(kind, tmp_path)
    expected = film(model, story, GUIDED, "runtime.device=cpu")
    request.getfixturevalue("cuda")
    check_alike(film(model, story, GUIDED, "runtime.device=cuda"), expected)


TAYLOR = ["cache.policy=taylorseer", "cache.level=module", "cache.first_steps=1", "cache.interval=2"]
OPTIONS = {
    "cached": ["sampler.steps=5", "queue.left=cached", *TAYLOR, GUIDED],
    "chunks": ["sampler.steps=4", "schedule=chunks", "cache.policy=first_block", "cache.first_steps=1"],
    "cg_taylor": ["sampler.steps=5", "cache.policy=cg_taylor", "cache.first_steps=2", "memory.vae_rows=2"],
    "ras": ["sampler.steps=4", "cache.policy=ras", "cache.first_steps=2", "cache.negative_every=2", GUIDED],
    "share": ["sampler.steps=3"],
    "int8": ["memory.quantize=int8"],
    "vin": ["sampler.steps=3", "vin.policy=on", GUIDED],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_settings_change_is_on_the_device(
    euler_checkpoint: Path, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    story = STORY % (64, 32, "seed: 3", "share" if name == "share" else BLEND)
    options = [*OPTIONS[name], *([f"vin.path={adapter(tmp_path)}"] if name == "vin" else [])]
    expected = film(euler_checkpoint, story, *options, "runtime.device=cpu")
    request.getfixturevalue("cuda")
    check_alike(film(euler_checkpoint, story, *options, "runtime.device=cuda"), expected)


def adapter(folder: Path) -> Path:
    """Of random weights, whose gates are open."""
    torch.manual_seed(1)
    config = VinConfig(
        hidden_size=24, latent_channels=4, num_layers=3, num_heads=2, tokens=3, spacing=2, processors=1, heads=2
    )
    vin = Vin(config)
    for layer in vin.layers.values():
        torch.nn.init.constant_(layer.gate, 1.0)
    vin.save(folder / "vin", torch.float32)
    return folder / "vin"


POLICIES = {
    "tile": [],
    "sta": ["tile=[1,2,2]", "window=[1,1,1]"],
    "radial": ["tile=16"],
    "grat": ["group=[1,2,2]"],
    "adaspa": ["tile=16"],
    "svg2": ["query_clusters=3", "key_clusters=5", "first_iterations=2"],
    "svg_ear": ["query_clusters=3", "key_clusters=5", "first_iterations=2"],
    "rettention": ["tile=16", "refresh_every=2", "dense_steps=0"],
    "asa": ["tile=16", "sample=4", "pooled=true"],
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.usefixtures("cuda")
def test_policies_plan_and_attend_on_the_device(unipc_checkpoint: Path, policy: str) -> None:
    dtype = "bfloat16" if len(policy) % 2 else "float32"
    chosen = [f"attention.policy={policy}", "attention.crossover=always", f"runtime.dtype={dtype}"]
    options = [*SMALL, *chosen, *(f"attention.{option}" for option in POLICIES[policy]), "runtime.device=cuda"]
    engine = Engine.load(unipc_checkpoint, overrides=options)
    sparse: list[bool] = []
    assert engine.attention
    engine.attention.on_layout = lambda layout: sparse.append(layout is not None and layout.device == CUDA)
    plan = engine.plan(parse_script(STORY % (64, 32, "seed: 3", BLEND), "story.yaml"))
    latents = [finished.latents for finished in engine.denoise(plan)]
    assert all(x.device == CUDA and x.dtype == torch.float32 and bool(x.isfinite().all()) for x in latents)
    assert any(sparse)


@pytest.mark.usefixtures("cuda")
def test_what_is_saved_comes_back_to_the_device(tmp_path: Path) -> None:
    saved = {"a": torch.randn(3, 4).to(CUDA), "b": torch.randn(3, 4, dtype=torch.bfloat16).to(CUDA).T}
    write_tensors(tmp_path / "state.safetensors", saved)
    for name, value in read_tensors(tmp_path / "state.safetensors", lambda name: True, CUDA):
        assert value.device == CUDA and value.stride() == saved[name].stride()
        assert torch.equal(value.cpu(), saved[name].cpu())


@pytest.mark.parametrize("kind", ["ltx", "cogvideox 1.5", "ti2v"])
@pytest.mark.usefixtures("cuda")
def test_a_decoder_goes_on_with_the_state_of_another_rank(checkpoint_of: CheckpointOf, kind: str) -> None:
    """States go through the host's memory; latents are on the device."""
    checkpoint = open_checkpoint(str(checkpoint_of(kind)))
    first, second = (checkpoint.load_decoder(torch.float32, CUDA) for _ in range(2))
    config = first.vae.config
    channels = (config.z_dim if kind == "ti2v" else config.latent_channels) * (2 if "1.5" in kind else 1)
    latents = torch.randn(channels, 12, 2, 2, generator=torch.Generator().manual_seed(0)).to(CUDA)
    before, whole = first.push(latents[:, :6]), first.push(latents[:, 6:], True)
    first.reset()
    assert torch.equal(first.push(latents[:, :6]), before)
    second.load_state(unpack_state(pack_state(first.state())))
    assert torch.equal(second.push(latents[:, 6:], True), whole)


@pytest.mark.usefixtures("cuda")
def test_dense_attention_with_its_lse_needs_no_memory_for_all_scores() -> None:
    """In each dtype a kernel of torch's computes it, and none is given what it does not take."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v = (torch.randn(2, n, 3, 16).to(dtype) for n in (33, 50, 50))
        expected, expected_lse = attend_lse_exact(q, k, v)
        out, lse = attend_lse(q.to(CUDA), k.to(CUDA), v.to(CUDA))
        assert out.device == lse.device == CUDA and out.dtype == dtype and lse.dtype == torch.float32
        torch.testing.assert_close(out.cpu(), expected, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse.cpu(), expected_lse, rtol=2e-2, atol=2e-2)


def test_every_rank_has_a_gpu_of_its_own_and_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"is_available": True, "device_count": 4, "current_device": 3}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    chosen = load_settings(None, ["runtime.device=auto"])
    assert pick_device(chosen) == torch.device("cuda", 3)
    torchrun = {"RANK": "6", "LOCAL_RANK": "6", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}
    for name, value in (torchrun | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)
    assert pick_device(chosen) == torch.device("cuda", 2)
    require_own([("a", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-1")])
    with pytest.raises(InputError, match="ranks 1 and 2 have the same GPU of b"):
        require_own([("a", "GPU-1"), ("b", "GPU-1"), ("b", "GPU-1")])
