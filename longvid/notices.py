"""What people are told before a film begins."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from longvid.models.prompts import unknown_words
from longvid.parallel.partition import Costs
from longvid.plan import ModelFacts, Plan
from longvid.settings import Settings
from longvid.sparsity.runtime import SparseRuntime
from longvid.sparsity.tokens import largest_tokens


def notices(
    plan: Plan,
    settings: Settings,
    facts: ModelFacts,
    attention: SparseRuntime | None,
    costs: Costs | None,
    device: torch.device,
) -> Iterator[str]:
    """Of words that the model does not know, of settings that do nothing, of sizes that it was not trained for."""
    if costs and (at := costs.measured_at):
        yield f"layers are dealt out by what they take at {at[0]}x{at[1]}, scaled by operations to the model's size"
    for scene in plan.scenes:
        if not_known := unknown_in(plan.prompts[scene.prompt], facts):
            place = f"line {scene.line}: " if scene.line else ""
            if plan.joined:
                place = f"film {1 + plan.film_of(plan.chunks[plan.shots[scene.shot].first_chunk])}, {place}"
            yield f"{place}{not_known}"
    if any(plan.negatives) and settings.sampler.num_branches == 1:
        yield "negative prompts do nothing without guidance: set sampler.guidance above 1"
    if attention:
        tokens = largest_tokens(plan, settings, facts)
        if not attention.pays(tokens, device):
            name, count = settings.attention.policy, tokens.num_keys
            yield f"attention.policy: {name} would be slower than dense attention to {count} tokens: it stays dense"
    if facts.vocabulary is not None and (plan.width, plan.height) != (facts.width, facts.height):
        native = f"{facts.width}x{facts.height}"
        yield f"the model was trained at {native}; {plan.width}x{plan.height} may look wrong"


def unknown_in(prompt: str, facts: ModelFacts) -> str:
    """What to tell of a prompt's words that the model does not know; nothing, where it knows all or nobody can say."""
    unknown = unknown_words(prompt, facts.vocabulary) if facts.vocabulary is not None else {}
    hints = (f"{word!r}" + (f" (nearest: {near!r})" if near else "") for word, near in unknown.items())
    return f"the model does not know {', '.join(hints)}" if unknown else ""
