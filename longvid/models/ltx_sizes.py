"""What LTX-Video models take and cost: the transformer, the VAE, and T5."""

from __future__ import annotations

from longvid.models.configs import Configs
from longvid.models.ltx_facts import LTX_PASSES
from longvid.models.sizes import Config, CrossLayer, Flops, Network, Sizes, Vae, linear, t5_params, two_linears

TEXT_COLUMNS = 128
LEVELS = 256
"""Frequencies of a noise level."""


def ltx_sizes(configs: Configs) -> Sizes:
    """Of an ``LTXPipeline``."""
    config = configs.of("transformer")
    width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    inner, context, caption = 4 * width, int(config["cross_attention_dim"]), int(config["caption_channels"])
    entering, leaving = int(config["in_channels"]), int(config.get("out_channels") or config["in_channels"])
    own = 4 * linear(width, width) + 2 * width
    cross = 2 * linear(width, width) + 2 * linear(context, width) + 2 * width
    layer = own + cross + linear(width, inner) + linear(inner, width) + 6 * width
    time = two_linears(LEVELS, width) + linear(width, 6 * width)
    embed = Flops(levels=2 * (LEVELS * width + 7 * width**2), prompt=2 * TEXT_COLUMNS * (caption * width + width**2))
    return Sizes(
        layers=(CrossLayer(layer, width, inner, text_width=context),) * int(config["num_layers"]),
        first=linear(entering, width),
        last=2 * width + linear(width, leaving),
        shared=time + two_linears(caption, width),
        patch_values=(entering + leaving) // 2,
        vae=ltx_vae(configs.of("vae")),
        text_params=t5_params(configs.of("text_encoder"), own_positions=False),
        text_columns=TEXT_COLUMNS,
        embed=embed,
        prompt_each_step=False,
    )


def ltx_vae(config: Config) -> Vae:
    """``AutoencoderKLLTXVideo`` of 0.9.0. Raises ValueError for a later one, whose decoder reads a noise level."""
    if config.get("timestep_conditioning") or any(config.get("upsample_residual") or ()):
        raise ValueError("sizes of a VAE later than that of 0.9.0 are not known")
    patch, z = int(config["patch_size"]) ** 2, int(config["latent_channels"])
    encoder = _encoder(config, patch * int(config.get("in_channels", 3)), z)
    decoder = _decoder(config, patch * int(config.get("out_channels", 3)), z)
    return Vae(encoder.params + decoder.params, decoder, together=LTX_PASSES.window, repeated=LTX_PASSES.repeated)


def _residual(net: Network, inputs: int, outputs: int) -> None:
    net.conv(inputs, outputs)
    net.conv(outputs, outputs)
    if inputs != outputs:
        net.conv(inputs, outputs, taps=1)
        net.other_params += 2 * inputs


def _encoder(config: Config, inputs: int, z: int) -> Network:
    """Its parameters count alone."""
    net, widths, blocks = Network(), list(config["block_out_channels"]), list(config["layers_per_block"])
    net.conv(inputs, widths[0])
    for level, width in enumerate(widths):
        for _ in range(blocks[level]):
            _residual(net, width, width)
        if config["spatio_temporal_scaling"][level]:
            net.conv(width, width)
        after = widths[min(level + 1, len(widths) - 1)]
        if after != width:
            _residual(net, width, after)
    for _ in range(blocks[-1]):
        _residual(net, widths[-1], widths[-1])
    net.conv(widths[-1], z + 1)
    return net


def _decoder(config: Config, outputs: int, z: int) -> Network:
    net, widths = Network(), list(reversed(config["decoder_block_out_channels"]))
    blocks, scaling = (
        list(reversed(config["decoder_layers_per_block"])),
        list(reversed(config["decoder_spatio_temporal_scaling"])),
    )
    net.conv(z, widths[0])
    for _ in range(blocks[0]):
        _residual(net, widths[0], widths[0])
    before = widths[0]
    for level, width in enumerate(widths):
        if before != width:
            _residual(net, before, width)
        if scaling[level]:
            net.conv(width, 8 * width)
            net.up(time=2)
        for _ in range(blocks[level + 1]):
            _residual(net, width, width)
        before = width
    net.conv(before, outputs)
    return net
