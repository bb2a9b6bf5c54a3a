"""What HunyuanVideo takes and costs: two kinds of layers, the VAE, and its two text encoders."""

from __future__ import annotations

from longvid.models.configs import Configs
from longvid.models.hunyuan_facts import HUNYUAN_PASSES
from longvid.models.sizes import Config, Flops, JointLayer, Network, Sizes, Vae, linear, two_linears

TEXT_COLUMNS = 256
LEVELS = 256
"""Frequencies of a noise level."""
TIME = 4
"""Frames a latent, but for a tile's first."""
PADDED = 19 / 17
"""What goes into a convolution, of a tile's frames: with two frames of padding before them."""


def hunyuan_sizes(configs: Configs) -> Sizes:
    """Of a ``HunyuanVideoPipeline``. Layers are the double ones, then the single ones."""
    config = configs.of("transformer")
    head = int(config["attention_head_dim"])
    width = int(config["num_attention_heads"]) * head
    inner, text = round(float(config["mlp_ratio"]) * width), int(config["text_embed_dim"])
    pooled, channels = int(config["pooled_projection_dim"]), int(config["in_channels"])
    patch = int(config["patch_size"]) ** 2 * int(config["patch_size_t"])
    guided = two_linears(LEVELS, width) if config["guidance_embeds"] else 0
    refiner = int(config["num_refiner_layers"]) * _refiner_params(width)
    context = two_linears(LEVELS, width) + two_linears(text, width) + linear(text, width) + refiner
    leaving = int(config["out_channels"]) * patch
    return Sizes(
        layers=(_double(width, inner, head),) * int(config["num_layers"])
        + (_single(width, inner, head),) * int(config["num_single_layers"]),
        first=linear(channels * patch, width) + context,
        last=linear(width, 2 * width) + linear(width, leaving),
        shared=two_linears(LEVELS, width) + two_linears(pooled, width) + guided,
        patch_values=(channels * patch + leaving) // 2,
        vae=hunyuan_vae(configs.of("vae")),
        text_params=llama_params(configs.of("text_encoder")) + clip_params(configs.of("text_encoder_2")),
        text_columns=TEXT_COLUMNS,
        embed=_embed(config, width, TEXT_COLUMNS),
    )


def _double(width: int, inner: int, head: int) -> JointLayer:
    side = linear(width, 6 * width) + 4 * linear(width, width) + 2 * head + linear(width, inner) + linear(inner, width)
    # Of the text's own, those of keys and values stay in full precision.
    own_of_text = 2 * width**2 + 2 * width * inner
    return JointLayer(2 * side, width, inner, modulation=2 * 6 * width**2, text_linear_params=own_of_text)


def _single(width: int, inner: int, head: int) -> JointLayer:
    attention = 3 * linear(width, width) + 2 * head
    params = attention + linear(width, 3 * width) + linear(width, inner) + linear(width + inner, width)
    return JointLayer(params, width, inner, modulation=3 * width**2)


def _refiner_params(width: int) -> int:
    attention, feed_forward = 4 * linear(width, width), linear(width, 4 * width) + linear(4 * width, width)
    return attention + feed_forward + 4 * width + linear(width, 2 * width)


def _embed(config: Config, width: int, columns: int) -> Flops:
    """Noise level, pooled text and guidance; and the refiner of the text, which reads the noise level."""
    text, pooled, square = int(config["text_embed_dim"]), int(config["pooled_projection_dim"]), width**2
    embedders = 1 + 1 + bool(config["guidance_embeds"])
    levels = embedders * (LEVELS * width + square) + pooled * width + square + text * width + square + 2 * square
    blocks = int(config["num_refiner_layers"])
    tokens = columns * text * width + blocks * (columns * 12 * square + 2 * columns**2 * width)
    return Flops(levels=2 * (levels + blocks * 2 * square), text=2 * tokens)


def hunyuan_vae(config: Config) -> Vae:
    """``AutoencoderKLHunyuanVideo``."""
    widths, blocks, z = (
        list(config["block_out_channels"]),
        int(config["layers_per_block"]),
        int(config["latent_channels"]),
    )
    encoder, decoder = _encoder(widths, blocks, z, config), _decoder(widths, blocks, z, config)
    quant = linear(2 * z, 2 * z)
    together = HUNYUAN_PASSES.window - 1 + 1 / TIME
    return Vae(encoder.params + quant + decoder.params, decoder, together=together, repeated=HUNYUAN_PASSES.repeated)


def _residual(net: Network, inputs: int, outputs: int, entered: int = 0) -> None:
    """`entered` channels came to the level, and are alive as long as its other blocks are.

    So are the block's inputs, until its end; inside, what is normed, that with its padding, and what comes out.
    """
    net.alive(entered + inputs + (1 + PADDED) * inputs + outputs)
    net.alive(entered + inputs + (2 + PADDED) * outputs)
    net.conv(inputs, outputs)
    net.conv(outputs, outputs)
    net.other_params += 2 * inputs + 2 * outputs
    if inputs != outputs:
        net.conv(inputs, outputs, taps=1)


def _middle(net: Network, width: int, has_attention: bool) -> None:
    _residual(net, width, width)
    if has_attention:
        for _ in range(4):
            net.conv(width, width, taps=1)
        net.other_params += 2 * width
        net.attention_widths.append(width)
    _residual(net, width, width)


def _encoder(widths: list[int], blocks: int, z: int, config: Config) -> Network:
    """Its parameters count alone."""
    net, before = Network(), widths[0]
    net.conv(int(config.get("in_channels", 3)), before)
    for level, width in enumerate(widths):
        for block in range(blocks):
            _residual(net, width if block else before, width)
        before = width
        if level < len(widths) - 1:
            net.conv(width, width)
    _middle(net, before, bool(config.get("mid_block_add_attention", True)))
    net.other_params += 2 * before
    net.conv(before, 2 * z)
    return net


def _decoder(widths: list[int], blocks: int, z: int, config: Config) -> Network:
    net, before, ups = Network(), widths[-1], len(widths) - 1
    net.conv(z, z, taps=1)
    net.conv(z, before)
    _middle(net, before, bool(config.get("mid_block_add_attention", True)))
    for level, width in enumerate(reversed(widths)):
        for block in range(blocks + 1):
            _residual(net, width if block else before, width, entered=before if block else 0)
        before = width
        if level < ups:
            time = 2 if level >= ups - 2 else 1
            net.up(time=time)
            net.alive(
                (3 + PADDED) * width + 2 * width / (4 * time)
            )  # later frames alone and with the first, two levels
            net.conv(width, width)
    net.other_params += 2 * before
    net.conv(before, int(config.get("out_channels", 3)))
    return net


def llama_params(config: Config) -> int:
    """A Llama without its output layer."""
    width, inner, heads = (
        int(config["hidden_size"]),
        int(config["intermediate_size"]),
        int(config["num_attention_heads"]),
    )
    kv = width // heads * int(config["num_key_value_heads"])
    layer = 2 * width * width + 2 * width * kv + 3 * width * inner + 2 * width
    return int(config["vocab_size"]) * width + int(config["num_hidden_layers"]) * layer + width


def clip_params(config: Config) -> int:
    """A CLIP text encoder."""
    width, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    layer = 4 * linear(width, width) + linear(width, inner) + linear(inner, width) + 4 * width
    positions = int(config.get("max_position_embeddings", 77))
    return (int(config["vocab_size"]) + positions) * width + int(config["num_hidden_layers"]) * layer + 2 * width
