"""What planning needs to know of an LTX-Video checkpoint."""

from __future__ import annotations

from longvid.errors import InputError
from longvid.geometry import DecoderPasses, LatentGrid
from longvid.models.configs import Configs
from longvid.models.parts import PartNames
from longvid.plan import ModelFacts

UNBOUNDED = 1 << 20
"""Latents: rotary positions are computed for any time."""

LTX_PASSES = DecoderPasses(first=3, step=1, window=3)
"""The stock VAE's tiles, decoded framewise: 17 frames, of which 8 are new."""

LTX_PARTS = PartNames(
    "transformer_blocks", first=frozenset({"proj_in"}), last=frozenset({"scale_shift_table", "norm_out", "proj_out"})
)


def ltx_facts(configs: Configs) -> ModelFacts:
    """Facts of an ``LTXPipeline``. Raises InputError for one that cannot be run."""
    extra, vae, transformer = configs.extra, configs.of("vae"), configs.of("transformer")
    if (transformer["patch_size"], transformer["patch_size_t"]) != (1, 1):
        sizes = f"{transformer['patch_size']} and {transformer['patch_size_t']}"
        raise InputError(f"{configs.place}: patch_size and patch_size_t of {sizes}: longvid runs 1 and 1")
    if transformer["in_channels"] != vae["latent_channels"]:
        channels = f"{vae['latent_channels']} as its VAE says, not {transformer['in_channels']}"
        raise InputError(f"{configs.place}: in_channels of its transformer must be {channels}")
    halvings = 2 ** sum(vae["spatio_temporal_scaling"])
    temporal = vae.get("temporal_compression_ratio") or vae["patch_size_t"] * halvings
    spatial = vae.get("spatial_compression_ratio") or vae["patch_size"] * halvings
    return ModelFacts(
        name=configs.name,
        family="ltx",
        grid=LatentGrid(int(temporal), int(spatial), (1, 1, 1)),
        latent_channels=int(vae["latent_channels"]),
        num_layers=int(transformer["num_layers"]),
        fps=float(extra.get("fps", 25)),
        width=int(extra.get("width", 704)),
        height=int(extra.get("height", 512)),
        per_token_timesteps=True,
        max_latents=UNBOUNDED,
        num_heads=int(transformer["num_attention_heads"]),
        hidden_size=int(transformer["num_attention_heads"]) * int(transformer["attention_head_dim"]),
        goes_on=False,
        decoder_passes=LTX_PASSES,
    )
