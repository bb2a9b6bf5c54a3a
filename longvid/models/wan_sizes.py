"""What Wan models take and cost: the transformer, the VAEs of 2.1 and 2.2, and UMT5."""

from __future__ import annotations

import itertools

from longvid.models.configs import Configs
from longvid.models.sizes import (
    Config,
    CrossLayer,
    Flops,
    Network,
    Sizes,
    Vae,
    linear,
    t5_params,
    two_linears,
)

TEXT_COLUMNS = 512


def wan_sizes(configs: Configs) -> Sizes:
    """Of a ``WanPipeline`` or a ``WanImageToVideoPipeline``."""
    config = configs.of("transformer")
    width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
    inner, layers = int(config["ffn_dim"]), int(config["num_layers"])
    text, image, levels = int(config["text_dim"]), config.get("image_dim"), int(config.get("freq_dim", 256))
    patch = 4  # of 1 x 2 x 2
    entering, leaving = (
        int(config["in_channels"]) * patch,
        int(config.get("out_channels") or config["in_channels"]) * patch,
    )
    layer = CrossLayer(_layer_params(config, width, inner), width, inner, text_width=width)
    time = two_linears(levels, width) + linear(width, 6 * width)
    shared = time + two_linears(text, width) + (_image_params(int(image), width) if image else 0)
    return Sizes(
        layers=(layer,) * layers,
        first=linear(entering, width),
        last=linear(width, leaving) + 2 * width,
        shared=shared,
        patch_values=(entering + leaving) // 2,
        vae=wan_vae(configs.of("vae")),
        text_params=t5_params(configs.of("text_encoder"), own_positions=True),
        text_columns=TEXT_COLUMNS,
        embed=Flops(levels=2 * (levels * width + 7 * width**2), prompt=2 * TEXT_COLUMNS * (text * width + width**2)),
        prompt_each_step=False,
        num_experts=1 + configs.has("transformer_2"),
    )


def _layer_params(config: Config, width: int, inner: int) -> int:
    attention = 4 * linear(width, width) + 2 * width  # with norms of queries and keys
    added = config.get("added_kv_proj_dim")
    image = 2 * linear(int(added), width) + width if added else 0
    norm = 2 * width if config.get("cross_attn_norm", True) else 0
    return 2 * attention + image + linear(width, inner) + linear(inner, width) + norm + 6 * width


def _image_params(image: int, width: int) -> int:
    """The projection of CLIP's states: two norms, two linear layers."""
    return 2 * image + 2 * width + linear(image, image) + linear(image, width)


def wan_vae(config: Config) -> Vae:
    """``AutoencoderKLWan``: 2.1, and 2.2 with residual blocks, which works on patches of pixels."""
    base, z = int(config.get("base_dim", 96)), int(config["z_dim"])
    down_time = list(config.get("temperal_downsample") or (False, True, True))
    halves = bool(not config.get("is_residual", False))
    mults, blocks = list(config["dim_mult"]), int(config["num_res_blocks"])
    encoder = _encoder(base, mults, blocks, down_time, int(config.get("in_channels", 3)), 2 * z)
    decoder = _decoder(
        int(config.get("decoder_base_dim") or base),
        mults,
        blocks,
        down_time[::-1],
        z,
        int(config.get("out_channels", 3)),
        halves,
    )
    quant = linear(2 * z, 2 * z)
    return Vae(encoder.params + quant + decoder.params, decoder, has_own_kernels=True)


def _residual(net: Network, inputs: int, outputs: int) -> None:
    net.conv(inputs, outputs, keeps=2)
    net.conv(outputs, outputs, keeps=2)
    net.other_params += inputs + outputs
    if inputs != outputs:
        net.conv(inputs, outputs, taps=1)


def _middle(net: Network, width: int) -> None:
    _residual(net, width, width)
    net.conv(width, 3 * width, taps=1)
    net.conv(width, width, taps=1)
    net.other_params += width
    net.attention_widths.append(width)
    _residual(net, width, width)


def _encoder(base: int, mults: list[int], blocks: int, down_time: list[bool], inputs: int, outputs: int) -> Network:
    """Its parameters count alone: a render encodes images at most."""
    net, widths = Network(), [base * mult for mult in (1, *mults)]
    net.conv(inputs, widths[0])
    for level, (before, after) in enumerate(itertools.pairwise(widths)):
        for block in range(blocks):
            _residual(net, after if block else before, after)
        if level < len(mults) - 1:
            net.conv(after, after, taps=9)
            if down_time[level]:
                net.conv(after, after, taps=3)
    _middle(net, widths[-1])
    net.other_params += widths[-1]
    net.conv(widths[-1], outputs)
    return net


def _decoder(
    base: int, mults: list[int], blocks: int, up_time: list[bool], z: int, outputs: int, halves: bool
) -> Network:
    """`halves`: going up halves the channels (2.1), else blocks do it (2.2)."""
    net, widths = Network(), [base * mult for mult in (mults[-1], *reversed(mults))]
    net.conv(z, z, taps=1)
    net.conv(z, widths[0], keeps=2)
    _middle(net, widths[0])
    net.num_whole = len(net.convs)
    for level, (before, after) in enumerate(itertools.pairwise(widths)):
        entering = before // 2 if level and halves else before
        for block in range(blocks + 1):
            _residual(net, after if block else entering, after)
        # What came to the level, to a residual block and behind its first convolution, and what leaves it.
        net.alive_in_units(entering + 3 * after, kept=2 * after)
        if level < len(mults) - 1:
            leaving, time = after // 2 if halves else after, 1 + up_time[level]
            # The same, the convolution over time's output, if there is one, and the level's.
            net.alive_in_units(entering + after + 2 * after * up_time[level] + 4 * time * leaving)
            if up_time[level]:
                net.conv(after, 2 * after, taps=3, keeps=2, first=0)
                net.up(space=1, time=2)
            net.up()
            net.conv(after, leaving, taps=9, doubles=True)
    net.other_params += widths[-1]
    net.conv(widths[-1], outputs, keeps=2)
    return net
