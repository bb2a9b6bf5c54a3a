"""Where the tokens of an attention are in the film: what static layouts are made from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from longvid.plan import ModelFacts, Plan
from longvid.settings import Settings


@dataclass(frozen=True)
class TokenMap:
    """Queries and keys of one attention: latents in film order, row by row, with text before or behind them.

    `queries` and `keys` are true latent positions; keys hold the queries' latents and the neighbours' context around
    them. `own` are the positions that the chunk owns: the others are context, which every layout keeps whole. Text
    (`text_before`, `text_behind` tokens, in queries and keys alike) is of models with joint attention, always visible.
    """

    queries: range
    keys: range
    own: range
    height: int
    width: int
    text_before: int = 0
    text_behind: int = 0

    @property
    def per_latent(self) -> int:
        """Tokens of a latent."""
        return self.height * self.width

    @property
    def num_text(self) -> int:
        return self.text_before + self.text_behind

    @property
    def num_queries(self) -> int:
        return len(self.queries) * self.per_latent + self.num_text

    @property
    def num_keys(self) -> int:
        return len(self.keys) * self.per_latent + self.num_text

    def moved(self, latents: int) -> TokenMap:
        """The same tokens so many latents later in the film."""
        spans = (self.queries, self.keys, self.own)
        queries, keys, own = (range(x.start + latents, x.stop + latents) for x in spans)
        return replace(self, queries=queries, keys=keys, own=own)


def largest_tokens(plan: Plan, settings: Settings, facts: ModelFacts) -> TokenMap:
    """The tokens of the plan's largest unit."""
    chunk = max(plan.chunks, key=lambda chunk: chunk.num_left + chunk.num_latents + chunk.num_right)
    width, height = facts.grid.latent_size(plan.width, plan.height)
    _, rows, columns = facts.grid.patch
    stop, first = chunk.start + chunk.num_latents, chunk.start - chunk.num_left
    queries = range(first if settings.recomputes_left else chunk.start, stop)
    own = range(chunk.start, stop)
    return TokenMap(queries, range(first, stop + chunk.num_right), own, height // rows, width // columns)
