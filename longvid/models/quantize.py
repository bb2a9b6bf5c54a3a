"""Linear layers in 8 bits, by torchao: which ones, and how.

Weights alone (`int8`, `fp8`: a scale an output channel), or int8 weights and activations with a scale a token, made as
they come (`w8a8`), as ViDiT-Q (arXiv:2406.02540) has it for video transformers. As there, what errs most is left as it
is: the first and the last layer, embeddings and everything else outside of the layers, modulation, and the keys and
values of the prompt, which cost next to nothing.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from longvid.errors import InputError

SENSITIVE = ("norm", "attn2.to_k", "attn2.to_v", "add_k_proj", "add_v_proj")
"""Parts of the names of linear layers that stay in full precision."""


def quantize_layer(layer: nn.Module, how: str) -> None:
    """Put the weights of a transformer's layer in 8 bits, in place; `how` is `int8`, `fp8` or `w8a8`."""
    quantize_, configs = require_torchao()
    quantize_(layer, configs[how], filter_fn=is_quantized)


def is_quantized(module: nn.Module, name: str) -> bool:
    """Whether a module of a layer is put in 8 bits."""
    return isinstance(module, nn.Linear) and not any(part in name for part in SENSITIVE)


def require_torchao() -> tuple[Any, dict[str, Any]]:
    """torchao's function, and its configs by our names. Raises InputError without torchao."""
    try:
        from torchao.quantization import (
            Float8WeightOnlyConfig,
            Int8DynamicActivationInt8WeightConfig,
            Int8WeightOnlyConfig,
            quantize_,
        )
    except ImportError:
        raise InputError("memory.quantize needs torchao: pip install 'longvid[quantize]'") from None
    configs = {
        "int8": Int8WeightOnlyConfig(),
        "fp8": Float8WeightOnlyConfig(),
        "w8a8": Int8DynamicActivationInt8WeightConfig(),
    }
    return quantize_, configs
