"""The hosts that a Slurm node list names, such as `gpu[03-05,07],login1`. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from longvid.errors import InputError

_TEXT = r"[A-Za-z0-9._-]+"
_SPAN = r"[0-9]{1,9}(?:-[0-9]{1,9})?"
_BRACKET = rf"\[{_SPAN}(?:,{_SPAN})*\]"
_ENTRY = rf"(?:{_TEXT}|{_BRACKET})+"
_LIST = re.compile(rf"{_ENTRY}(?:,{_ENTRY})*")


def hosts_of(node_list: str) -> Iterator[str]:
    """The hosts, in order and one at a time: a bracket stands for each of its numbers, as wide as it is written.

    Raises InputError for what is no node list.
    """
    if not _LIST.fullmatch(node_list):
        raise InputError(f"{node_list!r} is no list of nodes: one looks like gpu[03-05,07],login1")
    for entry in re.findall(_ENTRY, node_list):
        yield from _expand(re.findall(rf"{_TEXT}|{_BRACKET}", entry))


def _expand(pieces: Sequence[str]) -> Iterator[str]:
    if not pieces:
        yield ""
        return
    first, *rest = pieces
    for start in _numbers(first) if first[0] == "[" else [first]:
        for end in _expand(rest):
            yield start + end


def _numbers(bracket: str) -> Iterator[str]:
    for span in bracket.strip("[]").split(","):
        first, _, last = span.partition("-")
        last = last or first
        if int(last) < int(first):
            raise InputError(f"{bracket} is no list of numbers: {span} ends before it begins")
        for number in range(int(first), int(last) + 1):
            yield f"{number:0{len(first)}}"
