"""Sizes and operations computed from configs are those of diffusers' own models, built on the meta device."""

import weakref

import diffusers
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from longvid.models.cogvideox_sizes import cogvideox_sizes
from longvid.models.hunyuan_sizes import hunyuan_sizes
from longvid.models.known import KNOWN, known_configs
from longvid.models.ltx_sizes import ltx_sizes
from longvid.models.parts import ModelPart
from longvid.models.quantize import is_quantized
from longvid.models.sizes import Tokens
from longvid.models.wan_sizes import wan_sizes

FAMILIES = {
    "WanPipeline": (wan_sizes, "WanTransformer3DModel", "AutoencoderKLWan", "UMT5"),
    "WanImageToVideoPipeline": (wan_sizes, "WanTransformer3DModel", "AutoencoderKLWan", "UMT5"),
    "CogVideoXPipeline": (cogvideox_sizes, "CogVideoXTransformer3DModel", "AutoencoderKLCogVideoX", "T5"),
    "LTXPipeline": (ltx_sizes, "LTXVideoTransformer3DModel", "AutoencoderKLLTXVideo", "T5"),
    "HunyuanVideoPipeline": (hunyuan_sizes, "HunyuanVideoTransformer3DModel", "AutoencoderKLHunyuanVideo", "Llama"),
}


def sizes_of(configs):
    return FAMILIES[configs.pipeline][0](configs)


def build(configs, part, **changes):
    """A part of the pipeline without memory for its weights."""
    kind = FAMILIES[configs.pipeline][1 if part == "transformer" else 2]
    with torch.device("meta"):
        return getattr(diffusers, kind)(**{**configs.of(part), **changes}).eval()


def build_text(configs):
    name = FAMILIES[configs.pipeline][3]
    model = getattr(transformers, "LlamaModel" if name == "Llama" else f"{name}EncoderModel")
    with torch.device("meta"):
        encoders = [model(getattr(transformers, f"{name}Config")(**configs.of("text_encoder")))]
        if configs.has("text_encoder_2"):
            config = transformers.CLIPTextConfig(**configs.of("text_encoder_2"))
            encoders.append(transformers.CLIPTextModel(config))
    return encoders


def count(*models):
    return sum(parameter.numel() for model in models for parameter in model.parameters())


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_are_exactly_those_of_the_published_models(name):
    configs = known_configs(name)
    sizes = sizes_of(configs)
    vae = build(configs, "vae")
    assert sizes.params == count(build(configs, "transformer"))
    assert sizes.vae.params == count(vae)
    quant = getattr(vae, "post_quant_conv", None)
    assert sizes.vae.decoder.params == count(vae.decoder, *([quant] if quant is not None else []))
    assert sizes.text_params == count(*build_text(configs))


IMAGE = {"image_dim": 1280, "added_kv_proj_dim": 5120, "in_channels": 36}


def test_parameters_of_an_image_model_are_exact_too():
    configs = known_configs("Wan2.1-T2V-14B")
    changed = type(configs)(
        "i2v",
        {**configs.index, "_class_name": "WanImageToVideoPipeline"},
        {},
        loaded={**configs.loaded, "transformer": {**configs.of("transformer"), **IMAGE}},
    )
    assert sizes_of(changed).params == count(build(configs, "transformer", **IMAGE))


@pytest.mark.parametrize("name", ["Wan2.1-T2V-1.3B", "CogVideoX-5b", "LTX-Video", "HunyuanVideo"])
def test_stages_hold_exactly_what_their_part_names_say(name):
    configs = known_configs(name)
    sizes, names = sizes_of(configs), PARTS[configs.pipeline].of(configs.of("transformer"))
    shapes = {key: value.numel() for key, value in build(configs, "transformer").named_parameters()}
    half = len(sizes.layers) // 3
    parts = [ModelPart(range(half), is_last=False), ModelPart(range(half, len(sizes.layers)), is_first=False)]
    for part in parts:
        assert sizes.part_params(part) == sum(size for key, size in shapes.items() if part.owns(key, names))


@pytest.mark.parametrize("name", ["Wan2.1-T2V-1.3B", "CogVideoX-5b", "LTX-Video", "HunyuanVideo"])
def test_weights_in_8_bits_are_those_that_quantizing_takes(name):
    configs = known_configs(name)
    sizes, model = sizes_of(configs), build(configs, "transformer")
    layers = [
        layer for key in PARTS[configs.pipeline].of(configs.of("transformer")).lists for layer in getattr(model, key)
    ]
    for ours, theirs in zip(sizes.layers, layers, strict=True):
        taken = sum(module.weight.numel() for key, module in theirs.named_modules() if is_quantized(module, key))
        assert ours.linear_params == taken
    held = sizes.held("int8")
    part = ModelPart(range(len(layers)))
    saved = sum(layer.linear_params for layer in sizes.layers[1:-1])
    assert sizes.part_bytes(part, 2) - held.part_bytes(part, 2) == saved
    assert sizes.part_bytes(part, 2) == 2 * sizes.part_params(part)


def parts_of_families():
    from longvid.models.families import FAMILIES as REGISTERED

    return {pipeline: family.parts for family in REGISTERED for pipeline in family.pipelines}


PARTS = parts_of_families()


def counted(run):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def meta(*shape, dtype=torch.float32):
    return torch.zeros(shape, device="meta", dtype=dtype)


FRAMES, ROWS, COLUMNS = 4, 12, 8
"""Of latents that are counted: their cells."""


def wan_pass(model, columns):
    latents = meta(1, model.config.in_channels, FRAMES, ROWS, COLUMNS)
    model(latents, meta(1, dtype=torch.long), meta(1, columns, model.config.text_dim))
    return FRAMES * ROWS * COLUMNS // 4


def cogvideox_pass(model, columns):
    tokens = FRAMES * ROWS * COLUMNS // 4 // (model.config.patch_size_t or 1)
    latents = meta(1, FRAMES, model.config.in_channels, ROWS, COLUMNS)
    rope = (meta(tokens, model.config.attention_head_dim),) * 2
    text = meta(1, columns, model.config.text_embed_dim)
    model(latents, text, meta(1, dtype=torch.long), image_rotary_emb=rope)
    return tokens


def ltx_pass(model, columns):
    tokens = FRAMES * ROWS * COLUMNS
    latents, text = meta(1, tokens, model.config.in_channels), meta(1, columns, model.config.caption_channels)
    where = {"num_frames": FRAMES, "height": ROWS, "width": COLUMNS}
    model(latents, text, meta(1, dtype=torch.long), meta(1, columns, dtype=torch.long), **where)
    return tokens


def hunyuan_pass(model, columns):
    latents = meta(1, model.config.in_channels, FRAMES, ROWS, COLUMNS)
    text, mask = meta(1, columns, model.config.text_embed_dim), meta(1, columns)
    pooled = meta(1, model.config.pooled_projection_dim)
    model(latents, meta(1, dtype=torch.long), text, mask, pooled, meta(1))
    return FRAMES * ROWS * COLUMNS // 4


PASSES = {
    "Wan2.1-T2V-1.3B": (wan_pass, {"num_layers": 2}),
    "Wan2.2-TI2V-5B": (wan_pass, {"num_layers": 2}),
    "CogVideoX-5b": (cogvideox_pass, {"num_layers": 2}),
    "CogVideoX1.5-5B": (cogvideox_pass, {"num_layers": 2}),
    "LTX-Video": (ltx_pass, {"num_layers": 2}),
    "HunyuanVideo": (hunyuan_pass, {"num_layers": 2, "num_single_layers": 3}),
}


@pytest.mark.parametrize("name", PASSES)
def test_operations_of_a_pass_are_those_that_torch_counts(name):
    run, changes = PASSES[name]
    configs = known_configs(name)
    shallow = type(configs)(
        name, configs.index, {}, loaded={**configs.loaded, "transformer": {**configs.of("transformer"), **changes}}
    )
    sizes, tokens = sizes_of(shallow), []
    model = build(shallow, "transformer")
    found = counted(lambda: tokens.append(run(model, sizes.text_columns)))
    assert sizes.pass_flops(Tokens(tokens[0], tokens[0], sizes.text_columns)).total == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("name", ["Wan2.1-T2V-1.3B", "Wan2.2-TI2V-5B", "CogVideoX-5b", "LTX-Video", "HunyuanVideo"])
def test_operations_of_decoding_are_those_that_torch_counts(name):
    configs = known_configs(name)
    vae, decoder = build(configs, "vae"), sizes_of(configs).vae.decoder
    latents = 3
    z = configs.of("vae").get("z_dim") or configs.of("vae")["latent_channels"]
    found = counted(lambda: vae.decode(meta(1, z, latents, ROWS, COLUMNS)))
    assert decoder.flops(ROWS * COLUMNS, latents, starts=True) == pytest.approx(found, rel=1e-2)


class LivePeak(TorchDispatchMode):
    """The most values of tensors made inside that are alive at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            storage = leaf.untyped_storage() if isinstance(leaf, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                key, size = storage._cdata, storage.nbytes() // leaf.element_size()
                self.known.add(key)
                weakref.finalize(storage, self.forget, key, size)
                self.now += size
                self.peak = max(self.peak, self.now)
        return out

    def forget(self, key, size):
        self.known.remove(key)
        self.now -= size


def cogvideox_decode(vae):
    """Three latents, then two at a time, as the stock decode does."""
    state, z = None, vae.config.latent_channels
    for count in (3, 2, 2):
        _, state = vae.decoder(meta(1, z, count, ROWS, COLUMNS), conv_cache=state)


def hunyuan_decode(vae):
    """A tile of five latents."""
    vae.decoder(meta(1, vae.config.latent_channels, 5, ROWS, COLUMNS))


@pytest.mark.parametrize(
    ("name", "decode"),
    [("CogVideoX-5b", cogvideox_decode), ("HunyuanVideo", hunyuan_decode)],
)
def test_what_a_decoder_holds_at_once_is_what_is_alive_in_it(name, decode):
    configs, cells = known_configs(name), ROWS * COLUMNS
    vae, sizes = build(configs, "vae"), sizes_of(configs).vae
    with LivePeak() as live, torch.no_grad():
        decode(vae)
    assert sizes.working_values(cells) + sizes.state_values(cells) == pytest.approx(live.peak, rel=0.1)


def test_hunyuan_video_at_720p_takes_the_published_600_pflop_of_which_500_are_attention():
    """129 frames are 33 x 45 x 80 = 118800 tokens. Counted as published: a multiplication and an addition are two,
    50 steps of one pass each (its guidance is embedded), 2 for scores and 2 for values a pair of tokens and channel."""
    sizes = hunyuan_sizes(known_configs("HunyuanVideo"))
    one = sizes.pass_flops(Tokens(118800, 118800, sizes.text_columns))
    assert 50 * one.total / 1e15 == pytest.approx(600, rel=0.02)
    assert 50 * one.attention / 1e15 == pytest.approx(500, rel=0.05)


def test_neighbours_keys_cost_attention_alone():
    sizes = wan_sizes(known_configs("Wan2.1-T2V-14B"))
    alone, around = (sizes.pass_flops(Tokens(100, seen, 512)) for seen in (100, 150))
    assert around.attention == 1.5 * alone.attention
    assert around.total - around.attention == alone.total - alone.attention
