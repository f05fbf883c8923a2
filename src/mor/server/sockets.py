"""The address of a server, taken before the model loads: a port in use is reported at once."""

from __future__ import annotations

import os
import socket

from mor.errors import MorError


def open_sockets(host: str, port: int) -> list[socket.socket]:
    """Bound sockets, one for each address of ``host``; they listen once the server starts.

    Args:
        host: a name or an address. An empty one would mean every interface: that is refused.
        port: 0 takes a free one.

    Raises:
        MorError: the host is not known or not ours, the port is taken or not allowed.
    """
    if not host.strip():
        raise MorError("host is empty; use 127.0.0.1, or 0.0.0.0 to be reached from elsewhere")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise MorError(f"host={host!r} is not known: {why}") from None
    opened: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            one = socket.socket(family, kind, protocol)
            opened.append(one)
            if os.name == "posix":  # to use a port again soon after a server on it has ended
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind(address)
    except OSError as error:
        for one in opened:
            one.close()
        raise refusal(host, port, error) from None
    return opened


def refusal(host: str, port: int, error: OSError) -> MorError:
    """Why no server can be at this address, in one sentence."""
    return MorError(f"port={port} on host={host!r} cannot be used: {error.strerror or error}")


def url_of(opened: socket.socket) -> str:
    """The address of a bound socket, as a browser takes it."""
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
