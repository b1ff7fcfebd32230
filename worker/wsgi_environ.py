"""The ``environ`` of a WSGI request, from the ASGI scope of the same request. No I/O.

PEP 3333, "environ Variables"; the meta-variables are those of CGI (RFC 3875 section 4.1). What belongs to the
running exchange (wsgi.input, wsgi.errors) is handed in. A new variable is one line in ``build_environ()``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import unquote_to_bytes

__all__ = ["build_environ"]

Environ = dict[str, Any]

# Headers that have a variable without HTTP_ (RFC 3875 sections 4.1.2 and 4.1.3).
_PLAIN: Final = frozenset({"CONTENT_TYPE", "CONTENT_LENGTH"})
# HTTP_PROXY would be read as the proxy for our own outgoing requests (httpoxy, CVE-2016-5385).
_DROPPED: Final = frozenset({b"proxy"})
_DEFAULT_PORTS: Final = {"http": "80", "https": "443"}


def build_environ(scope: Mapping[str, Any], *, wsgi_input: Any, wsgi_errors: Any, file_wrapper: Any) -> Environ:
    """Return a new environ for a scope of type "http"."""
    scheme: str = scope.get("scheme", "http")
    root_path: str = scope.get("root_path", "")
    host, port = scope.get("server") or ("localhost", None)
    if port is None:  # a unix socket: PEP 3333 wants a name and a port all the same, and never empty ones
        host, port = "localhost", _DEFAULT_PORTS.get(scheme, "80")
    # Of a client on a unix socket nothing is known; applications expect the key.
    client_host, client_port = scope.get("client") or ("", None)
    environ: Environ = {
        "REQUEST_METHOD": scope["method"],
        "SCRIPT_NAME": _as_wsgi(root_path.rstrip("/").encode()),
        "PATH_INFO": _as_wsgi(_path_bytes(scope, root_path)),
        "QUERY_STRING": _as_wsgi(scope.get("query_string", b"")),
        "SERVER_PROTOCOL": f"HTTP/{scope.get('http_version', '1.1')}",
        "SERVER_NAME": host,
        "SERVER_PORT": str(port),
        "REMOTE_ADDR": client_host,
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": scheme,
        "wsgi.input": wsgi_input,
        # The input ends where the body ends, also without a content-length: Werkzeug then reads chunked bodies.
        "wsgi.input_terminated": True,
        "wsgi.errors": wsgi_errors,
        "wsgi.file_wrapper": file_wrapper,
        "wsgi.multithread": True,
        "wsgi.multiprocess": True,
        "wsgi.run_once": False,
    }
    if client_port:
        environ["REMOTE_PORT"] = str(client_port)
    environ.update(_header_variables(scope.get("headers", ())))
    return environ


def _header_variables(headers: Any) -> dict[str, str]:
    """Header fields as variables; the values of a repeated one are joined in one pass.

    Appending value to value would copy a long one for each further value, a cost that the client chooses
    (CVE-2025-14550 in Django). How many there may be is the interface server's limit (128).
    """
    values: dict[str, list[str]] = {}
    for name, value in headers:
        # X_Forwarded_For would become the same variable as the X-Forwarded-For that a proxy checks.
        if b"_" in name or name in _DROPPED:
            continue
        variable = _as_wsgi(name).upper().replace("-", "_")
        if variable not in _PLAIN:
            variable = f"HTTP_{variable}"
        values.setdefault(variable, []).append(_as_wsgi(value))
    return {
        # RFC 9110 section 5.3; cookies are separated otherwise (RFC 6265 section 4.2.1, RFC 9113 section 8.2.3).
        variable: several[0] if len(several) == 1 else ("; " if variable == "HTTP_COOKIE" else ",").join(several)
        for variable, several in values.items()
    }


def _path_bytes(scope: Mapping[str, Any], root_path: str) -> bytes:
    """The path below ``root_path``, percent-decoded: the client's bytes, also where they are not UTF-8."""
    raw_path = scope.get("raw_path")
    path: bytes = scope["path"].encode() if raw_path is None else unquote_to_bytes(raw_path)
    root = unquote_to_bytes(root_path)
    if root and path.startswith(root):
        path = path[len(root) :]
        if root.endswith(b"/") and not path.startswith(b"/"):
            path = b"/" + path
    return path


def _as_wsgi(data: bytes) -> str:
    # PEP 3333, "Unicode Issues": a str of code points 0 to 255, each standing for a byte.
    return data.decode("latin-1")
