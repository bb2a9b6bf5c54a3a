"""Mask²DiT's rule: a scene's text reaches its own latents alone, and a latent sees all latents. In one layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from longvid.models.joint_attention import JointContext, joint_attention
from longvid.models.wan import WanStage
from longvid.parallel.attention import JointSpan
from longvid.parallel.sequence import WholeSequence
from longvid.parallel.stage import Unit
from longvid.plan import Chunk, PromptBlend

A, B = PromptBlend(0, 0), PromptBlend(1, 1)
COUNT, CHANNELS, SIZE = 5, 4, (6, 4)


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def wan(euler_checkpoint: Path) -> Callable[..., Tensor]:
    """The velocity [C, F, h, w] of latents of two scenes, for their texts; `num_left` of them are left context."""
    stage = WanStage(diffusers.WanTransformer3DModel.from_pretrained(euler_checkpoint / "transformer"))
    stage.dit.blocks = stage.dit.blocks[:1]

    def velocity(latents: Tensor, texts: list[Tensor], blends: list[PromptBlend], num_left: int = 0) -> Tensor:
        stage.set_prompts(texts, texts)
        own = COUNT - num_left
        chunk = Chunk(0, 0, num_left, own, num_left, 0, tuple(blends), (0,) * own, (0, 0))
        return stage.forward(Unit(chunk, 0, torch.full((COUNT,), 500.0), SIZE, latents)).velocity[0]

    return velocity


def changed(before: Tensor, after: Tensor) -> list[bool]:
    """Of each latent, whether it differs."""
    return [not torch.equal(before[:, f], after[:, f]) for f in range(before.shape[1])]


@pytest.mark.parametrize("num_left", [0, 1, 3], ids=["at once", "queue", "queue, context over the change"])
def test_wans_latents_hear_their_own_text_and_see_all_latents(wan: Callable[..., Tensor], num_left: int) -> None:
    latents, texts, blends = noise(1, CHANNELS, COUNT, *SIZE), [noise(2, 5, 16), noise(3, 7, 16)], [A, A, B, B, B]
    before = wan(latents, texts, blends, num_left)
    own_is_b = [blend is B for blend in blends[num_left:]]
    assert changed(before, wan(latents, [texts[0], noise(4, 7, 16)], blends, num_left)) == own_is_b
    assert changed(before, wan(latents, [noise(5, 5, 16), texts[1]], blends, num_left)) == [not x for x in own_is_b]
    for f in range(COUNT):
        other = latents.clone()
        other[:, f] = noise(6, CHANNELS, *SIZE)
        assert all(changed(before, wan(other, texts, blends, num_left)))


def test_a_blended_latent_hears_both_texts(wan: Callable[..., Tensor]) -> None:
    latents, texts = noise(1, CHANNELS, COUNT, *SIZE), [noise(2, 5, 16), noise(3, 7, 16)]
    blends = [A, A, PromptBlend(0, 1, 0.5), B, B]
    before = wan(latents, texts, blends)
    assert changed(before, wan(latents, [texts[0], noise(4, 7, 16)], blends)) == [False, False, True, True, True]
    assert changed(before, wan(latents, [noise(5, 5, 16), texts[1]], blends)) == [True, True, True, False, False]


def test_joint_attention_is_such_a_layout() -> None:
    """Video tokens 0 to 3 follow the first prompt, the others the second; a prompt has 3 tokens."""
    spans = [JointSpan(slice(0, 4), 0), JointSpan(slice(4, 10), 1)]
    text, video = [noise(i, 1, 6, 2, 8) for i in range(3)], [noise(3 + i, 1, 10, 2, 8) for i in range(3)]

    def attend(text: list[Tensor], video: list[Tensor]) -> Tensor:
        context: Any = JointContext(rope=None, num_tokens=10, spans=spans, text_lengths=[3, 3])
        return joint_attention(0, text, video, context, WholeSequence())[0].flatten(1).T

    before = attend(text, video)
    for prompt in (0, 1):
        tokens = slice(3 * prompt, 3 * prompt + 3)
        other = [x.clone() for x in text]
        for x in other[1:]:  # keys and values
            x[:, tokens] += 1
        of_prompt = [index // 3 == prompt for index in range(6)]
        of_scene = [(index >= 4) == bool(prompt) for index in range(10)]
        assert changed(before, attend(other, video)) == of_prompt + of_scene
    for token in range(10):
        other = [x.clone() for x in video]
        for x in other[1:]:
            x[:, token] += 1
        assert all(changed(before, attend(text, other)))
