"""Which network addresses may be reached on a client's behalf: those that anybody on the internet can reach, too."""

from __future__ import annotations

import ipaddress

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_AZURE_PLATFORM = ipaddress.IPv4Address("168.63.129.16")
"""Public by its number, and within Azure the machine's own platform."""


def is_public(address: IPAddress) -> bool:
    """Whether it is one host's on the public internet; one that carries an IPv4 address in it, by that as well."""
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not (
            address.is_multicast or address.is_reserved or address.is_unspecified or address == _AZURE_PLATFORM
        )
    if address.scope_id is not None:
        return False
    if address in _NAT64:  # a network without IPv4 reaches all of IPv4 here
        return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    if address not in _GLOBAL_UNICAST or not address.is_global:  # mapped and compatible IPv4 lie outside
        return False
    # Newer Pythons call all of 6to4 private, or not, by their own lists; what is inside decides as well.
    return address.sixtofour is None or is_public(address.sixtofour)
