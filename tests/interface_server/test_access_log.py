"""The lines of the access log, and that a client cannot forge one."""

import logging

import pytest

from interface_server.access_log import AccessLog, escape

CLIENT = ("127.0.0.1", 5000)


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="trunkline.access")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "trunkline.access"]


def test_http_line_with_and_without_the_application_s_time(lines):
    log = AccessLog()
    request = {"client": CLIENT, "method": "GET", "raw_path": b"/x", "http_version": "1.1", "status": 200}
    log.http(**request, query_string=b"", application_s=0.00312)
    log.http(**request, query_string=b"a=1&b=%20")
    assert lines() == [
        '127.0.0.1:5000 - "GET /x HTTP/1.1" 200 3.1ms',
        '127.0.0.1:5000 - "GET /x?a=1&b=%20 HTTP/1.1" 200',
    ]
    assert log.line_count == 2


def test_a_record_is_one_that_handlers_of_all_kinds_can_format(lines, caplog):
    AccessLog().websocket_closed(client=CLIENT, raw_path=b"/%s", query_string=b"%d", code=1000)
    (record,) = caplog.records
    shown = logging.Formatter("%(name)s %(levelname)s %(module)s %(funcName)s %(message)s").format(record)
    assert shown == ('trunkline.access INFO access_log AccessLog 127.0.0.1:5000 - "WebSocket /%s?%d" [closed 1000]')


def test_filters_of_the_logger_are_asked(lines):
    logger = logging.getLogger("trunkline.access")

    def refuse(record):
        return False

    logger.addFilter(refuse)
    try:
        AccessLog().websocket_accepted(client=CLIENT, raw_path=b"/", query_string=b"")
    finally:
        logger.removeFilter(refuse)
    assert lines() == []


def test_websocket_lines(lines):
    log = AccessLog()
    socket = {"client": CLIENT, "raw_path": b"/ws", "query_string": b"r=1"}
    log.websocket_accepted(**socket, application_s=0.002)
    log.websocket_refused(**socket, status=403)
    log.websocket_closed(**socket, code=1006, open_s=61.0427)
    assert lines() == [
        '127.0.0.1:5000 - "WebSocket /ws?r=1" [accepted] 2.0ms',
        '127.0.0.1:5000 - "WebSocket /ws?r=1" 403',
        '127.0.0.1:5000 - "WebSocket /ws?r=1" [closed 1006] 61042.7ms',
    ]


@pytest.mark.parametrize(
    ("client", "address"),
    [(None, "-"), (("::1", 5), "[::1]:5"), (("a\n127.0.0.1", 0), "a\\n127.0.0.1:0"), (("10.0.0.1", 0), "10.0.0.1:0")],
)
def test_addresses(lines, client, address):
    AccessLog().websocket_accepted(client=client, raw_path=b"/", query_string=b"")
    assert lines() == [f'{address} - "WebSocket /" [accepted]']


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("/plain-é_%41", "/plain-é_%41"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\x9b31m", "\\x9b31m"),
        ("a\r\nb\t\0", "a\\r\\nb\\t\\x00"),
        ('"', '\\"'),
        ("\\n", "\\\\n"),
        ("\u2028", "\\u2028"),
        ("\x7f", "\\x7f"),
    ],
)
def test_escape(text, escaped):
    assert escape(text) == escaped


def test_every_byte_of_a_path_stays_on_one_printable_line(lines):
    raw_path = bytes(range(256))
    AccessLog().websocket_accepted(client=CLIENT, raw_path=raw_path, query_string=raw_path)
    (line,) = lines()
    assert line.isprintable() or all(char.isprintable() or char in "\xa0\xad" for char in line)
    assert line.count('"') - line.count('\\"') == 2


def test_nothing_is_written_when_nobody_wants_it(lines, caplog):
    log = AccessLog(wanted=False)
    log.websocket_accepted(client=CLIENT, raw_path=b"/", query_string=b"")
    assert not log.enabled
    log = AccessLog()
    caplog.set_level(logging.WARNING, logger="trunkline.access")
    log.websocket_accepted(client=CLIENT, raw_path=b"/", query_string=b"")
    assert not log.enabled
    assert lines() == []
    assert log.line_count == 0
