"""`longvid plan --gpu` and `--measure`: from a storyboard and settings to an outlook."""

from __future__ import annotations

from longvid.cache.settings import plan_cache
from longvid.chips import find_chip
from longvid.machines import ChipMachine, Machine
from longvid.models.facts import facts_of, sizes_of
from longvid.models.families import require
from longvid.outlook import Film, Outlook
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
        return Film(make_plan(script, settings, facts), settings, facts, sizes)

    film = lay_out(settings)
    machine: Machine
    if gpu:
        machine = ChipMachine(find_chip(gpu), sizes, film.itemsize)
    else:
        from longvid.measured import measure_machine

        machine = measure_machine(film, num_ranks)
    return Outlook.of(film, machine, num_ranks, lay_out)
