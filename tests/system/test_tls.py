"""TLS with the real command and real clients: curl, OpenSSL's, Python's, websockets."""

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time

import pytest
from cryptography import x509
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from tests.certificates import Authority
from tests.system.applications import CHUNK
from tests.system.processes import Command, Served, wait_until
from tests.system.test_transfers import Growth, digest_of_chunks

APP = "tests.system.applications:application"
MIB = 1024**2


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    authority = Authority(tmp_path_factory.mktemp("tls"))
    for name in ("server", "client"):
        authority.issue(name)
    return authority


@pytest.fixture(scope="module")
def served(authority):
    with Served(
        *(APP, "--ssl-certfile", str(authority.directory / "server.pem")),
        *("--ssl-keyfile", str(authority.directory / "server.key")),
        *("--ssl-ca-certs", str(authority.path), "--ssl-cert-reqs", "optional"),
    ) as running:
        yield running


def client_context(authority, *, with_certificate=False):
    context = ssl.create_default_context(cafile=authority.path)
    if with_certificate:
        context.load_cert_chain(authority.directory / "client.pem", authority.directory / "client.key")
    return context


def curl(authority, served, target, *flags):
    return subprocess.run(
        ["curl", "-sS", "--cacert", authority.path, *flags, f"https://localhost:{served.port}{target}"],
        capture_output=True,
        timeout=60,
        check=False,
    )


class TlsClient:
    """A TLS connection as a socket; ``raw`` is the TCP one below it."""

    def __init__(self, authority, served, *, receive_buffer=None):
        self.raw = socket.socket()
        if receive_buffer is not None:
            self.raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.raw.settimeout(30)
        self.raw.connect(("127.0.0.1", served.port))
        self.socket = client_context(authority).wrap_socket(self.raw, server_hostname="localhost")

    def __enter__(self):
        return self.socket

    def __exit__(self, *_):
        self.socket.close()


def read_all(client):
    """Everything until the server's close_notify. Python raises for an end without one."""
    received = bytearray()
    while data := client.recv(65536):
        received += data
    return bytes(received)


def test_curl(authority, served):
    answer = curl(authority, served, "/", "--http1.1", "-i")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.stdout.endswith(b"\r\n\r\nhello")
    assert "https://127.0.0.1:" in served.output


def test_the_tls_extension_without_a_client_certificate(authority, served):
    scope = json.loads(curl(authority, served, "/scope").stdout)
    assert scope["scheme"] == "https"
    assert scope["extensions"]["tls"] == {
        "server_cert": (authority.directory / "server.pem").read_text(),
        "client_cert_chain": [],
        "client_cert_name": None,
        "client_cert_error": None,
        "tls_version": 0x0304,
        "cipher_suite": 0x1302,
    }


def test_the_tls_extension_with_a_client_certificate(authority, served):
    certificate, key = authority.directory / "client.pem", authority.directory / "client.key"
    scope = json.loads(
        curl(
            *(authority, served, "/scope", "--cert", certificate, "--key", key),
            *("--tls-max", "1.2", "--ciphers", "ECDHE-ECDSA-AES128-GCM-SHA256"),
        ).stdout
    )
    tls = scope["extensions"]["tls"]
    assert tls["client_cert_chain"][0] == certificate.read_text()
    assert tls["client_cert_name"] == "CN=client,O=Test"
    assert (tls["tls_version"], tls["cipher_suite"]) == (0x0303, 0xC02B)


def test_a_client_certificate_of_somebody_else_ends_the_handshake(authority, served, tmp_path):
    certificate, key = Authority(tmp_path, "somebody else").issue("stranger")
    answer = curl(authority, served, "/", "--cert", certificate, "--key", key)
    assert answer.returncode != 0
    assert answer.stdout == b""


def test_without_tls_there_is_no_tls_extension():
    with Served(APP) as running:
        answer = subprocess.run(["curl", "-sS", f"{running.url}/scope"], capture_output=True, timeout=60, check=True)
        assert "tls" not in json.loads(answer.stdout)["extensions"]


@pytest.mark.parametrize(
    ("flags", "is_accepted"),
    [(["--tls-max", "1.1"], False), (["--tls-max", "1.2"], True), (["--tlsv1.3"], True)],
)
def test_versions(authority, served, flags, is_accepted):
    assert (curl(authority, served, "/", *flags).returncode == 0) is is_accepted


def test_openssl_client_with_a_resumed_session(authority, served, tmp_path):
    session = tmp_path / "session"
    command = [
        *("openssl", "s_client", "-connect", f"localhost:{served.port}", "-CAfile", str(authority.path)),
        *("-servername", "localhost", "-verify_return_error", "-ign_eof", "-alpn", "http/1.1"),
        *("-cert", str(authority.directory / "client.pem"), "-key", str(authority.directory / "client.key")),
    ]
    request = b"GET /scope HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    shown = []
    for flag in ("-sess_out", "-sess_in"):
        answer = subprocess.run([*command, flag, str(session)], input=request, capture_output=True, timeout=60)
        assert b"HTTP/1.1 200 OK" in answer.stdout, answer
        assert b"ALPN protocol: http/1.1" in answer.stdout
        assert b"CN=client,O=Test" in answer.stdout
        shown.append(b"Reused, TLSv1.3" in answer.stdout)
    assert shown == [False, True]


async def test_websocket(authority, served):
    # Not the client for threads: that reads the session tickets in one while it writes its request in the other.
    # OpenSSL does not allow that, and a few times in a thousand it waits for ever, at any server.
    url = f"wss://localhost:{served.port}"
    async with connect(f"{url}/echo", ssl=client_context(authority), max_size=None) as client:
        for size in (0, 1, 65536, 3_000_000):
            message = os.urandom(size)
            await client.send(message)
            assert await asyncio.wait_for(client.recv(), 60) == message
    async with connect(f"{url}/fail", ssl=client_context(authority)) as client:
        with pytest.raises(ConnectionClosed):
            await asyncio.wait_for(client.recv(), 60)
    assert client.close_code == 1011


def test_the_end_is_a_close_notify_behind_everything(authority, served):
    with TlsClient(authority, served) as client:
        client.sendall(b"GET /download?bytes=3000000 HTTP/1.0\r\nHost: x\r\n\r\n")
        answer = read_all(client)
    assert len(answer.partition(b"\r\n\r\n")[2]) == 3_000_000


def test_an_answer_that_does_not_wait_for_the_body_reaches_a_client_that_still_sends(authority, served):
    with TlsClient(authority, served) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\nConnection: close\r\n\r\n")
        for _ in range(20):
            client.sendall(bytes(10_000))
        answer = b""
        while b"hello" not in answer:
            data = client.recv(65536)
            assert data, answer
            answer += data
        assert client.recv(1) == b""  # close_notify, no reset


def test_a_bad_request_is_answered(authority, served):
    with TlsClient(authority, served) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n" + bytes(30_000))
        assert read_all(client).startswith(b"HTTP/1.1 400 ")


def test_an_idle_connection_is_closed_with_a_close_notify(authority):
    directory = authority.directory
    with Served(
        *(APP, "--ssl-certfile", str(directory / "server.pem"), "--ssl-keyfile", str(directory / "server.key")),
        *("--timeout-keep-alive", "1", "--timeout-headers", "6"),  # within it the one below has to say its request
    ) as running:
        with TlsClient(authority, running) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert read_all(client).endswith(b"hello")
        with socket.create_connection(("127.0.0.1", running.port)) as silent:  # never shakes hands
            silent.settimeout(30)
            begun = time.monotonic()
            with pytest.raises(ConnectionResetError):
                silent.recv(1)
            assert time.monotonic() - begun < 20


def test_a_client_that_vanishes_is_noticed(authority, served):
    for end in ("unwrap", "close"):
        with TlsClient(authority, served) as client:
            client.sendall(b"POST /hang?%s HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n" % end.encode())
            served.wait_for(rf"hang\?{end} has begun")
            if end == "unwrap":
                client.unwrap()  # close_notify, and the server's is awaited
            else:
                client.close()
        served.wait_for(rf"hang\?{end} is over", timeout_s=60)


def test_large_bodies_both_ways_and_a_slow_reader_cost_a_window(authority, served):
    count = 200 * MIB // len(CHUNK)
    with Growth(served) as growth:
        with TlsClient(authority, served) as client:
            client.sendall(b"POST /upload HTTP/1.0\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (200 * MIB))
            for _ in range(count):
                client.sendall(CHUNK)
            body = read_all(client).partition(b"\r\n\r\n")[2]
        assert json.loads(body)["sha256"] == digest_of_chunks(count)
        digest, size = hashlib.sha256(), 0
        slow_until = time.monotonic() + 3
        with TlsClient(authority, served, receive_buffer=65536) as client:
            client.sendall(b"GET /download?bytes=%d HTTP/1.0\r\nHost: x\r\n\r\n" % (200 * MIB))
            data = b""
            while b"\r\n\r\n" not in data:
                data += client.recv(65536)
            body = data.partition(b"\r\n\r\n")[2]
            while body:
                digest.update(body)
                size += len(body)
                if time.monotonic() < slow_until:
                    time.sleep(0.05)  # the client's pace
                body = client.recv(65536)
        assert (size, digest.hexdigest()) == (200 * MIB, digest_of_chunks(count))
    growth.check()


def test_an_application_that_does_not_receive_stops_the_client(authority, served):
    with Growth(served) as growth, TlsClient(authority, served) as client:
        client.sendall(b"POST /deaf HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
        client.settimeout(2)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 256 * MIB:
                client.sendall(CHUNK)
                sent += len(CHUNK)
        assert sent < 32 * MIB
    growth.check()


def test_certificates_are_read_again_on_sighup(authority, tmp_path):
    certificate, key = tmp_path / "cert.pem", tmp_path / "cert.key"
    for name, path in (("server.pem", certificate), ("server.key", key)):
        shutil.copy(authority.directory / name, path)

    def serial(running):
        pem = ssl.get_server_certificate(("127.0.0.1", running.port), timeout=60)
        return x509.load_pem_x509_certificate(pem.encode()).serial_number

    with Served(
        *(APP, "--interfaces", "2", "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)),
    ) as running:
        old = serial(running)
        with TlsClient(authority, running) as client:
            certificate.write_text("nothing")
            running.process.send_signal(signal.SIGHUP)
            running.wait_for(r"the certificate stays as it was: .*cert\.pem is not a certificate", count=2)
            assert serial(running) == old
            for source, path in zip(authority.issue("renewed"), (certificate, key), strict=True):
                shutil.copy(source, path)
            running.process.send_signal(signal.SIGHUP)
            running.wait_for(r"read the certificate .*cert\.pem again", count=2)
            assert {serial(running) for _ in range(8)} == {serial(running)} != {old}
            # What is connected stays connected, with what it has.
            client.sendall(b"GET /scope HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            scope = json.loads(read_all(client).partition(b"\r\n\r\n")[2])
            shown = x509.load_pem_x509_certificate(scope["extensions"]["tls"]["server_cert"].encode())
            assert shown.serial_number == old
        assert running.process.poll() is None


def test_the_password_of_a_key_stays_out_of_command_lines(authority):
    certificate, key = authority.issue("locked", password="open sesame")
    with Served(
        *(APP, "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)),
        env={"TRUNKLINE_SSL_KEYFILE_PASSWORD": "open sesame"},
    ) as running:
        assert curl(authority, running, "/").stdout == b"hello"
        wait_until(lambda: running.pids("interface server"), 30, "the interface server runs")
        for pid in (running.process.pid, *running.pids("interface server"), *running.pids("worker")):
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                assert b"sesame" not in file.read()


def test_wrong_files_are_one_line(authority, tmp_path):
    directory = authority.directory
    locked, locked_key = authority.issue("locked2", password="secret")
    certificate, key = str(directory / "server.pem"), str(directory / "server.key")
    text = tmp_path / "text"
    text.write_text("nothing")
    for flags, line in (
        (["--ssl-certfile", "/nowhere.pem"], "--ssl-certfile: '/nowhere.pem' is not valid: no such file"),
        (["--ssl-keyfile", key], "no certificate"),
        (["--ssl-certfile", str(text)], f"the certificate {text} is not a certificate in PEM"),
        (["--ssl-certfile", certificate], f"{certificate} holds no private key in PEM"),
        (["--ssl-certfile", certificate, "--ssl-keyfile", str(text)], f"{text} holds no private key in PEM"),
        (
            ["--ssl-certfile", certificate, "--ssl-keyfile", str(directory / "client.key")],
            f"the key {directory / 'client.key'} does not belong to the certificate {certificate}",
        ),
        (
            ["--ssl-certfile", str(locked), "--ssl-keyfile", str(locked_key)],
            f"the key {locked_key} is encrypted: --ssl-keyfile-password is expected",
        ),
        (
            ["--ssl-certfile", str(locked), "--ssl-keyfile", str(locked_key), "--ssl-keyfile-password", "x"],
            f"the key {locked_key} cannot be decrypted with --ssl-keyfile-password",
        ),
        (
            ["--ssl-certfile", certificate, "--ssl-keyfile", key, "--ssl-ciphers", "NONSENSE"],
            "--ssl-ciphers: 'NONSENSE' selects no cipher OpenSSL knows",
        ),
        (
            ["--ssl-certfile", certificate, "--ssl-keyfile", key, "--ssl-cert-reqs", "2"],
            "--ssl-ca-certs is to be given if, and only if, --ssl-cert-reqs asks for client certificates",
        ),
        (
            ["--ssl-certfile", certificate, "--ssl-keyfile", key, "--ssl-cert-reqs", "perhaps"],
            "--ssl-cert-reqs: 'perhaps' is not valid: one of none, optional, required is expected",
        ),
    ):
        command = Command("serve", APP, "--port", "0", *flags)
        status, output = command.wait_ended()
        command.stop()
        assert status == 2, (flags, output)
        assert line in output, (flags, output)
        assert "Traceback" not in output
        assert "INFO" not in output, "nothing was started for it"


def leave_with(authority, port, request, answer, data):
    """Say ``request``; behind ``answer`` send ``data`` and close_notify as one; return when the server has closed."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = client_context(authority).wrap_bio(incoming, outgoing, server_hostname="localhost")
    with socket.create_connection(("127.0.0.1", port), 60) as raw:

        def step(call, *arguments):
            while True:
                try:
                    return call(*arguments)
                except ssl.SSLWantReadError:
                    raw.sendall(outgoing.read())
                    incoming.write(raw.recv(65536))

        step(tls.do_handshake)
        tls.write(request)
        received = b""
        while answer not in received:
            received += step(tls.read, 65536)
        tls.write(data)
        with contextlib.suppress(ssl.SSLWantReadError):
            tls.unwrap()
        raw.sendall(outgoing.read())
        while raw.recv(65536):
            pass


async def test_messages_in_front_of_a_close_notify_are_read(authority, served):
    count = 500
    request = (
        b"GET /member?group=notified HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    messages = b"".join(b"\x81\xe4\0\0\0\0%0100d" % number for number in range(count))  # four records
    url = f"wss://localhost:{served.port}/member?group=notified"
    async with connect(url, ssl=client_context(authority), open_timeout=60) as observer:
        assert await asyncio.wait_for(observer.recv(), 60) == "joined"
        await asyncio.to_thread(leave_with, authority, served.port, request, b"joined", messages)
        taken = [await asyncio.wait_for(observer.recv(), 60) for _ in range(count)]
    assert taken == [f"{number:0100}" for number in range(count)]
