"""Tiny random pipelines in the real format, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors


def _tokenizer() -> Any:
    words = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "circle", "square", "moving", "left", "right", "cat"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)


def make_pipeline(scheduler: Any) -> diffusers.WanPipeline:
    torch.manual_seed(0)
    text = transformers.UMT5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.5, 2.0, 1.0],
    )
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=64,
    )
    return diffusers.WanPipeline(_tokenizer(), transformers.UMT5EncoderModel(text), vae, scheduler, transformer)


@pytest.fixture(scope="session")
def euler_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "euler"
    make_pipeline(diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def unipc_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "unipc"
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    make_pipeline(scheduler).save_pretrained(path)
    return path


def make_wan(
    kind: type[diffusers.DiffusionPipeline] = diffusers.WanPipeline,
    *,
    vae: dict[str, Any],
    in_channels: int = 4,
    **options: Any,
) -> Any:
    """A tiny Wan 2.2 (or with `image_dim` 2.1) pipeline; norms and gates are random, so that every part matters."""

    def transformer() -> Any:
        return diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=in_channels,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=3,
            rope_max_seq_len=64,
            **({"image_dim": 16, "added_kv_proj_dim": 24} if "image_encoder" in options else {}),
        )

    torch.manual_seed(1)
    text = transformers.UMT5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    second = transformer() if options.get("boundary_ratio") else None
    return kind(
        tokenizer=_tokenizer(),
        text_encoder=transformers.UMT5EncoderModel(text),
        vae=diffusers.AutoencoderKLWan(
            base_dim=3,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 0.5, 2.0, 1.0],
            **vae,
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformer(),
        transformer_2=second,
        **options,
    )


def _clip() -> dict[str, Any]:
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    processor = transformers.CLIPImageProcessor(size=28, crop_size=28)
    return {"image_encoder": transformers.CLIPVisionModel(config), "image_processor": processor}


def make_cogvideox(scheduler: Any, vae: dict[str, Any] | None = None, **options: Any) -> Any:
    """A tiny CogVideoX: 2B with DDIM and sine positions, 5B with DPM and rotary ones, 1.5 with `patch_size_t`."""
    torch.manual_seed(2)
    text = transformers.T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return diffusers.CogVideoXPipeline(
        tokenizer=_tokenizer(),
        text_encoder=transformers.T5EncoderModel(text),
        vae=diffusers.AutoencoderKLCogVideoX(
            latent_channels=4, block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2, **(vae or {})
        ),
        scheduler=scheduler,
        transformer=diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=16,
            num_layers=3,
            sample_width=8,
            sample_height=12,
            sample_frames=9,
            max_text_seq_length=16,
            **options,
        ),
    )


def make_ltx(**vae: Any) -> Any:
    """A tiny LTX-Video; since 0.9.1 its decoder takes a timestep."""
    torch.manual_seed(3)
    text = transformers.T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    pipeline = diffusers.LTXPipeline(
        tokenizer=_tokenizer(),
        text_encoder=transformers.T5EncoderModel(text),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            shift_terminal=0.1,
        ),
        vae=diffusers.AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4,
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 5,
            **vae,
        ),
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=10,
            cross_attention_dim=20,
            num_layers=3,
            caption_channels=16,
        ),
    )
    pipeline.vae.latents_mean.copy_(torch.linspace(-1, 1, 8))
    pipeline.vae.latents_std.copy_(torch.linspace(0.5, 2, 8))
    return pipeline


def make_hunyuan() -> Any:
    """A tiny HunyuanVideo: one dual layer and two single ones, a causal language model and CLIP for text."""
    torch.manual_seed(4)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 64}
    llama = transformers.LlamaConfig(num_hidden_layers=4, num_key_value_heads=2, **small)
    clip = transformers.CLIPTextConfig(num_hidden_layers=2, eos_token_id=1, **small)
    return diffusers.HunyuanVideoPipeline(
        text_encoder=transformers.LlamaModel(llama),
        tokenizer=_tokenizer(),
        text_encoder_2=transformers.CLIPTextModel(clip),
        tokenizer_2=_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2
        ),
        transformer=diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_single_layers=2,
            num_refiner_layers=1,
            text_embed_dim=16,
            pooled_projection_dim=16,
            rope_axes_dim=(4, 2, 2),
        ),
    )


V = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
ROTARY = {"use_rotary_positional_embeddings": True}
VAE_2_2 = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
I2V = diffusers.WanImageToVideoPipeline
MAKERS: dict[str, Callable[[], Any]] = {
    "ti2v": lambda: make_wan(vae=VAE_2_2, expand_timesteps=True),
    "a14b": lambda: make_wan(vae={}, boundary_ratio=0.8),
    "i2v 2.1": lambda: make_wan(I2V, vae={}, in_channels=12, **_clip()),
    "i2v 2.2": lambda: make_wan(I2V, vae={}, in_channels=12, boundary_ratio=0.8),
    "ltx": make_ltx,
    "ltx 0.9.1": lambda: make_ltx(timestep_conditioning=True),
    "hunyuan": make_hunyuan,
    "cogvideox 2b": lambda: make_cogvideox(diffusers.CogVideoXDDIMScheduler(**V)),
    "cogvideox 5b": lambda: make_cogvideox(
        diffusers.CogVideoXDPMScheduler(**V, snr_shift_scale=1.0), {"scaling_factor": 0.7}, **ROTARY
    ),
    "cogvideox 1.5": lambda: make_cogvideox(
        diffusers.CogVideoXDPMScheduler(**V, snr_shift_scale=1.0), patch_size_t=2, patch_bias=False, **ROTARY
    ),
}


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny checkpoint of MAKERS, in shards where it has more than one layer's weights."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("families") / name.replace(" ", "-")
            MAKERS[name]().save_pretrained(made[name], max_shard_size="40KB")
            (made[name] / "longvid.json").write_text('{"fps": 8, "width": 64, "height": 64}')
        return made[name]

    return get
