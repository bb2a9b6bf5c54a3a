"""Slurm's node lists, and on which network ranks meet."""

from __future__ import annotations

import socket
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longvid.errors import InputError
from longvid.launch.hosts import hosts_of
from longvid.launch.network import interface_towards, listening_address, require_interface

NAME = st.from_regex(r"[a-z][a-z0-9.]{0,5}[a-z-]", fullmatch=True)


@st.composite
def brackets(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A bracket and its numbers."""
    width, spans, numbers = draw(st.integers(1, 4)), [], []
    for first, length in draw(st.lists(st.tuples(st.integers(0, 90), st.integers(1, 9)), min_size=1, max_size=3)):
        spans.append(f"{first:0{width}}" + (f"-{first + length - 1:0{width}}" if length > 1 else ""))
        numbers += [f"{number:0{width}}" for number in range(first, first + length)]
    return f"[{','.join(spans)}]", numbers


@st.composite
def entries(draw: st.DrawFn) -> tuple[str, list[str]]:
    """`rack[1-2]node[01-04]` and the like."""
    text, hosts = "", [""]
    for _ in range(draw(st.integers(1, 2))):
        name, (bracket, numbers) = draw(NAME), draw(brackets())
        text, hosts = text + name, [host + name for host in hosts]
        if draw(st.booleans()):
            text, hosts = text + bracket, [host + number for host in hosts for number in numbers]
    return text, hosts


@given(st.lists(entries(), min_size=1, max_size=4))
def test_a_node_list_names_all_its_hosts_in_order(parts: list[tuple[str, list[str]]]) -> None:
    assert list(hosts_of(",".join(text for text, _ in parts))) == [host for _, hosts in parts for host in hosts]


def test_numbers_are_as_wide_as_they_are_written() -> None:
    assert list(hosts_of("gpu[03-05,07],login1")) == ["gpu03", "gpu04", "gpu05", "gpu07", "login1"]
    assert list(hosts_of("n[9-11]-ib")) == ["n9-ib", "n10-ib", "n11-ib"]


def test_hosts_come_one_at_a_time() -> None:
    assert list(islice(hosts_of("a,b[0-999999999]"), 2)) == ["a", "b0"]


@pytest.mark.parametrize("text", ["", ",", "a,", "a[", "a[]", "a[1-]", "a[x]", "a b", "a[1]]", "a[1,,2]", "a[2-1]"])
def test_what_is_no_node_list_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is no list of"):
        list(hosts_of(text))


def test_ranks_of_one_machine_meet_where_nobody_else_comes() -> None:
    assert listening_address("localhost", is_one_machine=True) == "127.0.0.1"
    assert listening_address("127.0.0.1", is_one_machine=False) == "127.0.0.1"
    loopback = interface_towards("127.0.0.1", is_one_machine=False)
    assert loopback in {name for _, name in socket.if_nameindex()}
    require_interface("GLOO_SOCKET_IFNAME", f"{loopback},nowhere0")


def test_a_name_that_means_the_machine_itself_is_not_where_others_look(monkeypatch: pytest.MonkeyPatch) -> None:
    # As Debian writes the machine's own name into /etc/hosts.
    entry = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [entry])
    assert listening_address("gpu03", is_one_machine=True) == "127.0.1.1"
    assert listening_address("gpu03", is_one_machine=False) == ""


def test_wrong_hosts_and_interfaces_are_named() -> None:
    with pytest.raises(InputError, match=r"nowhere\.invalid, which has no address"):
        listening_address("nowhere.invalid", is_one_machine=True)
    with pytest.raises(InputError, match="GLOO_SOCKET_IFNAME=nowhere0: this machine has no such interface, but"):
        require_interface("GLOO_SOCKET_IFNAME", "nowhere0")
