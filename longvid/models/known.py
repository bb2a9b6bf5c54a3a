"""Configs of published checkpoints, so that a film can be planned for them before anything is downloaded.

Only what sizes, facts and costs depend on is here, under the names of the files in the checkpoints' directories. Every
table is of the checkpoint's own repository on huggingface.co, which its first comment names.
"""

from __future__ import annotations

from typing import Any

from longvid.models.configs import Configs

_UMT5_XXL = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
_T5_XXL = {**_UMT5_XXL, "vocab_size": 32128}

_WAN_VAE = {
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
}
_WAN22_VAE = {
    **_WAN_VAE,
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}


def _wan(heads: int, layers: int, inner: int, channels: int = 16) -> dict[str, Any]:
    return {
        "patch_size": [1, 2, 2],
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "in_channels": channels,
        "out_channels": channels,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": inner,
        "num_layers": layers,
        "cross_attn_norm": True,
        "rope_max_seq_len": 1024,
    }


def _cogvideox(heads: int, layers: int, **other: Any) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "attention_head_dim": 64,
        "in_channels": 16,
        "out_channels": 16,
        "time_embed_dim": 512,
        "text_embed_dim": 4096,
        "num_layers": layers,
        "sample_width": 90,
        "sample_height": 60,
        "sample_frames": 49,
        "patch_size": 2,
        "max_text_seq_length": 226,
        "use_rotary_positional_embeddings": True,
        **other,
    }


_COGVIDEOX_VAE = {
    "block_out_channels": [128, 256, 256, 512],
    "latent_channels": 16,
    "layers_per_block": 3,
    "temporal_compression_ratio": 4,
}

_WAN_INDEX = {"_class_name": "WanPipeline"}
_SIZE_720P = {"width": 1280, "height": 720}

_MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]]]] = {
    # Wan-AI/Wan2.1-T2V-1.3B-Diffusers
    "Wan2.1-T2V-1.3B": (
        _WAN_INDEX,
        {},
        {"transformer": _wan(12, 30, 8960), "vae": _WAN_VAE, "text_encoder": _UMT5_XXL},
    ),
    # Wan-AI/Wan2.1-T2V-14B-Diffusers
    "Wan2.1-T2V-14B": (
        _WAN_INDEX,
        _SIZE_720P,
        {"transformer": _wan(40, 40, 13824), "vae": _WAN_VAE, "text_encoder": _UMT5_XXL},
    ),
    # Wan-AI/Wan2.2-T2V-A14B-Diffusers
    "Wan2.2-T2V-A14B": (
        {**_WAN_INDEX, "boundary_ratio": 0.875},
        _SIZE_720P,
        {
            "transformer": _wan(40, 40, 13824),
            "transformer_2": _wan(40, 40, 13824),
            "vae": _WAN_VAE,
            "text_encoder": _UMT5_XXL,
        },
    ),
    # Wan-AI/Wan2.2-TI2V-5B-Diffusers
    "Wan2.2-TI2V-5B": (
        {**_WAN_INDEX, "expand_timesteps": True},
        {},
        {"transformer": _wan(24, 30, 14336, 48), "vae": _WAN22_VAE, "text_encoder": _UMT5_XXL},
    ),
    # THUDM/CogVideoX-2b
    "CogVideoX-2b": (
        {"_class_name": "CogVideoXPipeline"},
        {},
        {
            "transformer": _cogvideox(30, 30, use_rotary_positional_embeddings=False),
            "vae": _COGVIDEOX_VAE,
            "text_encoder": _T5_XXL,
        },
    ),
    # THUDM/CogVideoX-5b
    "CogVideoX-5b": (
        {"_class_name": "CogVideoXPipeline"},
        {},
        {"transformer": _cogvideox(48, 42), "vae": _COGVIDEOX_VAE, "text_encoder": _T5_XXL},
    ),
    # THUDM/CogVideoX1.5-5B; rotary positions are made for 300 x 300 and cut, films are of 1360 x 768
    "CogVideoX1.5-5B": (
        {"_class_name": "CogVideoXPipeline"},
        {"width": 1360, "height": 768},
        {
            "transformer": _cogvideox(
                48, 42, patch_size_t=2, patch_bias=False, sample_width=300, sample_height=300, sample_frames=81
            ),
            "vae": _COGVIDEOX_VAE,
            "text_encoder": _T5_XXL,
        },
    ),
    # Lightricks/LTX-Video (0.9.0)
    "LTX-Video": (
        {"_class_name": "LTXPipeline"},
        {},
        {
            "transformer": {
                "num_attention_heads": 32,
                "attention_head_dim": 64,
                "in_channels": 128,
                "out_channels": 128,
                "patch_size": 1,
                "patch_size_t": 1,
                "cross_attention_dim": 2048,
                "caption_channels": 4096,
                "num_layers": 28,
            },
            "vae": {
                "latent_channels": 128,
                "block_out_channels": [128, 256, 512, 512],
                "decoder_block_out_channels": [128, 256, 512, 512],
                "layers_per_block": [4, 3, 3, 3, 4],
                "decoder_layers_per_block": [4, 3, 3, 3, 4],
                "spatio_temporal_scaling": [True, True, True, False],
                "decoder_spatio_temporal_scaling": [True, True, True, False],
                "patch_size": 4,
                "patch_size_t": 1,
            },
            "text_encoder": _T5_XXL,
        },
    ),
    # hunyuanvideo-community/HunyuanVideo
    "HunyuanVideo": (
        {"_class_name": "HunyuanVideoPipeline"},
        {**_SIZE_720P, "fps": 24},
        {
            "transformer": {
                "num_attention_heads": 24,
                "attention_head_dim": 128,
                "in_channels": 16,
                "out_channels": 16,
                "num_layers": 20,
                "num_single_layers": 40,
                "num_refiner_layers": 2,
                "mlp_ratio": 4.0,
                "patch_size": 2,
                "patch_size_t": 1,
                "guidance_embeds": True,
                "text_embed_dim": 4096,
                "pooled_projection_dim": 768,
                "rope_axes_dim": [16, 56, 56],
            },
            "vae": {
                "block_out_channels": [128, 256, 512, 512],
                "latent_channels": 16,
                "layers_per_block": 2,
                "mid_block_add_attention": True,
                "spatial_compression_ratio": 8,
                "temporal_compression_ratio": 4,
            },
            "text_encoder": {
                "vocab_size": 128320,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
            },
            "text_encoder_2": {
                "vocab_size": 49408,
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "max_position_embeddings": 77,
            },
        },
    ),
}

KNOWN = tuple(_MODELS)
"""Names of the checkpoints whose configs are here."""


def known_configs(name: str) -> Configs:
    """The configs of a checkpoint of `KNOWN`."""
    index, extra, parts = _MODELS[name]
    present = {part: ["diffusers", part] for part in parts}
    return Configs(name, {**present, **index}, extra, loaded=parts)
