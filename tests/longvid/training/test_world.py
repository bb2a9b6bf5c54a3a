"""The drawn world: captions say what is drawn, and motions go on for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longvid.training import world

LOOKS = world.all_looks()


@given(st.sampled_from(LOOKS), st.booleans(), st.integers(0, 10_000))
def test_a_caption_says_every_attribute_in_any_wording(look: world.Look, shaded: bool, seed: int) -> None:
    shown = world.replace(look, shaded=shaded)
    assert world.read_caption(world.caption(shown, np.random.default_rng(seed))) == look.attributes()
    assert world.read_caption(world.caption(shown)) == look.attributes()


@given(st.sampled_from(LOOKS), st.integers(0, 10_000))
def test_captions_stay_within_the_vocabulary(look: world.Look, seed: int) -> None:
    text = world.caption(look, np.random.default_rng(seed)).replace(",", " , ").replace(".", " . ")
    assert set(text.split()) <= set(world.vocabulary())


def test_a_fixed_share_of_combinations_is_held_out_of_training() -> None:
    held_out = [look for look in LOOKS if world.is_held_out(look)]
    assert 0.04 < len(held_out) / len(LOOKS) < 0.06
    rng = np.random.default_rng(0)
    assert not any(world.is_held_out(world.sample_look(rng)) for _ in range(300))
    assert world.is_held_out(world.sample_look(rng, held_out=True))
    # Every value of every attribute is still trained on.
    trained = [look for look in LOOKS if not world.is_held_out(look)]
    for name in world.ATTRIBUTES:
        assert {getattr(k, name) for k in trained} == {getattr(k, name) for k in LOOKS}


@pytest.mark.parametrize("motion", world.MOTIONS)
def test_objects_never_leave_the_picture(motion: str) -> None:
    look = world.Look("red", "white", "circle", "small", motion)
    frames = world.make_clip(np.random.default_rng(1), 161, 32, looks=[look]).frames.astype(int)
    red = ((frames - np.array(world.PALETTE["red"])) ** 2).sum(-1) < 3000
    counts = red.sum((1, 2))
    assert counts.min() > 0.5 * counts.max() > 10


def test_only_a_standing_object_stands_still() -> None:
    for motion in world.MOTIONS:
        look = world.Look("red", "white", "circle", "small", motion)
        frames = world.make_clip(np.random.default_rng(2), 17, 64, looks=[look]).frames
        assert (frames[0] == frames[16]).all() == (motion == "still")


def test_a_change_morphs_from_one_look_to_the_other() -> None:
    weights = world.morph_weights([0, 9], 30)
    assert np.allclose(weights.sum(1), 1)
    assert (weights[:9, 0] == 1).all()
    assert (weights[9 + world.MORPH_FRAMES :, 1] == 1).all()
    assert (np.diff(weights[:, 1]) >= 0).all()


def test_a_clip_is_a_function_of_its_generator() -> None:
    first, second = (world.make_clip(np.random.default_rng(7), 41, 32) for _ in range(2))
    assert first.looks == second.looks and (first.frames == second.frames).all()
