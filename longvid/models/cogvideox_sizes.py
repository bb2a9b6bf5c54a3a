"""What CogVideoX models take and cost: the transformer, the VAE, and T5."""

from __future__ import annotations

from longvid.models.configs import Configs
from longvid.models.sizes import Config, Flops, JointLayer, Network, Sizes, Vae, linear, t5_params

TOGETHER = 2
"""Latents that the stock VAE decodes in one pass."""
NORM = 6
"""Values at once in a norm that reads the latents: its input, normed, scale, shift, their product and the sum."""


def cogvideox_sizes(configs: Configs) -> Sizes:
    """Of a ``CogVideoXPipeline``: 2B, 5B or 1.5."""
    config = configs.of("transformer")
    heads, head = int(config["num_attention_heads"]), int(config["attention_head_dim"])
    width, inner, levels = heads * head, 4 * heads * head, int(config.get("time_embed_dim", 512))
    text, columns = int(config.get("text_embed_dim", 4096)), int(config.get("max_text_seq_length", 226))
    patch = int(config["patch_size"]) ** 2 * (config.get("patch_size_t") or 1)
    entering, leaving = (
        int(config["in_channels"]) * patch,
        int(config.get("out_channels") or config["in_channels"]) * patch,
    )
    has_bias = bool(config.get("attention_bias", True))
    attention = 3 * linear(width, width, has_bias) + linear(width, width) + 4 * head
    norms = 2 * (linear(levels, 6 * width) + 2 * width)
    layer = attention + norms + linear(width, inner) + linear(inner, width)
    embed = Flops(levels=2 * (width * levels + levels**2 + 2 * levels * width), prompt=2 * columns * text * width)
    return Sizes(
        layers=(JointLayer(layer, width, inner, modulation=2 * 6 * width * levels),) * int(config["num_layers"]),
        first=linear(
            entering, width, bias=config.get("patch_size_t") is not None or bool(config.get("patch_bias", True))
        )
        + linear(text, width),
        last=2 * width + linear(levels, 2 * width) + 2 * width + linear(width, leaving),
        shared=linear(width, levels) + linear(levels, levels),
        patch_values=(entering + leaving) // 2,
        vae=cogvideox_vae(configs.of("vae")),
        text_params=t5_params(configs.of("text_encoder"), own_positions=False),
        text_columns=columns,
        embed=embed,
    )


def cogvideox_vae(config: Config) -> Vae:
    """``AutoencoderKLCogVideoX``; its decoder's norms read the latents."""
    widths, blocks, z = (
        list(config["block_out_channels"]),
        int(config.get("layers_per_block", 3)),
        int(config["latent_channels"]),
    )
    halvings = int(config.get("temporal_compression_ratio", 4)).bit_length() - 1
    encoder = _encoder(widths, blocks, z, int(config.get("in_channels", 3)))
    decoder = _decoder(widths, blocks, z, int(config.get("out_channels", 3)), halvings)
    return Vae(encoder.params + decoder.params, decoder, together=TOGETHER, makes_state=True)


def _residual(net: Network, inputs: int, outputs: int, z: int, entered: int = 0) -> None:
    """`entered` channels came to the level, and are alive as long as its other blocks are."""
    for width, alive in ((inputs, entered), (outputs, entered + inputs)):
        _norm(net, width, z)
        net.alive(alive + NORM * width + 2 * z)
    net.conv(inputs, outputs, keeps=2)
    net.conv(outputs, outputs, keeps=2)
    if inputs != outputs:
        net.conv(inputs, outputs, taps=1)


def _norm(net: Network, width: int, z: int) -> None:
    """Of groups; with `z` also scale and shift by the latents, which the stock VAE keeps of the last pass."""
    net.other_params += 2 * width
    if z:
        net.conv(z, width, taps=1, keeps=TOGETHER * net.frames)
        net.conv(z, width, taps=1, keeps=TOGETHER * net.frames)


def _encoder(widths: list[int], blocks: int, z: int, inputs: int) -> Network:
    """Its parameters count alone."""
    net, before = Network(), widths[0]
    net.conv(inputs, widths[0])
    for level, width in enumerate(widths):
        for block in range(blocks):
            _residual(net, width if block else before, width, 0)
        before = width
        if level < len(widths) - 1:
            net.conv(width, width, taps=9)
    for _ in range(2):
        _residual(net, widths[-1], widths[-1], 0)
    _norm(net, widths[-1], 0)
    net.conv(widths[-1], 2 * z)
    return net


def _decoder(widths: list[int], blocks: int, z: int, outputs: int, halvings: int) -> Network:
    net, before = Network(), widths[-1]
    net.conv(z, before, keeps=2)
    for _ in range(2):
        _residual(net, before, before, z)
    for level, width in enumerate(reversed(widths)):
        for block in range(blocks + 1):
            _residual(net, width if block else before, width, z, entered=before if block else 0)
        before = width
        if level < len(widths) - 1:
            net.up(time=2 if level < halvings else 1)
            net.conv(width, width, taps=9)
    _norm(net, widths[0], z)
    net.conv(widths[0], outputs, keeps=2)
    return net
