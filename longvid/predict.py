"""`longvid plan --gpu` and `--measure`: from a storyboard and settings to an outlook."""

from __future__ import annotations

from longvid.cache.settings import plan_cache
from longvid.chips import chip_here, find_chip
from longvid.errors import InputError
from longvid.machines import ChipMachine, Machine
from longvid.meshes import Film, choose_mesh
from longvid.models.facts import facts_of, sizes_of
from longvid.models.families import require
from longvid.outlook import Outlook
from longvid.plan import make_plan
from longvid.script import Script
from longvid.settings import Settings


def predict(script: Script, settings: Settings, gpu: str | None, num_ranks: int) -> Outlook:
    """The outlook for so many accelerators; None: for ranks on this machine, which measures a layer and the decoder.

    Raises InputError for what cannot be rendered, an unknown chip, and a model to be measured that is not here.
    """
    facts, sizes = facts_of(settings.model.path), sizes_of(settings.model.path)

    def lay_out(settings: Settings) -> Film:
        require(facts, settings, plan_cache(settings.cache, settings.sampler.steps, facts.num_layers))
        return Film(make_plan(script, settings, facts), settings, facts, sizes.held(settings.memory.quantize))

    film = lay_out(settings)
    machine: Machine
    chip = find_chip(gpu) if gpu else chip_here(settings)
    if gpu:
        machine = ChipMachine(chip, film.sizes, film.itemsize)
    else:
        from longvid.measured import measure_machine

        machine = measure_machine(film, num_ranks)
    try:
        taken = choose_mesh(num_ranks, settings, facts, sizes, chip)
    except InputError:  # with these settings alone, and that may lack a ring
        taken = None
    return Outlook.of(film, machine, num_ranks, taken, lay_out)
