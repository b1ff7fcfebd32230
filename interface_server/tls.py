"""TLS of the listening socket: certificates, what is negotiated, what applications are told about it.

    TlsContext     the operator's files as an OpenSSL context; read again by ``reload``
    TlsTransport   one TLS connection: Twisted's, with ends that HTTP needs
    wrap_factory   makes TLS connections of the sockets that a port accepts

Lives here: everything about OpenSSL. Does not: what is spoken inside (http1.py), whether a proxy spoke TLS to the
client (protocol/proxy_headers.py). TLS to the broker is channel_layer's.

**Ends.** ``loseConnection`` sends close_notify behind what is written and closes the socket behind that, without
waiting for the client's close_notify, which RFC 8446 section 6.1 does not ask for and many clients never send.
``loseWriteConnection`` sends close_notify and ends our side of the socket only: what still comes is read until the
client ends its side. A client's close_notify, or the end of its socket, is the end of the connection: TLS libraries
do not let their users half-close, so nobody waits for an answer behind it.

**Pauses.** A protocol that pauses gets nothing more, as from a TCP transport: what came with what it paused at, the
client's close_notify too, waits in OpenSSL. Twisted's would go on, and a client that sends and leaves at once would
be gone before what it sent is read. So do the records behind some small ones, until the others have had their turn.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import ssl
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from OpenSSL import SSL
from twisted.internet.interfaces import IHalfCloseableProtocol, IOpenSSLServerConnectionCreator
from twisted.internet.main import CONNECTION_DONE
from twisted.protocols.tls import BufferingTLSTransport, TLSMemoryBIOFactory
from twisted.python.failure import Failure
from zope.interface import implementer

from interface_server.settings import InterfaceSettings
from interface_server.transports import OwnTransport, buffered_bytes, socket_descriptor

__all__ = ["TlsContext", "TlsSettingsError", "TlsTransport", "wrap_factory"]

# Records of one client that are read in one turn of the loop: of the smallest a read of 64 KiB holds 2,000, of the
# largest four. The others wait for the next turn, and the socket is not read.
TURN_RECORDS_MAX: Final = 16
# What an incomplete record may have: the largest (RFC 8446 section 5.2, RFC 5246 section 6.2.3), and its head.
_RECORD_BYTES_MAX: Final = 5 + 2**14 + 2048
# What a record has at least beside its content: its head, and 16 bytes of authentication.
_RECORD_OVERHEAD_BYTES: Final = 21

_LOGGER: Final = logging.getLogger("trunkline.interface")

# Of TLS 1.2: forward secrecy and AEAD; none of them is forbidden to HTTP/2 (RFC 9113 appendix A). OpenSSL's own
# choice for TLS 1.3 is fine.
_CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"
_MIN_VERSIONS: Final = {"tlsv1.2": SSL.TLS1_2_VERSION, "tlsv1.3": SSL.TLS1_3_VERSION}
_VERIFY_MODES: Final = {
    "none": SSL.VERIFY_NONE,
    "optional": SSL.VERIFY_PEER,
    "required": SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT,
}


class TlsSettingsError(Exception):
    """The operator's certificate, key or choices cannot be used; the text is the line for the operator."""


@implementer(IOpenSSLServerConnectionCreator)
class TlsContext:
    """What all TLS connections of a process share. Raises TlsSettingsError."""

    def __init__(self, settings: InterfaceSettings, *, alpn: Sequence[bytes]) -> None:
        self._settings = settings
        self._alpn = tuple(alpn)  # best first
        self._context, self.server_certificate = _load(settings, self._select_protocol)
        self.reload_count = 0

    def __repr__(self) -> str:
        return f"<TlsContext {self._settings.ssl_certfile} alpn={self._alpn} reloads={self.reload_count}>"

    @property
    def certfile(self) -> str | None:
        return self._settings.ssl_certfile

    def reload(self) -> None:
        """Read the files again, for connections that come from now on. On TlsSettingsError all stays as it was."""
        self._context, self.server_certificate = _load(self._settings, self._select_protocol)
        self.reload_count += 1

    # Called by Twisted and OpenSSL

    def serverConnectionForTLS(self, transport: TlsTransport) -> SSL.Connection:
        transport.server_certificate = self.server_certificate
        connection = _Connection(self._context, None)
        connection.set_accept_state()
        return connection

    def _select_protocol(self, connection: SSL.Connection, offered: list[bytes]) -> Any:
        for name in self._alpn:
            if name in offered:
                return name
        return SSL.NO_OVERLAPPING_PROTOCOLS  # goes on without ALPN: HTTP/1.1


def _load(
    settings: InterfaceSettings, select_protocol: Callable[[SSL.Connection, list[bytes]], Any]
) -> tuple[SSL.Context, str]:
    """Return a context, and the server's certificate as PEM."""
    assert settings.ssl_certfile is not None
    certificate_path = settings.ssl_certfile
    key_path = settings.ssl_keyfile or certificate_path
    leaf = _load_certificate(certificate_path)
    password = None if settings.ssl_keyfile_password is None else settings.ssl_keyfile_password.encode()
    key = _load_key(key_path, certificate_path, password, leaf)

    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(_MIN_VERSIONS[settings.ssl_min_version])
    # Compression is CRIME; renegotiation costs a server more than its client.
    context.set_options(SSL.OP_NO_COMPRESSION | SSL.OP_NO_RENEGOTIATION | SSL.OP_CIPHER_SERVER_PREFERENCE)
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)  # 34 KiB less for each idle connection
    try:
        context.set_cipher_list((settings.ssl_ciphers or _CIPHERS).encode())
    except (SSL.Error, UnicodeEncodeError):
        raise TlsSettingsError(f"--ssl-ciphers: {settings.ssl_ciphers!r} selects no cipher OpenSSL knows") from None
    try:
        context.use_certificate_chain_file(certificate_path)
        context.use_privatekey(key)
        context.check_privatekey()
    except SSL.Error as error:
        raise TlsSettingsError(f"{certificate_path} and {key_path} cannot be used: {_reason(error)}") from error
    if settings.ssl_ca_certs is not None:
        _check_authorities(settings.ssl_ca_certs)
        context.load_verify_locations(settings.ssl_ca_certs)
        context.load_client_ca(settings.ssl_ca_certs.encode())
        context.set_verify(_VERIFY_MODES[settings.ssl_cert_reqs])
        # Without one OpenSSL refuses to resume sessions of clients that showed a certificate.
        context.set_session_id(b"trunkline")
    context.set_alpn_select_callback(select_protocol)
    return context, leaf.public_bytes(serialization.Encoding.PEM).decode("ascii")


def _read(path: str, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise TlsSettingsError(f"the {what} {path} cannot be read: {error.strerror}") from error


def _load_certificate(path: str) -> x509.Certificate:
    try:
        leaf = x509.load_pem_x509_certificates(_read(path, "certificate"))[0]
    except ValueError as error:
        raise TlsSettingsError(f"the certificate {path} is not a certificate in PEM") from error
    if leaf.not_valid_after_utc < datetime.datetime.now(datetime.UTC):
        _LOGGER.warning("the certificate %s has expired on %s", path, leaf.not_valid_after_utc.date())
    return leaf


def _load_key(path: str, certificate_path: str, password: bytes | None, leaf: x509.Certificate) -> Any:
    data = _read(path, "key")
    try:
        key = serialization.load_pem_private_key(data, password)
    except TypeError as error:  # a password for a key without one, or the other way round
        if password is None:
            raise TlsSettingsError(f"the key {path} is encrypted: --ssl-keyfile-password is expected") from error
        key = serialization.load_pem_private_key(data, None)  # OpenSSL does not mind either
    except ValueError as error:
        if b"ENCRYPTED" in data and password is not None:
            raise TlsSettingsError(f"the key {path} cannot be decrypted with --ssl-keyfile-password") from error
        raise TlsSettingsError(f"{path} holds no private key in PEM") from error
    encoding = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    if key.public_key().public_bytes(*encoding) != leaf.public_key().public_bytes(*encoding):
        raise TlsSettingsError(f"the key {path} does not belong to the certificate {certificate_path}")
    return key


def _check_authorities(path: str) -> None:
    try:
        x509.load_pem_x509_certificates(_read(path, "certificates of --ssl-ca-certs"))
    except ValueError as error:
        raise TlsSettingsError(f"--ssl-ca-certs: {path} holds no certificates in PEM") from error


def _reason(error: SSL.Error) -> str:
    """OpenSSL's own words; its errors are lists of (library, function, reason)."""
    entries = error.args[0] if error.args else ()
    return "; ".join(entry[2] for entry in entries) or "OpenSSL does not say why"


class _Connection(SSL.Connection):
    """Gives nothing of what it has while it is paused, and some records in a turn."""

    is_paused = False
    records_left = TURN_RECORDS_MAX  # of this turn
    has_more = False  # perhaps: it was asked for what it did not give
    held_bytes = 0  # at most
    _last_written_bytes = 0

    def begin_turn(self) -> None:
        self.records_left = TURN_RECORDS_MAX
        self.has_more = False

    def bio_write(self, buf: bytes | bytearray | memoryview) -> int:
        self._last_written_bytes = len(buf)
        self.held_bytes += len(buf)
        return super().bio_write(buf)

    def do_handshake(self) -> None:
        super().do_handshake()
        self.held_bytes = self._last_written_bytes  # all before that is read

    def recv(self, bufsiz: int, flags: int | None = None) -> bytes:
        """A record; Twisted asks for more than the largest."""
        if self.is_paused or not self.records_left:
            self.has_more = True
            raise SSL.WantReadError
        self.records_left -= 1
        try:
            data = super().recv(bufsiz, flags)
        except SSL.WantReadError:
            self.held_bytes = min(self.held_bytes, _RECORD_BYTES_MAX)
            raise
        self.held_bytes = max(0, self.held_bytes - len(data) - _RECORD_OVERHEAD_BYTES)
        return data


@implementer(IHalfCloseableProtocol)
class TlsTransport(OwnTransport, BufferingTLSTransport):
    """See "Ends" in the module's docstring. All else of a TCP transport is there too, by way of Twisted's wrapper."""

    transport: Any
    wrappedProtocol: Any
    _aggregator: Any
    _tlsConnection: Any  # a _Connection; None when it is lost
    _reads_on = False  # a call of _read_on is on its way
    server_certificate = ""  # as PEM; set when the connection is made

    def buffered_bytes(self) -> int:
        """Bytes the kernel has not taken, with those that wait to be encrypted: for the end of this loop turn, or
        for the handshake.
        """
        waiting = sum(map(len, getattr(self._aggregator, "_buffer", ())))
        return waiting + sum(map(len, self._appSendBuffer)) + buffered_bytes(self.transport)

    def held_bytes(self) -> int:
        return 0 if self._tlsConnection is None else int(self._tlsConnection.held_bytes)

    def socket_descriptor(self) -> int:
        return socket_descriptor(self.transport)

    def pauseProducing(self) -> None:
        if self._tlsConnection is not None:
            self._tlsConnection.is_paused = True
        self.transport.pauseProducing()

    def resumeProducing(self) -> None:
        connection: _Connection | None = self._tlsConnection
        if connection is not None:
            connection.is_paused = False
            if connection.has_more:
                self._await_turn()  # the protocol may be in the midst of things
                return
        self.transport.resumeProducing()

    def _await_turn(self) -> None:
        if not self._reads_on:
            self._reads_on = True
            asyncio.get_running_loop().call_soon(self._read_on)

    def _read_on(self) -> None:
        """Read what waits in OpenSSL; the socket again behind that."""
        self._reads_on = False
        connection: _Connection | None = self._tlsConnection
        if connection is None or connection.is_paused or self._aborted:
            return
        connection.begin_turn()
        try:
            self._flushReceiveBIO()  # type: ignore[no-untyped-call]
        except Exception:
            _LOGGER.exception("reading %r failed", self.wrappedProtocol)
            if self._tlsConnection is not None:
                self.abortConnection()  # type: ignore[no-untyped-call]
            return
        if self._tlsConnection is not None and not self._tlsConnection.is_paused:
            self.resumeProducing()

    def describe_tls(self) -> dict[str, Any]:
        """Return ``scope["extensions"]["tls"]`` (ASGI "TLS Extension" 0.2), once hands are shaken."""
        return _describe(self._tlsConnection, self.server_certificate)

    def loseConnection(self) -> None:
        super().loseConnection()
        if self.connected and not self._appSendBuffer and self._producer is None:
            self.transport.loseConnection()

    def loseWriteConnection(self) -> None:
        self._aggregator.flush()
        if self._lostTLSConnection or not self._handshakeDone or self._appSendBuffer:
            self.loseConnection()
            return
        try:
            self._tlsConnection.shutdown()
        except SSL.Error:  # already: then the socket's own end is what is left
            _LOGGER.debug("no close_notify could be sent", exc_info=True)
        self._flushSendBIO()
        self.transport.loseWriteConnection()

    # Called by the TCP transport

    def dataReceived(self, data: bytes) -> None:
        connection: _Connection = self._tlsConnection
        connection.begin_turn()
        super().dataReceived(data)  # type: ignore[no-untyped-call]
        if connection.has_more and not connection.is_paused:
            self.transport.pauseProducing()
            self._await_turn()

    def readConnectionLost(self) -> None:
        self.transport.connectionLost(Failure(CONNECTION_DONE))  # type: ignore[no-untyped-call]

    def writeConnectionLost(self) -> None:
        if IHalfCloseableProtocol.providedBy(self.wrappedProtocol):
            self.wrappedProtocol.writeConnectionLost()

    # Called by Twisted's part of this transport

    def _flushSendBIO(self) -> None:
        # The TCP transport has nothing more to write and called connectionLost at once: nothing can be sent.
        if self._tlsConnection is not None:
            super()._flushSendBIO()  # type: ignore[no-untyped-call]

    def _tlsShutdownFinished(self, reason: Failure | None) -> None:
        super()._tlsShutdownFinished(reason)  # type: ignore[no-untyped-call]
        # What a producer writes from now on is dropped, and a TCP transport that waits for it would never close.
        self.transport.unregisterProducer()


def wrap_factory(factory: Any, context: TlsContext, reactor: Any) -> TLSMemoryBIOFactory:
    """Return a factory whose connections speak TLS and hold a protocol of ``factory`` inside."""
    wrapped = TLSMemoryBIOFactory(context, False, factory, reactor)  # type: ignore[arg-type]
    wrapped.protocol = TlsTransport
    return wrapped


# The ASGI extension


def _describe(connection: Any, server_certificate: str) -> dict[str, Any]:
    leaf = connection.get_peer_certificate(as_cryptography=True)
    chain: list[x509.Certificate] = []
    if leaf is not None:
        # A server gets the chain without the client's own certificate.
        others = connection.get_peer_cert_chain(as_cryptography=True) or ()
        chain = [leaf, *(certificate for certificate in others if certificate != leaf)]
    return {
        "server_cert": server_certificate,
        "client_cert_chain": [item.public_bytes(serialization.Encoding.PEM).decode("ascii") for item in chain],
        "client_cert_name": None if leaf is None else leaf.subject.rfc4514_string(),
        # A certificate that OpenSSL does not accept ends the handshake, so no application hears of one.
        "client_cert_error": None,
        "tls_version": connection.get_protocol_version(),
        "cipher_suite": _cipher_numbers().get(connection.get_cipher_name() or ""),
    }


@cache
def _cipher_numbers() -> dict[str, int]:
    """Numbers of cipher suites in the IANA registry by OpenSSL's names, which is all that pyOpenSSL tells."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers("ALL:COMPLEMENTOFALL:@SECLEVEL=0")
    return {cipher["name"]: int(cipher["id"]) & 0xFFFF for cipher in context.get_ciphers()}
