"""What planning needs to know of a HunyuanVideo checkpoint."""

from __future__ import annotations

from longvid.errors import InputError
from longvid.geometry import DecoderPasses, LatentGrid
from longvid.models.configs import Configs
from longvid.models.parts import PartNames
from longvid.plan import ModelFacts

UNBOUNDED = 1 << 20
"""Latents: rotary positions are computed for any number."""

HUNYUAN_PASSES = DecoderPasses(first=5, step=3, window=5)
"""The stock VAE's tiles: 17 frames, of which the last 5 are blended with the next tile's."""

HUNYUAN_PARTS = PartNames(
    "transformer_blocks",
    first=frozenset({"x_embedder", "context_embedder"}),
    last=frozenset({"norm_out", "proj_out"}),
    behind="single_transformer_blocks",
)


def hunyuan_facts(configs: Configs) -> ModelFacts:
    """Facts of a ``HunyuanVideoPipeline``. Raises InputError for one that cannot be run.

    Layers with weights of their own for text come first, then those in which text and video share weights.
    """
    extra, vae, transformer = configs.extra, configs.of("vae"), configs.of("transformer")
    patch = int(transformer["patch_size"])
    if transformer["patch_size_t"] != 1:
        raise InputError(f"{configs.place}: a patch_size_t of {transformer['patch_size_t']}: longvid runs 1")
    if transformer.get("image_condition_type") is not None:
        raise InputError(f"{configs.place}: is an image-to-video HunyuanVideo; longvid runs the one from text")
    if transformer["in_channels"] != vae["latent_channels"]:
        channels = f"{vae['latent_channels']} as its VAE says, not {transformer['in_channels']}"
        raise InputError(f"{configs.place}: in_channels of its transformer must be {channels}")
    heads, head_dim = int(transformer["num_attention_heads"]), int(transformer["attention_head_dim"])
    if sum(transformer["rope_axes_dim"]) != head_dim:
        axes = f"{list(transformer['rope_axes_dim'])} must add up to its attention_head_dim, {head_dim}"
        raise InputError(f"{configs.place}: rope_axes_dim of its transformer, {axes}")
    dual = int(transformer["num_layers"])
    return ModelFacts(
        name=configs.name,
        family="hunyuanvideo",
        grid=LatentGrid(
            int(vae["temporal_compression_ratio"]), int(vae["spatial_compression_ratio"]), (1, patch, patch)
        ),
        latent_channels=int(vae["latent_channels"]),
        num_layers=dual + int(transformer["num_single_layers"]),
        fps=float(extra.get("fps", 24)),
        width=int(extra.get("width", 1280)),
        height=int(extra.get("height", 720)),
        per_token_timesteps=False,
        max_latents=UNBOUNDED,
        num_heads=heads,
        hidden_size=heads * head_dim,
        joint_text=True,
        goes_on=False,
        dual_layers=dual,
        decoder_passes=HUNYUAN_PASSES,
        embedded_guidance=bool(transformer["guidance_embeds"]),
    )
