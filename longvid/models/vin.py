"""VIN: global tokens that tie far chunks of a film together ("Generating, Fast and Slow: Video Interface Networks").

A few learned tokens read the *key latents* of all noisy chunks in one cross-attention, are refined beside the text, and
are read by every chunk's self-attention. For a pretrained Wan transformer this is an adapter of its own: keys and
values of the tokens stand beside those of a layer, behind a gate that is closed at first, so that an untrained adapter
changes nothing.

Shapes: B films, C channels, K key latents of (h, w), G global tokens, D width, H heads of the reading attention, d of a
head, L text columns. Leading dims of the inputs may be left out together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from longvid.errors import InputError
from longvid.kernels.dense import attend, attend_lse_exact
from longvid.kernels.merge import merge_partials
from longvid.models.vin_config import CONFIG_FILE, WEIGHTS_FILE, VinConfig

PATCH = 2
"""Rows and columns of a latent that make one patch, as in all Wan transformers."""

BANDS = 8
"""Frequencies of a number's sines and cosines: half a turn, one, two, ... over its range."""

FARTHEST = 16
"""Places are told apart up to 2 to the power of this many latents back."""


Partial = tuple[Tensor, Tensor]
"""The tokens' attention to some key latents [..., H, G, d], and the logarithm of its softmax's sum [..., H, G]."""


class Vin(nn.Module):
    """The adapter. With ``layers`` it holds those of the transformer alone, and with ``encodes=False`` no encoder.

    ``partial`` and ``finish`` make tokens of key latents, and ``layers[str(i)]`` is what the transformer's layer i
    reads them with.
    """

    def __init__(self, config: VinConfig, layers: Iterable[int] | None = None, *, encodes: bool = True) -> None:
        super().__init__()
        self.config = config
        wanted = range(config.num_layers) if layers is None else layers
        self.layers = nn.ModuleDict({str(i): VinLayer(config.hidden_size, config.num_heads) for i in wanted})
        self.encoder = VinEncoder(config) if encodes else None

    @property
    def encodes(self) -> VinEncoder:
        assert self.encoder is not None, "this rank's part of the adapter makes no tokens"
        return self.encoder

    def layer(self, index: int) -> VinLayer:
        """What the transformer's layer of this place in the model reads tokens with."""
        layer = self.layers[str(index)]
        assert isinstance(layer, VinLayer)
        return layer

    def partial(self, latents: Tensor, timesteps: Tensor, places: Tensor) -> Partial:
        """What the tokens see of some key latents [C, K, h, w], to be merged with what they see of others.

        ``timesteps`` [K] are the latents' noise levels (0 to 1000), ``places`` [K] how many latents of the shot each
        lies before the newest key latent of all. Without key latents the output is 0 and the logarithm -inf.
        """
        return self.encodes.partial(latents, timesteps, places)

    def finish(self, out: Tensor, lse: Tensor, text: Tensor) -> Tensor:
        """The tokens [G, D], of the merged partials of all key latents and the text [L, D] that they follow.

        ``text`` is what the transformer's own embedder makes of a prompt's states, without padding.
        """
        return self.encodes.finish(out, lse, text)

    def encode(self, latents: Tensor, timesteps: Tensor, places: Tensor, text: Tensor) -> Tensor:
        """The tokens of key latents that are all here."""
        return self.finish(*self.partial(latents, timesteps, places), text)

    @torch.no_grad()
    def begin_as(self, dit: Any) -> None:
        """Start from a Wan transformer's own patch embedding, keys and values. The gates stay closed."""
        self.encodes.patch.weight.copy_(dit.patch_embedding.weight.flatten(1)[:, : self.encodes.patch.in_features])
        self.encodes.patch.bias.copy_(dit.patch_embedding.bias)
        for index in map(int, self.layers):
            layer, attn = self.layer(index), dit.blocks[index].attn1
            layer.to_k.load_state_dict(attn.to_k.state_dict())
            layer.to_v.load_state_dict(attn.to_v.state_dict())
            layer.norm_k.weight.copy_(attn.norm_k.weight)

    def save(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write ``vin.safetensors`` and ``vin.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: value.detach().to(dtype).contiguous() for name, value in self.state_dict().items()},
            folder / WEIGHTS_FILE,
        )
        (folder / CONFIG_FILE).write_text(json.dumps(asdict(self.config), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path, layers: Iterable[int] | None = None, *, encodes: bool = True) -> Vin:
        """Read an adapter, or this part of it, in fp32: no tensor of another part is read.

        Raises InputError for a damaged one.
        """
        vin = cls(VinConfig.read(folder), layers, encodes=encodes)
        path = folder / WEIGHTS_FILE
        expected = vin.state_dict()
        try:
            with safe_open(path, framework="pt") as file:
                lacking = sorted(expected.keys() - set(file.keys()))
                if lacking:
                    raise InputError(
                        f"{path}: lacks {len(lacking)} tensors that its config asks for, first {lacking[0]}"
                    )
                state = {name: file.get_tensor(name).float() for name in expected}
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: cannot be read ({error})") from None
        wrong = next((name for name, value in expected.items() if value.shape != state[name].shape), None)
        if wrong:
            shapes = f"{list(state[wrong].shape)}, and its config asks for {list(expected[wrong].shape)}"
            raise InputError(f"{path}: {wrong} is {shapes}")
        vin.load_state_dict(state)
        return vin.eval()


class VinEncoder(nn.Module):
    """Key latents to global tokens."""

    def __init__(self, config: VinConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.heads
        self.start = nn.Parameter(torch.randn(config.tokens, width))
        self.patch = nn.Linear(config.latent_channels * PATCH * PATCH, width)
        self.where = nn.Linear(4 * 2 * BANDS, width)
        self.mlp = _mlp(width)
        self.norm_start, self.norm_keys = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Linear(width, width)
        self.norm_text = nn.LayerNorm(width)
        self.processors = nn.ModuleList(_Processor(width, config.heads) for _ in range(config.processors))
        self.norm_out = nn.LayerNorm(width)

    def partial(self, latents: Tensor, timesteps: Tensor, places: Tensor) -> Partial:
        if latents.dim() == 4:
            out, lse = self.partial(latents[None], timesteps[None], places[None])
            return out[0], lse[0]
        query = self._split(self.to_q(self.norm_start(self.start)).expand(len(latents), -1, -1))
        keys = self.norm_keys(self._embed(latents, timesteps, places))
        found, lse = attend_lse_exact(query, self._split(self.to_k(keys)), self._split(self.to_v(keys)))
        return found.transpose(1, 2), lse.transpose(1, 2)

    def _embed(self, latents: Tensor, timesteps: Tensor, places: Tensor) -> Tensor:
        """Patches of key latents, [B, K · patches, D]: what they show, how noisy, when and where."""
        batch, channels, count, height, width = latents.shape
        rows, columns = height // PATCH, width // PATCH
        patches = latents.reshape(batch, channels, count, rows, PATCH, columns, PATCH).permute(0, 2, 3, 5, 1, 4, 6)
        embedded = self.patch(patches.flatten(4).to(self.patch.weight.dtype))
        far = (1 + places.float()).log2() / FARTHEST
        numbers = torch.broadcast_tensors(
            (timesteps.float() / 1000)[:, :, None, None],
            far[:, :, None, None],
            _middles(rows, latents.device)[:, None],
            _middles(columns, latents.device)[None],
        )
        waves = torch.cat([_waves(number) for number in numbers], dim=-1)
        embedded = (embedded + self.where(waves.to(embedded.dtype))).flatten(1, 3)
        thought: Tensor = embedded + self.mlp(embedded)
        return thought

    def finish(self, out: Tensor, lse: Tensor, text: Tensor) -> Tensor:
        if out.dim() == 3:
            return self.finish(out[None], lse[None], text[None])[0]
        found = out.transpose(1, 2).flatten(2).to(self.to_out.weight.dtype)
        tokens = self.start + self.to_out(found)
        text = self.norm_text(text.to(tokens.dtype))
        for processor in self.processors:
            tokens = processor(tokens, text)
        normed: Tensor = self.norm_out(tokens)
        return normed

    def _split(self, x: Tensor) -> Tensor:
        split: Tensor = x.unflatten(-1, (self.heads, -1))
        return split


class _Processor(nn.Module):
    """The tokens attend themselves and the text, then think."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = _mlp(width)

    def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
        """Tokens [B, G, D] and normed text [B, L, D] to tokens."""
        normed = self.norm(tokens)
        seen = torch.cat([normed, text], dim=1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in (self.to_q(normed), self.to_k(seen), self.to_v(seen)))
        tokens = tokens + self.to_out(attend(q, k, v).flatten(2))
        thought: Tensor = tokens + self.mlp(tokens)
        return thought


class VinLayer(nn.Module):
    """What one layer of the transformer reads the tokens with."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_k, self.to_v = nn.Linear(width, width), nn.Linear(width, width)
        self.norm_k = nn.RMSNorm(width, eps=1e-6)
        self.gate = nn.Parameter(torch.zeros(num_heads))

    def kv(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens [B, G, D], each [B, G, heads, d]; keys are normed and not rotated."""
        key = self.norm_k(self.to_k(tokens)).unflatten(-1, (self.num_heads, -1))
        return key, self.to_v(tokens).unflatten(-1, (self.num_heads, -1))

    def gated(self, out: Tensor) -> Tensor:
        """What is added to the layer's own attention [B, l, heads, d]."""
        return out * self.gate.tanh()[:, None].to(out.dtype)

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        """What normed queries [B, l, heads, d], not rotated, get of tokens [B, G, D]."""
        key, value = self.kv(tokens)
        return self.gated(attend(query.to(value.dtype), key, value))


def merge(partials: Sequence[Partial]) -> Partial:
    """Attention to all key latents, of attention to each part of them; fp32."""
    out, lse = (x.float() for x in partials[0])
    for other_out, other_lse in partials[1:]:
        # Heads and queries stand for each other here: both are rows of their own.
        pairs = [x if x.dim() == dims else x[None] for x, dims in ((out, 4), (lse, 3), (other_out, 4), (other_lse, 3))]
        merged = merge_partials(pairs[0], pairs[1], pairs[2], pairs[3])
        out, lse = (x.view_as(y) for x, y in zip(merged, (out, lse), strict=True))
    return out, lse


def _mlp(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width)
    )


def _waves(x: Tensor) -> Tensor:
    """Sines and cosines of numbers from 0 to 1: [..., 2 · BANDS]."""
    angles = x[..., None] * (math.pi * 2.0 ** torch.arange(BANDS, device=x.device))
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _middles(count: int, device: torch.device) -> Tensor:
    """The middles of so many equal parts of [0, 1]."""
    return (torch.arange(count, device=device) + 0.5) / count
