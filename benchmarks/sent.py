"""Bytes that this process has sent to others, as the system counts them."""

from __future__ import annotations

import os
import socket
import struct
import sys
from pathlib import Path

# Offset of tcpi_bytes_sent and tcpi_bytes_retrans in Linux's struct tcp_info (linux/tcp.h; since 4.19).
_AT = 200


def sent_bytes() -> int | None:
    """Bytes written to the process's open TCP connections, without retransmissions; None if the system does not tell.

    gloo sends everything over such connections. So this counts what a library really sends, including headers and
    bookkeeping, whichever functions and threads it uses.

    Known limitations: this works only on Linux, and connections that have been closed no longer count.
    """
    if sys.platform != "linux":
        return None
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not os.readlink(entry).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as link:
                if link.type != socket.SOCK_STREAM or link.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                state = link.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except FileNotFoundError:
            continue  # the listing's own handle, or one closed meanwhile
        if len(state) < _AT + 16:
            return None
        sent, repeated = struct.unpack_from("QQ", state, _AT)
        total += sent - repeated
    return total
