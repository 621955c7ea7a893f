"""What a process listens on, from the kernel's own tables."""

from __future__ import annotations

import ipaddress
import struct
from contextlib import suppress
from pathlib import Path

_LISTENS = "0A"


def listening_beyond_loopback(pid: int) -> list[str]:
    """Addresses with ports of TCP sockets on which others than this machine could reach the process."""
    return [f"{address}:{port}" for address, port in listening(pid) if not address.is_loopback]


def listening(pid: int) -> list[tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]]:
    """Addresses and ports of TCP sockets on which the process listens."""
    own = set()
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # of reading the folder itself
            own.add(str(handle.readlink()))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = words = line.split()
            if state == _LISTENS and f"socket:[{words[9]}]" in own:
                address, port = local.split(":")
                found.append((_address(bytes.fromhex(address)), int(port, 16)))
    return found


def _address(kernels: bytes) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Words of 32 bits in the machine's own order of bytes."""
    words = struct.unpack(f"={len(kernels) // 4}I", kernels)
    packed = b"".join(struct.pack("!I", word) for word in words)
    if len(packed) == 4:
        return ipaddress.IPv4Address(packed)
    address = ipaddress.IPv6Address(packed)
    return address.ipv4_mapped or address
