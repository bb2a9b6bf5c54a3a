"""The policy that settings ask for. Only its own module is loaded."""

from __future__ import annotations

from pathlib import Path

from longvid.errors import InputError
from longvid.fingerprint import mark_of
from longvid.plan import ModelFacts
from longvid.settings import Settings
from longvid.sparsity import settings as kinds
from longvid.sparsity.policy import Policy
from longvid.sparsity.runtime import SparseRuntime


def make_attention(settings: Settings, facts: ModelFacts, root: Path | None) -> SparseRuntime | None:
    """The policy of sparse attention at work; None: dense. Raises InputError where mesh or model cannot serve it."""
    chosen = settings.attention
    if isinstance(chosen, kinds.Dense):
        return None
    policy = make_policy(chosen)
    if isinstance(chosen, kinds.SparseVdit | kinds.Sta | kinds.TileFrames) and chosen.profile:
        from longvid.sparsity.chosen import ChosenPolicy
        from longvid.sparsity.sparse_vdit import SparseVditPolicy

        assert isinstance(policy, SparseVditPolicy | ChosenPolicy)
        model = mark_of(root, "transformer") if root else None
        policy.require(num_layers=facts.num_layers, num_heads=facts.num_heads, model=model)
    if settings.sequence.backend == "xfuser":
        raise InputError(f"sequence.backend: xfuser has no sparse attention, but attention.policy is {chosen.policy}")
    if settings.mesh.ring > 1 and policy.data_dependent:
        reason = "looks at all keys, which no rank of a ring has"
        raise InputError(f"mesh.ring must be 1, not {settings.mesh.ring}: attention.policy {chosen.policy} {reason}")
    always = chosen.crossover == "always"
    return SparseRuntime(policy, facts.num_layers, settings.sampler.steps, always=always)


def make_policy(settings: kinds.SparseSettings) -> Policy:
    """Raises InputError where a file that the policy needs is not right."""
    match settings:
        case kinds.TileFrames():
            from longvid.sparsity.tile import TilePolicy

            return TilePolicy(settings)
        case kinds.Sta():
            from longvid.sparsity.sta import StaPolicy

            return StaPolicy(settings)
        case kinds.Radial():
            from longvid.sparsity.radial import RadialPolicy

            return RadialPolicy(settings)
        case kinds.Grat():
            from longvid.sparsity.grat import GratPolicy

            return GratPolicy(settings)
        case kinds.SparseVdit():
            from longvid.sparsity.sparse_vdit import SparseVditPolicy

            return SparseVditPolicy(settings)
        case _:
            return _make_data_dependent(settings)


def _make_data_dependent(settings: kinds.AdaSpa | kinds.Svg2 | kinds.Rettention | kinds.Asa) -> Policy:
    match settings:
        case kinds.AdaSpa():
            from longvid.sparsity.adaspa import AdaSpaPolicy

            return AdaSpaPolicy(settings)
        case kinds.SvgEar():  # before Svg2, whose settings it extends
            from longvid.sparsity.svg_ear import SvgEarPolicy

            return SvgEarPolicy(settings)
        case kinds.Svg2():
            from longvid.sparsity.svg2 import Svg2Policy

            return Svg2Policy(settings)
        case kinds.Rettention():
            from longvid.sparsity.rettention import RettentionPolicy

            return RettentionPolicy(settings)
        case kinds.Asa():
            from longvid.sparsity.asa import AsaPolicy

            return AsaPolicy(settings)
