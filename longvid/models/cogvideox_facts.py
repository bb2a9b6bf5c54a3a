"""What planning needs to know of a CogVideoX checkpoint: 2B, 5B and 1.5."""

from __future__ import annotations

from longvid.errors import InputError
from longvid.geometry import DecoderPasses, LatentGrid
from longvid.models.configs import Configs
from longvid.models.parts import PartNames
from longvid.plan import ModelFacts

UNBOUNDED = 1 << 20
"""Latents: rotary and sine positions can be computed for any number."""

COGVIDEOX_PARTS = PartNames(
    "transformer_blocks", first=frozenset({"patch_embed"}), last=frozenset({"norm_final", "norm_out", "proj_out"})
)


def cogvideox_facts(configs: Configs) -> ModelFacts:
    """Facts of a ``CogVideoXPipeline``. Raises InputError for one that cannot be run.

    CogVideoX 1.5 has tokens of two VAE latents (`patch_size_t`): for the engine the two are one latent of twice the
    channels, which holds twice the frames; a shot's first two hold one frame, since the first of them is padding that
    is never decoded. The other models decode an odd number of latents a shot.
    """
    extra, vae, transformer = configs.extra, configs.of("vae"), configs.of("transformer")
    together = transformer.get("patch_size_t") or 1
    if together > 2 or transformer.get("ofs_embed_dim") is not None:
        raise InputError(f"{configs.place}: is not a text-to-video CogVideoX (2B, 5B or 1.5) that longvid runs")
    if transformer.get("use_learned_positional_embeddings"):
        raise InputError(f"{configs.place}: has learned positions, which belong to image-to-video models")
    if transformer["in_channels"] != vae["latent_channels"]:
        channels = f"{vae['latent_channels']} as its VAE says, not {transformer['in_channels']}"
        raise InputError(f"{configs.place}: in_channels of its transformer must be {channels}")
    temporal, spatial = int(vae.get("temporal_compression_ratio", 4)), 2 ** (len(vae["block_out_channels"]) - 1)
    patch, sample = int(transformer["patch_size"]), (transformer["sample_width"], transformer["sample_height"])
    size = (int(sample[0]) * spatial, int(sample[1]) * spatial)
    rotary = bool(transformer["use_rotary_positional_embeddings"])
    return ModelFacts(
        name=configs.name,
        family="cogvideox",
        grid=LatentGrid(temporal * together, spatial, (1, patch, patch), odd=together == 1),
        latent_channels=int(vae["latent_channels"]) * together,
        num_layers=int(transformer["num_layers"]),
        fps=float(extra.get("fps", 16 if together > 1 else 8)),
        width=int(extra.get("width", size[0])),
        height=int(extra.get("height", size[1])),
        per_token_timesteps=False,
        max_latents=UNBOUNDED,
        num_heads=int(transformer["num_attention_heads"]),
        hidden_size=int(transformer["num_attention_heads"]) * int(transformer["attention_head_dim"]),
        joint_text=True,
        goes_on=False,
        # Three of the VAE's latents, then two at a time. Of pairs the first has one, for the other is padding.
        decoder_passes=DecoderPasses(2, 1, 1) if together > 1 else DecoderPasses(3, 2, 2),
        relative_positions=rotary,
        max_size=size if together > 1 else None,
    )
