"""Layers that wait in host memory, in the checkpoint's files or on other ranks, and come to the device for use.

Two groups of layers are on the device: the one at work, and the next, which a thread fetches in the meantime; after the
last comes the first again, as passes follow each other. From pinned host memory the copies run on a stream of their
own. A layer out of turn (its prompt's K/V, a step that a cache leaves out) is waited for, so only speed depends on the
order. What is computed is the same to the last bit.

With `zero` (ZeRO-Inference; Rajbhandari et al. 2020, arXiv:1910.02054; Aminabadi et al. 2022, arXiv:2207.00032) each of
the ranks that share a unit's tokens keeps a part of every weight, and DeepSpeed gathers one group of layers at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from longvid.errors import InputError
from longvid.parallel.collectives import Group
from longvid.settings import MemorySettings

FillLayer = Callable[[int, nn.Module, torch.device], None]
"""Reads the weights of a layer of the part, by its index, into a layer of that kind, on a device."""

Weights = dict[str, nn.Parameter]
"""A layer's, by name."""

HOST = torch.device("cpu")


class Source(Protocol):
    """Where layers wait."""

    def get(self, index: int) -> Weights:
        """A layer's weights in host memory."""
        ...


class FromDisk:
    """Reads a layer anew each time; `blank` is a layer of the kind without weights."""

    def __init__(self, blank: nn.Module, fill: FillLayer) -> None:
        self._blank, self._fill = blank, fill

    def get(self, index: int) -> Weights:
        layer = copy.deepcopy(self._blank)
        self._fill(index, layer, HOST)
        return dict(layer.named_parameters())


class FromHost:
    """Has all layers in pinned memory."""

    def __init__(self, blank: nn.Module, fill: FillLayer, count: int) -> None:
        disk = FromDisk(blank, fill)
        self._layers = [{name: _pinned(value) for name, value in disk.get(i).items()} for i in range(count)]

    def get(self, index: int) -> Weights:
        return self._layers[index]


class LayerWindow:
    """The groups of layers that are on the device."""

    def __init__(self, layers: nn.ModuleList, source: Source, device: torch.device, group: int) -> None:
        self._layers, self._source, self._device = layers, source, device
        self._groups = _groups(len(layers), group)
        self._here: int | None = None
        self._coming: tuple[int, Future[list[Weights]]] | None = None
        self._fetcher = ThreadPoolExecutor(1, "longvid-offload")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._released: torch.cuda.Event | None = None
        _bring_when_called(layers, self._groups, self.bring)

    def bring(self, number: int) -> None:
        """Have a group's weights in its layers."""
        if number == self._here:
            return
        if self._here is not None:
            self._release(self._groups[self._here])
        if self._coming is None or self._coming[0] != number:
            self._coming = self._begin(number)
        weights = self._coming[1].result()
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        for index, layer in zip(self._groups[number], weights, strict=True):
            for name, value in layer.items():
                if self._stream is not None:
                    for part in _parts(value.data):
                        part.record_stream(torch.cuda.current_stream(self._device))
                _put(self._layers[index], name, value)
        self._here, self._coming = number, None
        following = (number + 1) % len(self._groups)
        if following != number:
            self._coming = self._begin(following)

    def _begin(self, number: int) -> tuple[int, Future[list[Weights]]]:
        """Start to fetch a group, once the device has done what was asked of it before the last release."""
        done = None
        if self._stream is not None:
            done, self._released = self._released, None
        return number, self._fetcher.submit(self._fetch, number, done)

    def _fetch(self, number: int, done: torch.cuda.Event | None) -> list[Weights]:
        """A group's weights on the device, or on their way there on the stream."""
        if self._device.type == "cpu":
            return [self._source.get(index) for index in self._groups[number]]
        if done is not None:
            # The program runs ahead of the device: without this wait, so would the copies, until all layers are there.
            done.synchronize()
        with torch.cuda.stream(self._stream):
            return [
                {
                    name: _parameter(value.detach().to(self._device, non_blocking=True))
                    for name, value in self._source.get(index).items()
                }
                for index in self._groups[number]
            ]

    def _release(self, members: range) -> None:
        if self._stream is not None:
            self._released = torch.cuda.current_stream(self._device).record_event()
        for index in members:
            for name, value in list(self._layers[index].named_parameters()):
                _put(self._layers[index], name, _parameter(torch.empty(0, dtype=value.dtype, device=self._device)))


class ZeroLayers:
    """Layers of which every rank of `peers` keeps a part, by DeepSpeed's ZeRO-3; one group of them is whole.

    The peers must call layers in the same order, as ranks that share a unit's tokens do. Each reads all weights once, a
    layer at a time. Raises InputError where DeepSpeed is not installed, or works on another kind of device.
    """

    def __init__(
        self, layers: Sequence[nn.Module], fill: FillLayer, device: torch.device, group: int, peers: Group
    ) -> None:
        self._zero = require_zero(device)
        self._layers, self._groups = layers, _groups(len(layers), group)
        self._here: int | None = None
        self._gathered: Any = None
        handle = peers.library_handle()
        for index, layer in enumerate(layers):
            fill(index, layer, device)
            dtype = next(layer.parameters()).dtype
            self._zero.Init(module=layer, data_parallel_group=handle, mem_efficient_linear=False, dtype=dtype)
        _bring_when_called(layers, self._groups, self.bring)

    def bring(self, number: int) -> None:
        """Have a group's weights whole, and no other's."""
        if number == self._here:
            return
        if self._gathered is not None:
            self._gathered.__exit__(None, None, None)
        members = (self._layers[index] for index in self._groups[number])
        self._gathered = self._zero.GatheredParameters([weight for layer in members for weight in layer.parameters()])
        self._gathered.__enter__()
        self._here = number


def require_zero(device: torch.device) -> Any:
    """DeepSpeed's module of ZeRO, for ranks that are connected. Raises InputError where it is of no use."""
    try:
        import deepspeed
    except ImportError as error:
        raise InputError(f"memory.offload: zero needs deepspeed ({error}): pip install longvid[deepspeed]") from error
    accelerator = deepspeed.get_accelerator()
    if accelerator.device_name() != device.type:
        both = f"DeepSpeed works on {accelerator.device_name()} here, and runtime.device is {device.type}"
        raise InputError(f"memory.offload: {both}: set the variable DS_ACCELERATOR to {device.type}")
    deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name())
    return deepspeed.zero


def offload_layers(layers: nn.ModuleList, fill: FillLayer, device: torch.device, memory: MemorySettings) -> None:
    """Have layers without weights come to the device when they are called."""
    blank = copy.deepcopy(layers[0])
    source = FromDisk(blank, fill) if memory.offload == "disk" else FromHost(blank, fill, len(layers))
    LayerWindow(layers, source, device, memory.group)


def _groups(num_layers: int, size: int) -> list[range]:
    """Layers that come together."""
    indices = range(num_layers)
    return [indices[start : start + size] for start in range(0, num_layers, size)]


def _bring_when_called(
    layers: Sequence[nn.Module] | nn.ModuleList, groups: Sequence[range], bring: Callable[[int], None]
) -> None:
    """Have a group brought before any module of its layers runs: a prompt's K/V use some modules alone."""
    for number, members in enumerate(groups):
        for index in members:
            for module in layers[index].modules():
                module.register_forward_pre_hook(lambda _module, _inputs, number=number: bring(number))


def _put(layer: nn.Module, name: str, value: nn.Parameter) -> None:
    path, _, kind = name.rpartition(".")
    layer.get_submodule(path).register_parameter(kind, value)


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def _pinned(value: Tensor) -> nn.Parameter:
    return _parameter(_with_each_part(value.detach(), Tensor.pin_memory))


def _with_each_part(value: Any, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A tensor with each one that it is made of changed; a plain one is made of itself, a quantized one of others."""
    if not hasattr(value, "__tensor_flatten__"):
        return change(value)
    names, context = value.__tensor_flatten__()
    parts = {name: _with_each_part(getattr(value, name), change) for name in names}
    rebuilt: Tensor = type(value).__tensor_unflatten__(parts, context, value.size(), value.stride())
    return rebuilt


def _parts(value: Any) -> Iterator[Tensor]:
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _parts(getattr(value, name))
    else:
        yield value
