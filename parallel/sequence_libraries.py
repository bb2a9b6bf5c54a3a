"""Sequence parallelism by other libraries: DeepSpeed's Ulysses and xfuser's USP, both optional.

`sequence.make_sequence` chooses them by `sequence.backend`. They split tokens evenly or not at all.

Shapes: B batch (1 in the engine), L tokens of a unit, l of them on this rank, H heads, D of a head. Text that goes
through the layers with the unit's tokens has N tokens, which are whole on every rank; it counts to neither L nor l.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from longvid.errors import InputError
from longvid.parallel.around import Around, KvPart, attend_around, neighbours, own_tokens, rotate, rows, store_whole
from longvid.parallel.collectives import Group
from longvid.parallel.spans import length, overlap, split
from longvid.parallel.ulysses import around_heads, beside, gather_heads, share_of_heads, to_heads
from longvid.settings import SequenceBackend


class DeepSpeedAttention:
    """DeepSpeed-Ulysses (Jacobs et al. 2023), the library's own. It splits tokens evenly or not at all."""

    def __init__(self, group: Group) -> None:
        with optional("deepspeed"):
            deepspeed, layer = import_module("deepspeed"), import_module("deepspeed.sequence.layer")
        deepspeed.init_distributed(dist_backend=deepspeed.get_accelerator().communication_backend_name())
        self._group = group
        self._exchange = layer.DistributedAttention(self._attend_heads, group.handle, scatter_idx=2, gather_idx=1)

    def part(self, num_tokens: int) -> slice:
        return even_part("deepspeed", num_tokens, self._group)

    def gather(self, x_BlE: Tensor, num_tokens: int) -> Tensor:
        return torch.cat(self._group.all_gather(x_BlE, [x_BlE.shape] * self._group.size), 1)

    def attend(self, q_BlHD: Tensor, k_BlHD: Tensor, v_BlHD: Tensor, around: Around) -> tuple[Tensor, list[KvPart]]:
        stored: list[KvPart] = []
        texts: list[Tensor] = []
        batch_dim, rotary = 0, None  # we rotate ourselves: the neighbours' keys too
        out: Tensor = self._exchange(q_BlHD, k_BlHD, v_BlHD, batch_dim, rotary, around, stored, texts)
        return beside(texts[0], out), stored

    def _attend_heads(
        self, q_BLhD: Tensor, k_BLhD: Tensor, v_BLhD: Tensor, around: Around, stored: list[KvPart], texts: list[Tensor]
    ) -> Tensor:
        """What DeepSpeed calls between its exchanges, with all tokens and a share of the heads."""
        stored += store_whole(k_BLhD, v_BLhD, around)
        heads = share_of_heads(self._group, range(q_BLhD.shape[2] * self._group.size))
        out, num_text = attend_around(q_BLhD, k_BLhD, v_BLhD, around_heads(around, heads), heads), around.num_text
        texts.append(gather_heads(out[:, :num_text], heads))
        return out[:, num_text:]


class XfuserAttention:
    """xfuser's USP, on CUDA in half precision. It splits tokens evenly or not at all.

    Neighbours' K/V enter as its joint tensors, which every member of the ring needs whole: so each rank keeps a share
    of the heads, but all tokens of a stored span.
    """

    def __init__(self, ulysses: Group, ring: Group, seq: Group) -> None:
        if not torch.cuda.is_available():
            raise InputError("sequence.backend: xfuser needs CUDA, and torch finds no such device here")
        kernel = "FA" if find_spec("flash_attn") else "TORCH_FLASH"
        with optional("xfuser"):
            library = import_module("xfuser.core.long_ctx_attention")
            # Its attention takes the groups from here when it is built.
            groups = import_module("yunchang.globals").PROCESS_GROUP
            groups.ULYSSES_PG, groups.RING_PG = ulysses.library_handle(), ring.library_handle()
            self._attention = library.xFuserLongContextAttention(attn_type=library.AttnType[kernel])
        self._ulysses, self._ring, self._seq = ulysses, ring, seq

    def part(self, num_tokens: int) -> slice:
        return even_part("xfuser", num_tokens, self._seq)

    def gather(self, x_BlE: Tensor, num_tokens: int) -> Tensor:
        return torch.cat(self._seq.all_gather(x_BlE, [x_BlE.shape] * self._seq.size), 1)

    def attend(self, q_BlHD: Tensor, k_BlHD: Tensor, v_BlHD: Tensor, around: Around) -> tuple[Tensor, list[KvPart]]:
        if q_BlHD.dtype == torch.float32:
            raise InputError("sequence.backend: xfuser's flash attention needs runtime.dtype bfloat16, not float32")
        assert around.text is None, "families.require refuses xfuser where text is among the tokens"
        part = self.part(own_tokens(around))
        rope = rows(around.rope, around.num_left + part.start, around.num_left + part.stop)
        joint = self._neighbours(around_heads(around, share_of_heads(self._ulysses, range(q_BlHD.shape[2]))))
        out: Tensor = self._attention(None, rotate(q_BlHD, rope), rotate(k_BlHD, rope), v_BlHD, **joint)
        return out, [self._store(k_BlHD, v_BlHD, part, span) for span in around.store]

    def _neighbours(self, around: Around) -> dict[str, Any]:
        """Its joint arguments: rotated K/V of both neighbours, and no queries."""
        keys, values = neighbours(around)
        if not keys:
            return {}
        key, value = torch.cat(keys, 1), torch.cat(values, 1)
        # It expects all heads and picks this rank's: so they stand in the place of the others, too.
        key, value = (x.repeat(1, 1, self._ulysses.size, 1) for x in (key, value))
        names = {"joint_tensor_query": key[:, :0], "joint_tensor_key": key, "joint_tensor_value": value}
        return {**names, "joint_strategy": "rear"}

    def _store(self, k_BlHD: Tensor, v_BlHD: Tensor, part: slice, span: slice) -> KvPart:
        """This rank's heads of all tokens of a span."""
        num_tokens = length(part) * self._seq.size
        held = [overlap(span, other) for other in split(num_tokens, self._seq.size)]
        mine = slice(held[self._seq.index].start - part.start, held[self._seq.index].stop - part.start)
        lengths, size = [length(other) for other in held], self._ulysses.size
        groups = [lengths[i : i + size] for i in range(0, len(lengths), size)]
        key, value = to_heads(self._ulysses, (k_BlHD[:, mine], v_BlHD[:, mine]), groups[self._ring.index])
        shapes = [(2, 1, sum(group), *key.shape[2:]) for group in groups]
        key, value = torch.cat(self._ring.all_gather(torch.stack([key, value]), shapes), 2)
        return KvPart(key, value)


def even_part(backend: SequenceBackend, num_tokens: int, group: Group) -> slice:
    """This rank's part, for backends that have none of different lengths."""
    if num_tokens % group.size:
        equation = f"{num_tokens} tokens of a unit / {group.size} ranks of mesh.seq"
        raise InputError(f"sequence.backend: {backend} needs equal parts, but {equation} is not whole: use longvid")
    return split(num_tokens, group.size)[group.index]


@contextmanager
def optional(library: str) -> Iterator[None]:
    """Where an optional library is imported."""
    try:
        yield
    except ImportError as error:
        install = f"pip install longvid[{library}]"
        raise InputError(f"sequence.backend: {library} cannot be imported ({error}): {install}") from error
