"""The registry of model families: which pipelines the engine runs, chosen by what ``model_index.json`` says.

A family has two files. The first is pure and says what planning needs to know of a checkpoint (`facts`); the other,
named by `module`, opens its weights and is imported when that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from longvid.cache.plan import CachePlan
from longvid.cache.settings import NoCache
from longvid.errors import InputError
from longvid.models.cogvideox_facts import COGVIDEOX_PARTS, cogvideox_facts
from longvid.models.configs import Configs
from longvid.models.ltx_facts import LTX_PARTS, ltx_facts
from longvid.models.parts import PartNames
from longvid.models.wan_facts import WAN_PARTS, wan_facts
from longvid.plan import ModelFacts
from longvid.settings import Settings
from longvid.sparsity.settings import Dense


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint. `module` holds ``open_family(configs, facts, pipeline) -> Checkpoint``.

    `pipelines` are the classes of diffusers that it comes as. `facts` raises InputError for what the family cannot run.
    """

    name: str
    pipelines: tuple[str, ...]
    facts: Callable[[Configs], ModelFacts]
    parts: PartNames
    module: str


FAMILIES = (
    Family("wan", ("WanPipeline", "WanImageToVideoPipeline"), wan_facts, WAN_PARTS, "longvid.models.wan_checkpoint"),
    Family("ltx", ("LTXPipeline",), ltx_facts, LTX_PARTS, "longvid.models.ltx_checkpoint"),
    Family(
        "cogvideox", ("CogVideoXPipeline",), cogvideox_facts, COGVIDEOX_PARTS, "longvid.models.cogvideox_checkpoint"
    ),
)


def family_of(configs: Configs) -> Family:
    """The family of a checkpoint. Raises InputError for one that no family knows."""
    for family in FAMILIES:
        if configs.pipeline in family.pipelines:
            return family
    file = configs.root / "model_index.json" if configs.root else configs.name
    known = ", ".join(name for family in FAMILIES for name in family.pipelines)
    raise InputError(f"{file}: longvid cannot run a {configs.pipeline!r}; it runs {known}")


def read_facts(configs: Configs) -> ModelFacts:
    """What planning needs to know of a checkpoint. Raises InputError for one that cannot be run."""
    family = family_of(configs)
    try:
        return family.facts(configs)
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise InputError(
            f"{configs.place}: its config files lack what a {family.name} checkpoint has ({error})"
        ) from None


def require(facts: ModelFacts, settings: Settings, cache: CachePlan) -> None:
    """Refuse settings that the model's family cannot serve, before weights are loaded. Raises InputError."""
    if not isinstance(settings.attention, Dense):
        require_sparse(facts, f"attention.policy must be dense, not {settings.attention.policy}")
    if cache.is_inside and not facts.layer_caches:
        raise InputError(
            f"cache.policy {settings.cache.policy}: {facts.family} models leave out whole steps alone, not layers nor "
            "the negative's pass: use taylorseer or static, with cache.level=output and cache.negative_every=1"
        )
    if not settings.recomputes_left and not facts.relative_positions:
        reason = "adds positions to its tokens, so K/V cannot be read at another position"
        raise InputError(f"queue.left must be recompute, not cached: {facts.name} {reason}")
    if facts.boundary_ratio is None:
        if settings.sampler.guidance_low is not None:
            raise InputError(f"sampler.guidance_low is of models with two experts, and {facts.name} has one")
    elif cache.is_inside or not isinstance(settings.cache, NoCache):
        chosen, reason = (
            settings.cache.policy,
            "a forecast would go on with one's velocities where the other takes over",
        )
        raise InputError(f"cache.policy must be none, not {chosen}: {facts.name} has two experts, and {reason}")


def require_sparse(facts: ModelFacts, what: str) -> None:
    """Refuse `what` for a model whose attention must be dense. Raises InputError."""
    if not facts.sparse_attention:
        raise InputError(f"{what}: {facts.family} models run dense attention alone")
    if facts.boundary_ratio is not None:
        reason = "what a policy learns of one's attention does not hold for the other's"
        raise InputError(f"{what}: {facts.name} has two experts, and {reason}")
