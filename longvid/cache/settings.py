"""Settings of caches: which steps of a chunk are computed, and how the others are forecast. Pure."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field

from longvid.document import Section, with_policy


class NoCache(Section):
    """Every step is computed."""

    policy: Literal["none"] = "none"

    def forecast_steps(self, num_steps: int) -> frozenset[int]:
        return frozenset()


class TaylorSeer(Section):
    """TaylorSeer: every `interval`-th step is computed, the others are a Taylor series of `order` over those.

    The first `first_steps` and the last step are always computed.
    """

    policy: Literal["taylorseer"]
    interval: Annotated[int, Field(ge=1, le=100)] = 5
    order: Annotated[int, Field(ge=0, le=4)] = 1
    first_steps: Annotated[int, Field(ge=1, le=1000)] = 3

    def forecast_steps(self, num_steps: int) -> frozenset[int]:
        """The steps that are not computed."""
        between = range(self.first_steps, num_steps - 1)
        return frozenset(k for k in between if (k - self.first_steps + 1) % self.interval)


class StaticTable(Section):
    """The steps that are computed, one by one; the others are forecast like TaylorSeer's."""

    policy: Literal["static"]
    computed: Annotated[tuple[Annotated[int, Field(ge=0, le=999)], ...], Field(strict=False, min_length=1)]
    order: Annotated[int, Field(ge=0, le=4)] = 0

    def forecast_steps(self, num_steps: int) -> frozenset[int]:
        """The steps that are not computed. The first and the last always are."""
        return frozenset(range(1, num_steps - 1)) - frozenset(self.computed)


POLICIES = ("none", "taylorseer", "static")


def _with_policy(data: Any) -> Any:
    return with_policy(data, "none", POLICIES)


CacheSettings = Annotated[NoCache | TaylorSeer | StaticTable, Discriminator("policy"), BeforeValidator(_with_policy)]
