"""What processes listen on."""

from __future__ import annotations

import ipaddress

import psutil

Places = set[tuple[int, str, int]]
"""Triples of a process, an address and a port."""


def listening(pids: set[int]) -> Places:
    return {
        (socket.pid, socket.laddr.ip, socket.laddr.port)
        for socket in psutil.net_connections("tcp")
        if socket.pid in pids and socket.status == psutil.CONN_LISTEN
    }


def beyond_loopback(places: Places) -> Places:
    """Where others than this machine could reach them."""
    return {place for place in places if not _is_loopback(place[1])}


def of_the_store_at(port: int) -> set[int]:
    """Processes that talk to it, wherever they were started: all ranks, and what ranks have started of the kind."""
    return {socket.pid for socket in psutil.net_connections("tcp") if socket.raddr and socket.raddr.port == port}


def _is_loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return ((isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped) or parsed).is_loopback
