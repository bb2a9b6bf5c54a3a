"""Prompts to text states, and what a small vocabulary does not know."""

from __future__ import annotations

import difflib
import html
from collections.abc import Sequence
from typing import Any

import ftfy
import torch
from torch import Tensor

MAX_TOKENS = 512


def clean(prompt: str) -> str:
    """Mend the encoding and white space, as the stock Wan pipeline does before it tokenizes."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return " ".join(text.split())


@torch.no_grad()
def encode_prompts(tokenizer: Any, encoder: Any, prompts: Sequence[str]) -> list[Tensor]:
    """Text states [n, E] of each prompt, n its tokens (at most 512); equal prompts share one tensor."""
    known: dict[str, Tensor] = {}
    for prompt in prompts:
        if prompt not in known:
            batch = tokenizer(clean(prompt), max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
            ids = batch.input_ids.to(encoder.device)
            known[prompt] = encoder(ids, batch.attention_mask.to(encoder.device)).last_hidden_state[0]
    return [known[prompt] for prompt in prompts]


def unknown_words(prompt: str, vocabulary: frozenset[str]) -> dict[str, str | None]:
    """Words that a closed vocabulary does not hold, each with the nearest one that it does."""
    words = clean(prompt).lower().replace(",", " ").replace(".", " ").split()
    nearest = {}
    for word in dict.fromkeys(words):
        if word not in vocabulary:
            matches = difflib.get_close_matches(word, sorted(vocabulary), n=1, cutoff=0.5)
            nearest[word] = matches[0] if matches else None
    return nearest
