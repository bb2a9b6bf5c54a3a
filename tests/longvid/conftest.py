"""A tiny random model as a user has it on disk, and a storyboard that it renders in a moment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

STORY = """\
seed: 3
style: over a blue background
scenes:
  - {prompt: "a red circle moving left", for: 21f}
  - {prompt: "a blue square moving up", for: 1s}
"""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock diffusers WanPipeline folder of random weights: 8 fps, 32 x 48 pixels."""
    import diffusers
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "</s>", "<unk>", "a", "over", "red", "blue", "circle", "square", "moving", "left", "background"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    torch.manual_seed(0)
    pipeline = diffusers.WanPipeline(
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names),
        transformers.UMT5EncoderModel(
            transformers.UMT5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        ),
        diffusers.AutoencoderKLWan(
            base_dim=3,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=64,
        ),
    )
    transformers.utils.logging.disable_progress_bar()  # as the command line does, before it loads a model
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipeline.save_pretrained(folder)
    facts = {"fps": 8, "width": 32, "height": 48, "per_token_timesteps": True, "vocabulary": words[3:]}
    (folder / "longvid.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture
def story(tmp_path: Path) -> Path:
    """Two shots, 29 frames at 8 fps."""
    path = tmp_path / "story.yaml"
    path.write_text(STORY)
    return path
