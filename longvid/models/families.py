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
from longvid.models.cogvideox_sizes import cogvideox_sizes
from longvid.models.configs import Configs
from longvid.models.hunyuan_facts import HUNYUAN_PARTS, hunyuan_facts
from longvid.models.hunyuan_sizes import hunyuan_sizes
from longvid.models.ltx_facts import LTX_PARTS, ltx_facts
from longvid.models.ltx_sizes import ltx_sizes
from longvid.models.parts import PartNames
from longvid.models.sizes import Sizes
from longvid.models.wan_facts import WAN_PARTS, wan_facts
from longvid.models.wan_sizes import wan_sizes
from longvid.plan import ModelFacts
from longvid.settings import Settings
from longvid.sparsity.settings import Dense


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint. `module` holds ``open_family(configs, facts, pipeline) -> Checkpoint``.

    `pipelines` are the classes of diffusers that it comes as. `facts` raises InputError for what the family cannot run;
    `sizes` says what it takes and costs.
    """

    name: str
    pipelines: tuple[str, ...]
    facts: Callable[[Configs], ModelFacts]
    parts: PartNames
    sizes: Callable[[Configs], Sizes]
    module: str


FAMILIES = (
    Family(
        "wan",
        ("WanPipeline", "WanImageToVideoPipeline"),
        wan_facts,
        WAN_PARTS,
        wan_sizes,
        "longvid.models.wan_checkpoint",
    ),
    Family("ltx", ("LTXPipeline",), ltx_facts, LTX_PARTS, ltx_sizes, "longvid.models.ltx_checkpoint"),
    Family(
        "cogvideox",
        ("CogVideoXPipeline",),
        cogvideox_facts,
        COGVIDEOX_PARTS,
        cogvideox_sizes,
        "longvid.models.cogvideox_checkpoint",
    ),
    Family(
        "hunyuanvideo",
        ("HunyuanVideoPipeline",),
        hunyuan_facts,
        HUNYUAN_PARTS,
        hunyuan_sizes,
        "longvid.models.hunyuan_checkpoint",
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


def read_sizes(configs: Configs) -> Sizes:
    """What a checkpoint's parts take and cost. Raises InputError for configs that lack something."""
    family = family_of(configs)
    try:
        return family.sizes(configs)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{configs.place}: its config files lack what sizes are computed from ({error})") from None


def known_sizes(configs: Configs) -> Sizes | None:
    """The same; None where it is not known of such a checkpoint."""
    try:
        return read_sizes(configs)
    except InputError:
        return None


def require(facts: ModelFacts, settings: Settings, cache: CachePlan) -> None:
    """Refuse settings that the model's family cannot serve, before weights are loaded. Raises InputError."""
    if not isinstance(settings.attention, Dense):
        require_sparse(facts, f"attention.policy must be dense, not {settings.attention.policy}")
    if facts.joint_text:
        _require_joint(facts, settings)
    if cache.regions:
        _require_regions(facts, settings)
    _require_rows(facts, settings)
    if not settings.recomputes_left and not facts.relative_positions:
        reason = "adds positions to its tokens, so K/V cannot be read at another position"
        raise InputError(f"queue.left must be recompute, not cached: {facts.name} {reason}")
    if settings.sampler.embedded_guidance is not None and not facts.embedded_guidance:
        raise InputError(f"sampler.embedded_guidance is of models distilled for it, which {facts.name} is not")
    if facts.boundary_ratio is None:
        if settings.sampler.guidance_low is not None:
            raise InputError(f"sampler.guidance_low is of models with two experts, and {facts.name} has one")
    elif cache.is_inside or not isinstance(settings.cache, NoCache):
        is_plain = isinstance(settings.cache, NoCache)
        what = "negative_every must be 1" if is_plain else f"policy must be none, not {settings.cache.policy}"
        reason = "a forecast would go on with one's velocities where the other takes over"
        raise InputError(f"cache.{what}: {facts.name} has two experts, and {reason}")


def _require_joint(facts: ModelFacts, settings: Settings) -> None:
    """Refuse what cannot be where layers take text and video together."""
    if settings.cache.is_of_modules:
        raise InputError(
            f"cache.policy {settings.cache.policy}: layers of {facts.family} models take text and video together, so "
            "they are left out whole, not module by module: use cache.level output or last_layer, and no table"
        )
    if settings.sequence.backend == "xfuser":
        reason = f"has no attention in which text asks, too, as in {facts.family} models"
        raise InputError(f"sequence.backend must be longvid or deepspeed: xfuser {reason}")


def _require_rows(facts: ModelFacts, settings: Settings) -> None:
    if settings.memory.vae_rows and facts.family != "wan":
        raise InputError(f"memory.vae_rows must be 0: the VAE of {facts.family} models does not work row by row")
    if settings.mesh.decode == "rows" and facts.family != "wan":
        raise InputError(f"mesh.decode=rows: the VAE of {facts.family} models does not work row by row: leave it out")
    if settings.mesh.decode == "rows" and settings.memory.vae_rows:
        raise InputError("mesh.decode=rows gives each rank its rows of a latent at once: memory.vae_rows must be 0")


def _require_regions(facts: ModelFacts, settings: Settings) -> None:
    """Refuse a cache that leaves tokens out where they cannot be."""
    if facts.family != "wan":
        raise InputError(f"cache.policy ras is for Wan models, and {facts.name} is of the family {facts.family}")
    if settings.schedule == "chunks":
        raise InputError("cache.policy ras is for the queue and for whole shots, not for schedule=chunks")
    if not isinstance(settings.attention, Dense):
        raise InputError(
            f"cache.policy ras leaves tokens out: use attention.policy=dense, not {settings.attention.policy}"
        )


def require_sparse(facts: ModelFacts, what: str) -> None:
    """Refuse `what` for a model whose attention must be dense. Raises InputError."""
    if facts.boundary_ratio is not None:
        reason = "what a policy learns of one's attention does not hold for the other's"
        raise InputError(f"{what}: {facts.name} has two experts, and {reason}")
