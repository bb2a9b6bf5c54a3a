"""A stage of a model whose text and video tokens go through its layers together.

Shapes: F latents of a unit, S video tokens of it, s of them on this rank, N text tokens of its prompts together, E
width, P numbers that a token's velocity has.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from longvid.models.joint_attention import JointContext, joint_spans
from longvid.models.layer_stage import LayerStage, Pass, context_of, neighbours, token_map
from longvid.parallel.around import Rope
from longvid.parallel.spans import length
from longvid.parallel.stage import Unit
from longvid.plan import PromptBlend


class JointStage(LayerStage):
    """Hidden states are the text of all prompts of a unit, then this rank's of its video tokens.

    Text goes through the layers on every rank of the sequence; only its attention is spread over them. Between stages
    it has a fixed number of places, so that the shape does not depend on the prompts: `text_places`. A family sets what
    follows when it knows the film.
    """

    dtype: torch.dtype
    device: torch.device
    width: int
    text_places: int = 0
    """Places for the text of one unit."""
    text_lengths: Sequence[Sequence[int]] = ()
    """Text tokens of every prompt, for each branch of the stage."""

    @abstractmethod
    def token_grid(self, latent_size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of a latent's tokens."""

    @abstractmethod
    def rope(self, num_latents: int, height: int, width: int) -> Rope | None:
        """Rotary rows of a chunk-local grid of tokens, from position 0; None: positions are in the tokens."""

    @abstractmethod
    def embed_time(self, unit: Unit, index: int) -> Tensor:
        """What modulates the layers of a unit in a branch of the stage, [1, E']."""

    @abstractmethod
    def embed_text(self, unit: Unit, index: int, prompt: int) -> Tensor:
        """The text of a prompt as it enters the first layer, [1, tokens, E]."""

    @abstractmethod
    def embed_video(self, latents: Tensor) -> Tensor:
        """Latents fp32 [C, F, h, w] as they enter the first layer, [1, S, E]."""

    @abstractmethod
    def run_block(
        self, index: int, video: Tensor, text: Tensor, temb: Tensor, context: JointContext
    ) -> tuple[Tensor, Tensor]:
        """Video and text behind a layer of the stage."""

    @abstractmethod
    def project(self, video: Tensor, temb: Tensor) -> Tensor:
        """The output layers on some video tokens [1, s, E]: their velocities [1, s, P]."""

    @abstractmethod
    def unpatch(self, patches: Tensor, unit: Unit) -> Tensor:
        """Velocities of the tokens of `num_predicted` latents as they lie in these: fp32 [C, F, h, w]."""

    def hidden_shape(self, num_latents: int, latent_size: Sequence[int]) -> tuple[tuple[int, ...], torch.dtype]:
        """[branches, text_places + s, E] for F latents."""
        part = self.sequence.part(num_latents * math.prod(self.token_grid(latent_size)))
        return (self.num_branches, self.text_places + length(part), self.width), self.dtype

    def passes(self, unit: Unit) -> list[Pass]:
        """Each branch of a unit as it enters the stage."""
        blends = unit.chunk.prompts[-len(unit.timesteps) :]
        prompts = prompts_of(blends)
        num_tokens = len(unit.timesteps) * math.prod(self.token_grid(unit.latent_size))
        part, passes = self.sequence.part(num_tokens), []
        for index, (branch, entering, anchor) in enumerate(self._entering(unit, part)):
            lengths = [self.text_lengths[index][prompt] for prompt in prompts]
            if self.is_first:
                hidden = torch.cat([*(self.embed_text(unit, index, prompt) for prompt in prompts), entering], 1)
            else:
                hidden = _without_gap(entering, sum(lengths), length(part))
            begun = None if anchor is None else _without_gap(anchor, sum(lengths), length(part))
            context, temb = self._context(unit, index, blends, lengths), self.embed_time(unit, index)
            layer, head = partial(self._layer, temb, context), partial(self._head, temb, unit, context)
            rows = {"start": part.start, "first_row": sum(lengths)}
            passes.append(Pass(branch, hidden, begun, context, layer, head, num_tokens, **rows))
        return passes

    def _entering(self, unit: Unit, part: slice) -> list[tuple[int, Tensor, Tensor | None]]:
        """Of each branch that runs: what it is, its video or what the stage before left, and what entered the span."""
        branches = self.branches[: unit.num_branches]
        if not self.is_first:
            return list(zip(branches, *self.entering(unit), strict=True))
        assert unit.latents is not None
        video = self.embed_video(unit.latents)[:, part]
        return [(branch, video, None) for branch in branches]

    def leave(self, hidden: Tensor, num_tokens: int) -> Tensor:
        """Text, empty places, video."""
        num_text = hidden.shape[1] - length(self.sequence.part(num_tokens))
        empty = hidden.new_zeros(1, self.text_places - num_text, hidden.shape[2])
        return torch.cat([hidden[:, :num_text], empty, hidden[:, num_text:]], 1)

    def _context(self, unit: Unit, index: int, blends: Sequence[PromptBlend], lengths: Sequence[int]) -> JointContext:
        grid = self.token_grid(unit.latent_size)
        before, after = neighbours(unit)
        tokens = token_map(unit, before, after, grid, text_before=lengths[0])  # of use with one prompt alone
        return JointContext(
            **context_of(unit, index, math.prod(grid)),
            rope=self.rope(before + len(unit.timesteps) + after, *grid),
            num_tokens=len(unit.timesteps) * math.prod(grid),
            spans=joint_spans(blends, prompts_of(blends), math.prod(grid)),
            text_lengths=lengths,
            attention=self.layer_attention(unit, self.branches[index], tokens, self.device),
            head_costs=self.layer_costs,
        )

    def _layer(self, temb: Tensor, context: JointContext, index: int, hidden: Tensor) -> Tensor:
        count = sum(context.text_lengths)
        video, text = self.run_block(index, hidden[:, count:], hidden[:, :count], temb, context)
        return torch.cat([text, video], 1)

    def _head(self, temb: Tensor, unit: Unit, context: JointContext, hidden: Tensor) -> Tensor:
        """The velocity of the last `num_predicted` latents, on every rank of the sequence."""
        own = unit.num_predicted * math.prod(self.token_grid(unit.latent_size))
        video = hidden[:, sum(context.text_lengths) :]
        if video.shape[1] == context.num_tokens:  # all tokens are here: those of the left context need no velocity
            patches = self.project(video[:, -own:], temb)
        else:
            patches = self.sequence.gather(self.project(video, temb), context.num_tokens)[:, -own:]
        return self.unpatch(patches, unit)


def prompts_of(blends: Sequence[PromptBlend]) -> list[int]:
    """The prompts that a unit's latents follow, each once."""
    return list(dict.fromkeys(prompt for blend in blends for prompt in (blend.a, blend.b)))


def _without_gap(states: Tensor, num_text: int, num_video: int) -> Tensor:
    """Text and video of a branch as it came from the stage before, without the empty places between them."""
    return torch.cat([states[:, :num_text], states[:, states.shape[1] - num_video :]], 1)
