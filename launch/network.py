"""Where this machine's ranks listen and connect: on no more of its networks than the others need."""

from __future__ import annotations

import ipaddress
import socket
import struct
from contextlib import suppress

from longvid.errors import InputError

LOOPBACK = "127.0.0.1"
_ELSEWHERE = "192.0.2.1"
"""An address of nobody (RFC 5737): asking for the way there sends nothing."""
_SIOCGIFADDR = 0x8915
_DISCARD_PORT = 9


def is_loopback(address: str) -> bool:
    """Whether a number, or the name `localhost`, is that of the machine itself."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def resolve(host: str) -> str:
    """A host's address, IPv4 where it has one. Raises InputError."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise InputError(f"the ranks shall meet at {host}, which has no address here ({error.strerror})") from None
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return str(found[0][4][0])


def own_address(towards: str = _ELSEWHERE) -> str | None:
    """This machine's address on its way to another; None where there is no way."""
    family = socket.AF_INET6 if ":" in towards else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((towards, _DISCARD_PORT))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def listening_address(host: str, *, is_one_machine: bool) -> str:
    """Where rank 0 shall listen for those who know it as `host`: at that address alone.

    `""` (on all networks) where the name means the machine itself here, as Debian writes it into /etc/hosts, and ranks
    on other machines know it by another address.
    """
    address = resolve(host)
    is_hidden = is_loopback(address) and not is_loopback(host) and not is_one_machine
    return "" if is_hidden else address


def interface_towards(host: str, *, is_one_machine: bool) -> str | None:
    """The network interface on which this machine meets ranks that gather at `host`; None where that is unclear."""
    address = resolve(host)
    if is_loopback(address):
        is_here = is_loopback(host) or is_one_machine
        return interface_of(LOOPBACK if is_here else own_address())
    return interface_of(own_address(address))


def interface_of(address: str | None) -> str | None:
    """The interface that has an IPv4 address; None for others."""
    return next((name for name, own in _addresses().items() if own == address), None)


def require_interface(variable: str, name: str) -> None:
    """Raise InputError where none of the interfaces that a variable names (`eth0`, or `eth0,ib0`) is there."""
    names = {interface for _, interface in socket.if_nameindex()}
    if not names.intersection(name.split(",")):
        raise InputError(f"{variable}={name}: this machine has no such interface, but {', '.join(sorted(names))}")


def _addresses() -> dict[str, str]:
    """Interfaces and their IPv4 addresses (Linux)."""
    import fcntl

    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has none
                request = struct.pack("256s", name.encode()[:15])
                found[name] = socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
    return found
