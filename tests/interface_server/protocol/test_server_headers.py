from __future__ import annotations

from interface_server.protocol.server_headers import ServerHeaders


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_date_server_and_the_operators_headers() -> None:
    clock = Clock()
    headers = ServerHeaders(date=True, server=True, extra=((b"x-a", b"1"), (b"x-a", b"2")), clock=clock)
    clock.now = 784111777.5
    assert headers.refresh().pairs == (
        (b"date", b"Sun, 06 Nov 1994 08:49:37 GMT"),
        (b"server", b"trunkline"),
        (b"x-a", b"1"),
        (b"x-a", b"2"),
    )
    assert headers.lines == b"date: Sun, 06 Nov 1994 08:49:37 GMT\r\nserver: trunkline\r\nx-a: 1\r\nx-a: 2\r\n"


def test_rendered_once_a_second() -> None:
    clock = Clock()
    headers = ServerHeaders(date=True, server=True, clock=clock)
    clock.now = 10.0
    first = headers.refresh().lines
    clock.now = 10.9
    assert headers.refresh().lines is first
    clock.now = 11.0
    assert headers.refresh().lines == first.replace(b"00:00:10", b"00:00:11")


def test_either_can_be_switched_off() -> None:
    assert ServerHeaders(date=False, server=True, clock=Clock()).refresh().lines == b"server: trunkline\r\n"
    assert ServerHeaders(date=False, server=False, clock=Clock()).refresh().lines == b""


def test_the_operators_replace_ours() -> None:
    extra = ((b"Server", b"mine"), (b"Date", b"never"))
    assert ServerHeaders(date=True, server=True, extra=extra, clock=Clock()).refresh().pairs == extra


def test_the_applications_replace_all() -> None:
    headers = ServerHeaders(date=True, server=True, extra=((b"X-A", b"1"),), clock=Clock()).refresh()
    assert headers.lines_without({b"content-type"}) is headers.lines
    assert headers.lines_without({b"server", b"x-a"}) == b"date: Thu, 01 Jan 1970 00:00:00 GMT\r\n"
