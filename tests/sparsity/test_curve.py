"""The curve visits every cell of a grid once, in small steps."""

from hypothesis import given
from hypothesis import strategies as st

from longvid.sparsity.curve import curve

SIDES = st.integers(1, 17)


def steps(depth, height, width):
    """How far each step goes along each axis."""
    cells = curve(depth, height, width)
    places = (cells // (height * width), cells // width % height, cells % width)
    return [place.diff().abs() for place in places]


@given(depth=SIDES, height=SIDES, width=SIDES)
def test_every_cell_is_visited_once(depth, height, width):
    assert curve(depth, height, width).sort().values.tolist() == list(range(depth * height * width))


@given(depth=SIDES, height=SIDES, width=SIDES)
def test_steps_go_to_neighbours_and_sometimes_diagonally_where_a_side_is_odd(depth, height, width):
    t, y, x = steps(depth, height, width)
    far = (t + y + x) > 1
    assert max(s.max().item() if len(s) else 0 for s in (t, y, x)) <= 1
    assert (t + y + x <= 2).all()
    if depth % 2 == height % 2 == width % 2 == 0:
        assert not far.any()
    else:
        assert far.sum() <= 1 + len(far) // 8


def test_a_stretch_of_the_curve_is_compact():
    """128 successive cells of a film's grid lie in a small box; 128 in film order are a strip."""
    cells = curve(16, 16, 24)[:6144].view(-1, 128)
    extents = [place.amax(1) - place.amin(1) + 1 for place in (cells // 384, cells // 24 % 16, cells % 24)]
    volume = extents[0] * extents[1] * extents[2]
    assert max(extent.max() for extent in extents) <= 12
    assert volume.double().median() <= 3 * 128
