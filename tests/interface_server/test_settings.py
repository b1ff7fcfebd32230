"""InterfaceSettings refuses what cannot work, and names the field."""

import dataclasses

import pytest

from interface_server.settings import InterfaceSettings


def test_defaults_are_valid_and_frozen():
    settings = InterfaceSettings(redis_url="redis://localhost")
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.port = 1


def test_no_secret_is_shown():
    settings = InterfaceSettings(
        redis_url="redis://:hidden@localhost", encryption_keys=("hidden",), ssl_keyfile_password="hidden"
    )
    assert "hidden" not in repr(settings)


def test_every_field_but_the_url_has_a_default():
    required = [
        field.name
        for field in dataclasses.fields(InterfaceSettings)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    assert required == ["redis_url"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", -1),
        ("port", 65536),
        ("backlog", 0),
        ("request_line_bytes_max", 0),
        ("head_bytes_max", 0),
        ("headers_max", 0),
        ("ws_max_size_bytes", 0),
        ("opening_capacity", 0),
        ("client_buffer_bytes_max", 0),
        ("buffer_memory_bytes_max", 0),
        ("queue_timeout_s", 0.0),
        ("queue_timeout_s", float("nan")),
        ("header_timeout_s", -1.0),
        ("ws_handshake_timeout_s", 0.0),
        ("broker_wait_s", -0.1),
        ("keep_alive_timeout_s", -1.0),
        ("body_timeout_s", -1.0),
        ("ws_ping_interval_s", -1.0),
        ("ws_ping_timeout_s", -1.0),
        ("ws_close_timeout_s", -1.0),
        ("connections_max", -1),
        ("drain_timeout_s", -1.0),
        ("window_bytes", 65536),
    ],
)
def test_a_value_that_cannot_work_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} is"):
        InterfaceSettings(redis_url="redis://localhost", **{name: value})


@pytest.mark.parametrize("header", [(b"", b"x"), (b"a\r", b"x"), (b"a", b"x\ny"), (b"a", b"\0")])
def test_an_extra_header_cannot_split_the_response(header):
    with pytest.raises(ValueError, match="extra header"):
        InterfaceSettings(redis_url="redis://localhost", extra_headers=(header,))
