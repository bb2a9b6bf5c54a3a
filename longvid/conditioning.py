"""What a film is to follow, on its way into the stage: prompts and images, which the leader encodes for all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from longvid.models.checkpoint import Condition, FilmInputs, Prompt
from longvid.plan import Plan
from longvid.rank_model import RankModel
from longvid.ranks import on_leader

HOST = torch.device("cpu")
"""What ranks tell each other lies here: a tensor on one's GPU would come to the first GPU of each other's machine."""


def moved(values: Sequence[Any], device: torch.device) -> list[Any]:
    """Prompts or conditions on a device. What is shared stays so, for a stage computes its K/V once."""
    known = {id(value): value.to(device) for value in values}
    return [known[id(value)] for value in values]


class Conditioning:
    """That of one engine, film by film."""

    def __init__(self, model: RankModel) -> None:
        self._model = model
        self._inputs = FilmInputs(())
        """What the stage was given for the film at hand."""

    def prepare(self, plan: Plan, spare_prompts: int) -> Sequence[Condition | None]:
        """Give the stage prompts and images. Returns every shot's image.

        Prompts that come later are at most so many more in a chunk: its own, and one in its left context.
        """
        texts = [*plan.prompts, *(plan.negatives if self._model.settings.sampler.num_branches == 2 else ())]
        prompts = on_leader(self._model.mesh, lambda: moved(self._model.prompts.encode(texts), HOST))
        prompts = moved(prompts, self._model.device)
        files = dict.fromkeys(shot.image for shot in plan.shots if shot.image)
        encoded = on_leader(self._model.mesh, lambda: moved([self.encode_image(file, plan) for file in files], HOST))
        images = dict(zip(files, moved(encoded, self._model.device), strict=True))
        of_shot = [images[shot.image] if shot.image else None for shot in plan.shots]
        most = max(len({x for blend in chunk.prompts for x in (blend.a, blend.b)}) for chunk in plan.chunks)
        count = len(plan.prompts)
        self._inputs = FilmInputs(prompts[:count], prompts[count:], of_shot, most + spare_prompts, plan.fps)
        self._model.stage.prepare(self._inputs)
        return of_shot

    def encode_prompts(self, texts: Sequence[str]) -> list[Prompt]:
        return self._model.prompts.encode(texts)

    def add_prompt(self, prompt: Prompt, negative: Prompt) -> None:
        """Give the stage one more prompt, behind those that it has."""
        prompts = [*self._inputs.prompts, prompt.to(self._model.device)]
        negatives = [*self._inputs.negatives, negative.to(self._model.device)] if self._inputs.negatives else ()
        self._inputs = replace(self._inputs, prompts=prompts, negatives=negatives)
        self._model.stage.prepare(self._inputs)

    def encode_image(self, file: Path, plan: Plan) -> Condition:
        assert self._model.images is not None, "a plan for a model without images has none"
        return self._model.images.encode(file, plan.width, plan.height)
