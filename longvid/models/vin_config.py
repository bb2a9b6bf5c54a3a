"""The config of a VIN adapter, and whether it can serve a model: no torch, no weights."""

from __future__ import annotations

from dataclasses import dataclass, fields
from os.path import expanduser
from pathlib import Path

from longvid.errors import InputError
from longvid.models.configs import read_json
from longvid.plan import ModelFacts
from longvid.settings import Settings

FOLDER = "vin"
"""Where an adapter lies in its model's directory."""
CONFIG_FILE, WEIGHTS_FILE = "vin.json", "vin.safetensors"


@dataclass(frozen=True)
class VinConfig:
    """The sizes of an adapter. `hidden_size`, `latent_channels`, `num_layers` and `num_heads` are its transformer's.

    `tokens` is G; a latent in `spacing` of a shot is a key latent; `processors` layers refine the tokens; `heads` is H.
    """

    hidden_size: int
    latent_channels: int
    num_layers: int
    num_heads: int
    tokens: int = 32
    spacing: int = 3
    processors: int = 2
    heads: int = 4

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < (field.name == "processors") ^ 1:
                raise ValueError(f"{field.name} must be a whole number of at least 1, not {value!r}")
        if self.hidden_size % self.heads or self.hidden_size % self.num_heads:
            raise ValueError(f"{self.heads} and {self.num_heads} heads must divide hidden_size {self.hidden_size}")

    @classmethod
    def read(cls, folder: Path) -> VinConfig:
        """That of an adapter in ``folder``. Raises InputError, naming the file."""
        path = folder / CONFIG_FILE
        try:
            return cls(**read_json(path))
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: is not the config of a VIN adapter ({error})") from None


def find_vin(settings: Settings, facts: ModelFacts, root: Path | None) -> Path | None:
    """The directory of the adapter that the settings ask for; None: no unit reads global tokens.

    Raises InputError where there is none, where it is another model's, and where nothing could read its tokens.
    """
    chosen = settings.vin
    if chosen.policy == "none":
        return None
    what = "vin.policy must be none"
    if facts.family != "wan" or facts.boundary_ratio is not None or facts.image == "required":
        raise InputError(f"{what}: {facts.name}: adapters are of Wan's text-to-video models of one expert")
    if settings.schedule == "sequential":
        raise InputError(f"{what} with schedule: sequential, which shows the model each shot as a whole")
    if chosen.path is None and root is None:
        raise InputError(f"{what}, or vin.path must be given: {facts.name} is no directory that could hold an adapter")
    assert chosen.path is not None or root is not None
    folder = Path(expanduser(chosen.path)) if chosen.path is not None else Path(root or "") / FOLDER
    if not (folder / CONFIG_FILE).is_file():
        missing = f"{folder / CONFIG_FILE} is missing"
        raise InputError(f"{what}: {facts.name} has no adapter ({missing}): `longvid train vin` makes one")
    config = VinConfig.read(folder)
    for name in ("hidden_size", "latent_channels", "num_layers", "num_heads"):
        own, models = getattr(config, name), getattr(facts, name)
        if own != models:
            sizes = f"its {name} is {own}, that of {facts.name} {models}"
            raise InputError(f"{folder / CONFIG_FILE}: is the adapter of another model: {sizes}")
    return folder
