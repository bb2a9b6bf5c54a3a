"""The embedded model's tokenizer and text encoder, and the encoder's first lesson."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from longvid.training import world

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"
LESSONS: dict[str, tuple[str, ...]] = {
    "colour": world.COLOURS,
    "background": world.BACKGROUNDS,
    "shape": world.SHAPES,
    "size": tuple(world.SIZES),
    "motion": world.MOTIONS,
    "shaded": ("False", "True"),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the world's vocabulary, lower case, marks apart."""
    words = [PAD, EOS, UNKNOWN, *world.vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=512,
        padding_side="right",
    )


def make_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    """A small UMT5 encoder: 2 layers, 128 wide."""
    config = UMT5Config(
        vocab_size=vocab_size, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    return UMT5EncoderModel(config).eval()


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask, int64 [B, N], padded to the longest caption."""
    batch = tokenizer(list(captions), padding=True, return_tensors="pt")
    return batch.input_ids, batch.attention_mask


class AttributeReader(nn.Module):
    """Reads every attribute from every token of the text encoder's output, linearly.

    An encoder that has passed this lesson says the whole caption at each position, so that the
    video model finds what it needs wherever its cross-attention looks. Without the lesson a small
    model takes most of its training to find out that the text matters at all.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in LESSONS.items()})

    def loss(self, states: Tensor, mask: Tensor, looks: Sequence[world.Look]) -> Tensor:
        """Mean cross-entropy over attributes and tokens; ``states`` is [B, N, D], ``mask`` [B, N]."""
        total = states.new_zeros(())
        for name, values in LESSONS.items():
            target = torch.tensor([values.index(str(getattr(look, name))) for look in looks])
            logits = self.heads[name](states)[mask.bool()]
            total = total + F.cross_entropy(logits, target[:, None].expand_as(mask)[mask.bool()])
        return total / len(LESSONS)


def teach_text_encoder(
    encoder: UMT5EncoderModel, reader: AttributeReader, tokenizer: PreTrainedTokenizerFast, *, steps: int, seed: int
) -> float:
    """Train the encoder on captions alone; returns the last loss (0 is perfect)."""
    params = [*encoder.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(params, lr=2e-3, weight_decay=0.01)
    loss = torch.zeros(())
    for step in range(steps):
        rng = np.random.default_rng((seed, 11, step))
        looks = [world.sample_look(rng) for _ in range(128)]
        ids, mask = tokenize(tokenizer, [world.caption(look, rng) for look in looks])
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50, (steps - step) / (0.3 * steps))
        loss = reader.loss(encoder(ids, mask).last_hidden_state, mask, looks)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())
