"""Frames, latents and tokens: the grid's functions are inverse to each other and cover every frame once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longvid.errors import InputError
from longvid.geometry import LatentGrid

grids = st.builds(LatentGrid, st.integers(1, 16), st.integers(1, 32), st.tuples(st.just(1), *[st.integers(1, 4)] * 2))
counts = st.integers(0, 10_000)


@given(grids, st.integers(1, 200))
def test_latents_hold_every_frame_once_and_in_order(grid, num_latents):
    frames = [frame for latent in range(num_latents) for frame in grid.frames_of(latent)]
    assert frames == list(range(grid.num_frames(num_latents)))
    assert all(grid.latent_of(frame) == latent for latent in range(num_latents) for frame in grid.frames_of(latent))


@given(grids, counts)
def test_latents_are_the_fewest_that_hold_the_frames(grid, num_frames):
    num_latents = grid.num_latents(num_frames)
    assert grid.num_frames(num_latents) >= num_frames
    assert num_latents == 0 or grid.num_frames(num_latents - 1) < num_frames


@given(grids, counts)
def test_whole_latents_survive_the_way_to_frames_and_back(grid, num_latents):
    assert grid.num_latents(grid.num_frames(num_latents)) == num_latents


def test_the_first_latent_holds_one_frame_and_later_ones_four():
    grid = LatentGrid()
    assert [grid.frames_of(i) for i in range(3)] == [range(0, 1), range(1, 5), range(5, 9)]
    assert [grid.num_latents(n) for n in (0, 1, 2, 5, 6, 81)] == [0, 1, 2, 2, 3, 21]


@given(grids, st.integers(1, 50), st.integers(1, 50))
def test_tokens_are_patches_of_latent_cells(grid, columns, rows):
    width, height = columns * grid.spatial * grid.patch[2], rows * grid.spatial * grid.patch[1]
    assert grid.latent_size(width, height) == (columns * grid.patch[2], rows * grid.patch[1])
    assert grid.tokens_per_latent(width, height) == columns * rows


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((100, 64), "size 100 x 64: the width must be a multiple of 16 for this model; 96 and 112 are nearest"),
        ((64, 8), "size 64 x 8: the height must be a multiple of 16 for this model; 16 is nearest"),
        ((0, 64), "the width must be a multiple of 16"),
        ((64, -16), "the height must be a multiple of 16"),
    ],
)
def test_a_size_off_the_grid_names_the_nearest(size, message):
    with pytest.raises(InputError, match=message):
        LatentGrid().latent_size(*size)
