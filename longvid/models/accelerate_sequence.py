"""The tokens of somebody else's transformer over the ranks that a launcher started.

Every rank runs the same pipeline with the same inputs. A transformer's tokens are cut into parts before its first layer
and put together behind the last one; between, each rank has its part, and all of the text.

Shapes: B batch, S video tokens, s of them on this rank, N text tokens, H heads, D of a head.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from longvid.errors import InputError
from longvid.launch.env import rank_of
from longvid.models.accelerate_subjects import Call, Subject
from longvid.parallel.around import Around
from longvid.parallel.attention import Attention, JointSpan, Text
from longvid.parallel.collectives import connect, is_connected
from longvid.parallel.mesh import Mesh, lone_mesh, make_mesh
from longvid.parallel.sequence import make_sequence
from longvid.parallel.spans import length
from longvid.parallel.topology import Topology

TIMEOUT_S = 600.0
"""How long one rank may wait for another."""


def join_sequence(seq: int, ring: int, device: torch.device) -> Mesh:
    """This process's place among `seq` ranks, all that a launcher started; all call it together. With 1 it is alone.

    It joins the launcher's ranks if nobody has, and stays with them. Raises InputError for numbers that do not fit.
    """
    if seq < 1 or ring < 1:
        raise InputError(f"accelerate: seq and ring must be 1 or more, not {seq} and {ring}")
    if seq % ring:
        raise InputError(f"accelerate: seq {seq} is not a multiple of ring {ring}")
    if seq == 1:
        return lone_mesh()
    environment = rank_of(os.environ)
    if environment is None or seq != environment.world_size:
        started = f"the launcher started {environment.world_size}" if environment else "no launcher started any"
        raise InputError(f"accelerate: seq must be the number of ranks, not {seq}: {started}")
    if not is_connected():
        if environment.rendezvous is None:
            raise InputError(f"MASTER_ADDR and MASTER_PORT are not set: {environment.how_to_meet()}")
        connect(device, TIMEOUT_S)
    # Ranks of a pipeline exchange tokens in groups, and send each other no messages.
    return make_mesh(Topology(seq=seq, ring=ring), environment.rank, device, TIMEOUT_S, pairs=())


class PipelineSequence:
    """Cuts what the layers of one transformer are given, and puts together what the last one gives."""

    def __init__(self, subject: Subject, mesh: Mesh) -> None:
        self._subject, self._mesh = subject, mesh
        self._sequence = make_sequence("longvid", mesh.ulysses, mesh.ring, mesh.seq)
        self.num_tokens = 0
        heads = {subject.attention(layer).heads for layer in subject.layers}
        if any(count % mesh.topology.ulysses for count in heads):
            equation = f"seq {mesh.topology.seq} / ring {mesh.topology.ring} = {mesh.topology.ulysses}"
            raise InputError(f"accelerate: {equation} does not divide the model's {max(heads)} heads: raise ring")
        self._hooks: list[Any] = []

    def install(self) -> None:
        """Before the first call of the transformer."""
        subject = self._subject
        self._hooks.append(subject.model.register_forward_pre_hook(self._begin, with_kwargs=True))
        for index, layer in enumerate(subject.layers):
            cut = self._cut_first if index == 0 else self._cut
            self._hooks.append(layer.register_forward_pre_hook(cut, with_kwargs=True))
        self._hooks.append(subject.layers[-1].register_forward_hook(self._put_together))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def part(self) -> slice:
        """This rank's of the video tokens at hand."""
        return self._sequence.part(self.num_tokens)

    def sum(self, values: Tensor) -> Tensor:
        """Over all ranks, the same bits on each."""
        seq = self._mesh.seq
        return torch.stack(seq.all_gather(values, [values.shape] * seq.size)).sum(0)

    def attend(self, qkv: tuple[Tensor, Tensor, Tensor], num_text: int, attention: Attention) -> Tensor:
        """Attention of all N text tokens and this rank's s of video to all, [B, N + s, H, D]; they come rotated."""
        text, (query, key, value) = None, qkv
        if num_text:
            whole = [JointSpan(slice(0, self.num_tokens), 0)]
            text = Text(query[:, :num_text], key[:, :num_text], value[:, :num_text], [num_text], whole)
        around = Around(None, num_tokens=self.num_tokens, text=text, attention=attention)
        return self._sequence.attend(query[:, num_text:], key[:, num_text:], value[:, num_text:], around)[0]

    def _begin(self, _model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.num_tokens = math.prod(self._subject.grid(self._subject.call(args, kwargs)))

    def _cut_first(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Call) -> tuple[tuple[Any, ...], Call]:
        args, kwargs = self._cut(layer, args, kwargs)
        if args:
            return (args[0][:, self.part].contiguous(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"][:, self.part].contiguous()}

    def _cut(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: Call) -> tuple[tuple[Any, ...], Call]:
        """A layer's arguments with this rank's rows of the rotary tables, and of modulation that has a row a token."""
        modulation, part = self._subject.modulation, self.part

        def cut(place: int | str, value: Any) -> Any:
            if isinstance(value, tuple) and len(value) == 2:
                dim = self._subject.rope_dim
                return tuple(table.narrow(dim, part.start, length(part)) for table in value)
            is_modulation = place in ("temb", 2) and isinstance(value, Tensor) and value.dim() == modulation
            return value[:, part] if is_modulation and value.shape[1] == self.num_tokens else value

        found = tuple(cut(place, value) for place, value in enumerate(args))
        return found, {name: cut(name, value) for name, value in kwargs.items()}

    def _put_together(self, _layer: nn.Module, _args: tuple[Any, ...], states: Any) -> Any:
        if isinstance(states, tuple):
            return (self._sequence.gather(states[0].contiguous(), self.num_tokens), *states[1:])
        return self._sequence.gather(states.contiguous(), self.num_tokens)
