"""A decoder's state goes from rank to rank as bytes, and is what it was."""

import torch

from longvid.decode import FilmDecoders, pack_state, unpack_state


def test_a_packed_state_is_the_same_with_its_strides():
    generator = torch.Generator().manual_seed(7)
    whole = torch.randn(1, 6, 2, 4, 5, generator=generator)
    state = {
        "is_first": torch.tensor(True),
        "channels_last": whole.to(memory_format=torch.channels_last_3d),
        "part": whole[:, 2:4],
        "half": whole.to(torch.bfloat16),
        "REPEAT": torch.empty(0),
    }
    found = unpack_state(pack_state(state))
    assert list(found) == list(state)
    for name, value in state.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)
    assert found["channels_last"].stride() == state["channels_last"].stride()
    assert not found["half"].untyped_storage().data_ptr() == state["half"].untyped_storage().data_ptr()


class Counter:
    """A decoder whose state is how many latents it has seen."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.count = 0

    def push(self, latents, is_last=False):
        self.count += latents.shape[1]
        return torch.full((1,), self.count)

    def state(self):
        return {"count": torch.tensor(self.count)}

    def load_state(self, state):
        self.count = int(state["count"])


def test_every_film_goes_on_where_it_was_and_one_that_ended_begins_anew():
    films, latents = FilmDecoders(Counter()), torch.zeros(1, 3, 1, 1)
    seen = [int(films.at(film).push(latents)) for film in (0, 1, 0, 2, 1)]
    assert seen == [3, 3, 6, 3, 6]
    films.end(0)
    assert [int(films.state(film)["count"]) for film in (0, 1, 2)] == [0, 6, 3]
