"""`longvid tune`: the searches for heads' patterns, windows and latents, on the attention of a film."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Protocol

from torch import Tensor

from longvid.engine import Engine
from longvid.errors import InputError
from longvid.fingerprint import mark_of
from longvid.models.families import require_sparse
from longvid.models.loader import open_checkpoint
from longvid.parallel.mesh import lone_mesh
from longvid.ranks import pick_device, set_threads
from longvid.script import load_script
from longvid.settings import Settings
from longvid.sparsity.listener import Listener
from longvid.sparsity.option_search import OptionJudge, OptionSearch
from longvid.sparsity.policy import Call
from longvid.sparsity.profile import Choices, Profile
from longvid.sparsity.runtime import SparseRuntime
from longvid.sparsity.search import Judge, Sample, Search, measure_costs

SAMPLE_AT = (0.25, 0.5, 0.75)
"""Shares of a chunk's steps at which heads are judged: a pattern must hold at all of them."""


class Judges(Protocol):
    """Takes samples."""

    def add(self, sample: Sample) -> None: ...


def tune(story: Path, settings: Settings, *, chunks: int, how: Search, on_chunk: Callable[[int, int], None]) -> Profile:
    """Each head's pattern, by the first chunks of a film that is denoised here and not written (Sparse-vDiT).

    `on_chunk` hears how many chunks are done, of how many. Raises InputError for a wrong storyboard or model.
    """
    set_threads(settings)
    judge = Judge(measure_costs(pick_device(settings)), how)
    return judge.profile(listen(story, settings, judge, chunks=chunks, on_chunk=on_chunk))


def tune_options(
    story: Path, settings: Settings, *, chunks: int, how: OptionSearch, on_chunk: Callable[[int, int], None]
) -> Choices:
    """The same for the options of a fixed pattern: STA's windows, Efficient-vDiT's latents.

    Raises InputError also where no choice of options keeps to the tolerance.
    """
    set_threads(settings)
    judge = OptionJudge(how)
    model = listen(story, settings, judge, chunks=chunks, on_chunk=on_chunk)
    try:
        return judge.choices(model)
    except ValueError as error:
        raise InputError(f"{story}: {error}") from error


def listen(story: Path, settings: Settings, judge: Judges, *, chunks: int, on_chunk: Callable[[int, int], None]) -> str:
    """Gives a judge what the model's attention is in a film's first chunks. Returns the model's mark."""
    checkpoint = open_checkpoint(settings.model.path)
    require_sparse(checkpoint.facts, "there is nothing to tune")
    assert checkpoint.root is not None

    def hear(q_BLHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, call: Call) -> None:
        if call.step in {round(share * call.num_steps) for share in SAMPLE_AT}:
            judge.add(Sample(call.layer, q_BLHD, k_BTHD, v_BTHD, call.tokens, call.step / call.num_steps))

    listener = SparseRuntime(Listener(hear), checkpoint.facts.num_layers, settings.sampler.steps, always=True)
    engine = Engine(checkpoint, settings, lone_mesh(), attention=listener)
    plan = engine.plan(load_script(story))
    total = min(chunks, len(plan.chunks))
    for done, _ in enumerate(islice(engine.denoise(plan), total), 1):
        on_chunk(done, total)
    return mark_of(checkpoint.root, "transformer")
