"""What planning needs to know of a Wan checkpoint: 2.1 and 2.2, from text or from an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from longvid.errors import InputError
from longvid.geometry import LatentGrid
from longvid.models.configs import Configs
from longvid.models.parts import PartNames
from longvid.plan import ModelFacts

PATCH = (1, 2, 2)

_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "add_k_proj": "k_img", "add_v_proj": "v_img"}
_ORIGINAL_NAMES = {
    **{f"attn1.{ours}": f"self_attn.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"attn2.{ours}": f"cross_attn.{theirs}" for ours, theirs in _ATTENTION.items()},
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "proj_out": "head.head",
    "condition_embedder.time_proj": "time_projection.1",
    **{f"condition_embedder.{kind}_embedder.linear_1": f"{kind}_embedding.0" for kind in ("text", "time")},
    **{f"condition_embedder.{kind}_embedder.linear_2": f"{kind}_embedding.2" for kind in ("text", "time")},
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
}

WAN_PARTS = PartNames(
    "blocks",
    first=frozenset({"patch_embedding"}),
    last=frozenset({"proj_out", "scale_shift_table", "norm_out"}),
    original=_ORIGINAL_NAMES,
)


def wan_facts(configs: Configs) -> ModelFacts:
    """Facts of a ``WanPipeline`` or a ``WanImageToVideoPipeline``. Raises InputError for one that cannot be run.

    `expand_timesteps` is of Wan 2.2 TI2V: a timestep a token, and a first latent that an image may give. With
    `transformer_2` (Wan 2.2 A14B) there are two experts, and `boundary_ratio` says at which noise level they change.
    """
    index, extra, vae = configs.index, configs.extra, configs.of("vae")
    if not configs.has("transformer"):
        raise InputError(f"{configs.place}: has no transformer")
    transformer = configs.of("transformer")
    grid = LatentGrid(vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8), PATCH)
    _check(configs, transformer, vae, grid)
    per_token = bool(index.get("expand_timesteps", False))
    words = extra.get("vocabulary")
    return ModelFacts(
        name=configs.name,
        family="wan",
        grid=grid,
        latent_channels=int(vae["z_dim"]),
        num_layers=int(transformer["num_layers"]),
        fps=float(extra.get("fps", 24 if per_token else 16)),
        width=int(extra.get("width", 1280 if per_token else 832)),
        height=int(extra.get("height", 704 if per_token else 480)),
        per_token_timesteps=bool(extra.get("per_token_timesteps", per_token)),
        max_latents=int(transformer["rope_max_seq_len"]),
        vocabulary=frozenset(words) if words else None,
        num_heads=int(transformer["num_attention_heads"]),
        hidden_size=int(transformer["num_attention_heads"]) * int(transformer["attention_head_dim"]),
        boundary_ratio=_boundary(configs, transformer),
        image=_image(configs),
        decoder_parts=1 + len(vae["dim_mult"]),
    )


def _image(configs: Configs) -> Literal["none", "optional", "required"]:
    if configs.pipeline == "WanImageToVideoPipeline":
        return "required"
    return "optional" if configs.index.get("expand_timesteps") else "none"


def _boundary(configs: Configs, transformer: Mapping[str, Any]) -> float | None:
    """At which share of the noise levels the second transformer takes over; None: there is one alone."""
    ratio = configs.index.get("boundary_ratio")
    if not configs.has("transformer_2"):
        if ratio is not None:
            raise InputError(f"{configs.place}: its boundary_ratio is {ratio}, but it has no transformer_2")
        return None
    if not isinstance(ratio, float | int) or not 0 < ratio < 1:
        raise InputError(f"{configs.place}: two transformers need a boundary_ratio between 0 and 1, not {ratio!r}")
    second = configs.of("transformer_2")
    for key in ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "patch_size"):
        a, b = (list(value) if isinstance(value := x[key], tuple) else value for x in (transformer, second))
        if a != b:
            raise InputError(f"{configs.place}: {key} of its two transformers must be equal, not {a} and {b}")
    return float(ratio)


def _check(configs: Configs, transformer: Mapping[str, Any], vae: Mapping[str, Any], grid: LatentGrid) -> None:
    """That the parts fit each other, and longvid."""
    if tuple(transformer["patch_size"]) != PATCH:
        raise InputError(f"{configs.place}: a patch_size of {transformer['patch_size']}: longvid runs {list(PATCH)}")
    if transformer.get("pos_embed_seq_len") is not None:
        raise InputError(f"{configs.place}: is made for a first and a last image, which longvid cannot run yet")
    channels = vae["z_dim"]
    joined = configs.pipeline == "WanImageToVideoPipeline" and not configs.index.get("expand_timesteps")
    expected = 2 * channels + grid.temporal if joined else channels
    if transformer["in_channels"] != expected:
        parts = f"{channels} latent + {grid.temporal} mask + {channels} image channels" if joined else "the VAE's z_dim"
        given = transformer["in_channels"]
        raise InputError(f"{configs.place}: in_channels of its transformer must be {expected} ({parts}), not {given}")
