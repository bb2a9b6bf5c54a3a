"""`longvid tune`: the search for each head's sparse pattern (Sparse-vDiT), on the attention of a film."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

from torch import Tensor

from longvid.engine import Engine, pick_device, set_threads
from longvid.fingerprint import mark_of
from longvid.kernels.dense import Partial
from longvid.kernels.layout import BlockLayout
from longvid.models.families import require_sparse
from longvid.models.loader import open_checkpoint
from longvid.parallel.mesh import lone_mesh
from longvid.script import load_script
from longvid.settings import Settings
from longvid.sparsity.policy import Call
from longvid.sparsity.profile import Profile
from longvid.sparsity.runtime import SparseRuntime
from longvid.sparsity.search import Judge, Sample, Search, measure_costs
from longvid.sparsity.tokens import TokenMap

SAMPLE_AT = (0.25, 0.5, 0.75)
"""Shares of a chunk's steps at which heads are judged: a pattern must hold at all of them."""


class Listener:
    """A policy that leaves attention dense and judges what it sees of it."""

    data_dependent = True

    def __init__(self, judge: Judge) -> None:
        self._judge = judge

    def layout(self, q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, call: Call) -> BlockLayout | None:
        return None

    def finish(
        self,
        q_BLHD: Tensor,
        k_BTHD: Tensor,
        v_BTHD: Tensor,
        partial: Partial,
        layout: BlockLayout | None,
        call: Call,
    ) -> Tensor:
        if call.step in {round(share * call.num_steps) for share in SAMPLE_AT}:
            self._judge.add(Sample(call.layer, q_BLHD, k_BTHD, v_BTHD, call.tokens))
        return partial[0]

    def head_costs(self, layer: int) -> None:
        return None

    def density(self, tokens: TokenMap) -> float:
        return 1.0


def tune(story: Path, settings: Settings, *, chunks: int, how: Search, on_chunk: Callable[[int, int], None]) -> Profile:
    """The profile of the settings' model, by the first chunks of a film that is denoised here and not written.

    `on_chunk` hears how many chunks are done, of how many. Raises InputError for a wrong storyboard or model.
    """
    set_threads(settings)
    checkpoint = open_checkpoint(settings.model.path)
    require_sparse(checkpoint.facts, "there is nothing to tune")
    assert checkpoint.root is not None
    judge = Judge(measure_costs(pick_device(settings)), how)
    listener = SparseRuntime(Listener(judge), checkpoint.facts.num_layers, settings.sampler.steps, always=True)
    engine = Engine(checkpoint, settings, lone_mesh(), attention=listener)
    plan = engine.plan(load_script(story))
    total = min(chunks, len(plan.chunks))
    for done, _ in enumerate(islice(engine.denoise(plan), total), 1):
        on_chunk(done, total)
    return judge.profile(mark_of(checkpoint.root, "transformer"))
