"""``trunkline health``: asks the admin port of a command how it is. The exit status answers: 0 well, 1 not."""

from __future__ import annotations

import http.client
import sys
from collections.abc import Mapping
from typing import Final

__all__ = ["ask"]

# A health check of a container commonly allows a few seconds.
TIMEOUT_S: Final = 3.0
_PATHS: Final[Mapping[str, str]] = {"ready": "/readyz", "live": "/healthz"}
# Addresses to listen on that are none to connect to.
_LOOPBACK: Final[Mapping[str, str]] = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


def ask(what: str, host: str, port: int) -> int:
    """Print the answer; return the exit status. ``what`` is "ready" or "live"."""
    host = _LOOPBACK.get(host, host)
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", _PATHS[what])
        answer = connection.getresponse()
        text = answer.read(65536).decode("utf-8", "replace").strip()
    except (OSError, UnicodeError, http.client.HTTPException) as error:  # UnicodeError: no name of a host
        print(f"trunkline: nothing answers on {host}:{port}: {error}", file=sys.stderr)
        return 1
    finally:
        connection.close()
    if answer.getheader("Content-Type") != "application/json":
        print(f"trunkline: what answers on {host}:{port} is not an admin port of Trunkline", file=sys.stderr)
        return 1
    print(text)
    return 0 if answer.status == 200 else 1
