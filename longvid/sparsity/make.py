"""The policy that settings ask for. Only its own module is loaded."""

from __future__ import annotations

from longvid.sparsity import settings as kinds
from longvid.sparsity.policy import Policy


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
