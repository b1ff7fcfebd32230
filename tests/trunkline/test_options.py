"""The flags of the commands: parsing, environment variables, errors, and handing them on."""

import os

import pytest

from channel_layer.process_life import STATUS_VARIABLE
from trunkline.options import (
    OPTIONS,
    UsageError,
    build_parser,
    find_unknown_variables,
    load_env_file,
    parse,
    render_flags,
    render_secrets,
)


def parsed(*argv, environ=None):
    return parse(build_parser("1.2.3"), argv, environ or {})


def test_absent_flags_are_none_so_that_the_settings_decide():
    options = parsed("serve", "main:app")
    assert options.app == "main:app"
    assert options.port is None
    assert options.proxy_headers is None
    assert options.header is None


def test_flags_are_converted():
    options = parsed(
        *("serve", "main:app", "--port", "80", "--ws-ping-interval", "0", "--no-access-log", "--reload"),
        *("--header", "X-One: 1", "--header", "X-Two:2", "--log-level", "DEBUG"),
    )
    assert options.port == 80
    assert options.ws_ping_interval == 0
    assert options.access_log is False
    assert options.reload is True
    assert options.header == ((b"x-one", b"1"), (b"x-two", b"2"))
    assert options.log_level == "debug"


def test_every_flag_has_an_environment_variable_and_the_flag_wins():
    environ = {"TRUNKLINE_PORT": "81", "TRUNKLINE_ACCESS_LOG": "false", "TRUNKLINE_REDIS": "redis://elsewhere"}
    options = parsed("interface", "--redis", "redis://here", environ=environ)
    assert options.port == 81
    assert options.access_log is False
    assert options.redis == "redis://here"


def test_the_application_may_come_from_the_environment():
    assert parsed("worker", environ={"TRUNKLINE_APP": "main:app"}).app == "main:app"


def test_variables_of_other_commands_are_not_looked_at():
    options = parsed("worker", "main:app", environ={"TRUNKLINE_PORT": "not a number"})
    assert not hasattr(options, "port")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "a command is expected: serve, interface, worker, health"),
        (["serve"], "trunkline serve: APP is expected"),
        (["serve", "a:b", "--port", "eighty"], "--port: 'eighty' is not valid: a whole number is expected"),
        (["serve", "a:b", "--port", "65536"], "--port: '65536' is not valid: 0 to 65535 expected"),
        (["serve", "a:b", "--workers", "0"], "--workers: '0' is not valid: 1 to 1024 expected"),
        (["serve", "a:b", "--queue-timeout", "nan"], "--queue-timeout: 'nan' is not valid"),
        (["serve", "a:b", "--header", "no colon"], "--header: 'no colon' is not valid: Name:Value is expected"),
        (["serve", "a:b", "--header", "a: b\r\nc: d"], "Name:Value is expected"),
        (["serve", "a:b", "--header", "a b: c"], "Name:Value is expected, as HTTP writes it"),
        (["serve", "a:b", "--header", "a: \x01"], "Name:Value is expected, as HTTP writes it"),
        (["serve", "a:b", "--header", "a: €"], "Name:Value is expected, as HTTP writes it"),
        (
            ["serve", "a:b", "--drain-timeout", "1e20"],
            "--drain-timeout: '1e20' is not valid: at most 31536000 seconds",
        ),
        (
            ["serve", "a:b", "--encryption-keys", ""],
            "--encryption-keys: '' is not valid: a key, or @FILE, is expected",
        ),
        (
            ["serve", "a:b", "--prefix", "a b"],
            "--prefix: 'a b' is not valid: ASCII letters, digits",
        ),
        (["serve", "a:b", "--reload-dir", "/"], "--reload-dir is given, and --reload is not"),
        (["interface", "--fd", "3", "--uds", "/tmp/x"], "--fd and --uds are given, one of them is expected"),
        (["interface", "--uds-permissions", "660"], "--uds-permissions is given, and --uds is not"),
        (
            ["interface", "--uds", "/tmp/x", "--uds-permissions", "rw"],
            "--uds-permissions: 'rw' is not valid: three octal digits are expected",
        ),
        (
            ["worker", "a:b", "--channel", "x", "--protocol", "tcp"],
            "--channel and --protocol are given: a worker for background work takes no connections",
        ),
        (
            ["interface", "--forwarded-allow-ips", "10.0.0.1/8"],
            "--forwarded-allow-ips: '10.0.0.1/8' is not valid: addresses, networks such as 10.0.0.0/8",
        ),
        (["interface", "--forwarded-allow-ips", "::1,localhost"], "--forwarded-allow-ips: 'localhost' is not valid"),
        (["interface", "--forwarded-allow-ips", "10.0.0.256"], "--forwarded-allow-ips: '10.0.0.256' is not valid"),
        (["serve", "a:b", "--work", "2"], "unrecognized arguments: --work"),
        (["serve", "a:b", "--log-level", "loud"], "one of critical, error"),
        (["serve", "a:b", "--app-dir", "/nowhere/at/all"], "--app-dir: '/nowhere/at/all' is not valid: no such dir"),
        (["worker", "a:b", "--port", "80"], "unrecognized arguments: --port"),
        (["sevre", "a:b"], "invalid choice: 'sevre'"),
    ],
)
def test_wrong_input_is_one_line_that_names_the_value(argv, text):
    with pytest.raises(UsageError) as caught:
        parsed(*argv)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "flags",
    [
        ("--forwarded-allow-ips", "*"),
        ("--forwarded-allow-ips", "127.0.0.1, ::1,10.0.0.0/8,fd00::/8,/run/app.sock,"),
        ("--forwarded-allow-ips", "app.sock", "--uds", "app.sock", "--uds-permissions", "0660"),
        ("--forwarded-allow-ips", "run/app.sock", "-e", "unix:run/app.sock", "--uds-permissions", "660"),
    ],
)
def test_whom_to_believe_may_be_given_in_all_these_ways(flags):
    assert parsed("interface", *flags).forwarded_allow_ips == flags[1]


def test_unknown_variables_are_named_with_what_was_meant():
    environ = {
        "TRUNKLINE_WORKER": "4",
        "TRUNKLINE_APP": "a:b",
        "TRUNKLINE_REDIS": "x",
        "TRUNKLINE_XYZZY": "",
        "A": "",
    }
    assert find_unknown_variables(environ) == [
        "the environment variable TRUNKLINE_WORKER means nothing to this release, did you mean TRUNKLINE_WORKERS?",
        "the environment variable TRUNKLINE_XYZZY means nothing to this release",
    ]


def test_a_wrong_environment_variable_is_named():
    with pytest.raises(UsageError, match=r"TRUNKLINE_PORT: 'x' is not valid"):
        parsed("serve", "a:b", environ={"TRUNKLINE_PORT": "x"})
    with pytest.raises(UsageError, match=r"TRUNKLINE_RELOAD='perhaps' is not valid: true or false"):
        parsed("serve", "a:b", environ={"TRUNKLINE_RELOAD": "perhaps"})


def test_env_file_stands_behind_the_environment(tmp_path):
    path = tmp_path / "env"
    path.write_text("# comment\nexport TRUNKLINE_PORT=82\nTRUNKLINE_HOST='0.0.0.0'\n\nOTHER = \"x y\"\n")
    options = parsed("serve", "a:b", "--env-file", str(path), environ={"TRUNKLINE_HOST": "::1"})
    assert options.port == 82
    assert options.host == "::1"


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("A=1 # a note", "1"),
        ("A=#fff", "#fff"),
        ("A='1 # 2' # a note", "1 # 2"),
        ('A="x"#y', "x"),
        ("A=x#y", "x#y"),
        ('A="it\'s"', "it's"),
        ("A='", "'"),
        ("A=${HOME}", "${HOME}"),
    ],
)
def test_values_of_an_env_file(tmp_path, monkeypatch, line, value):
    path = tmp_path / "env"
    path.write_text(line)
    monkeypatch.setenv("A", "")  # so that it is put back
    monkeypatch.delenv("A")
    load_env_file(str(path))
    assert os.environ["A"] == value


def test_a_wrong_env_file_names_its_line(tmp_path):
    path = tmp_path / "env"
    path.write_text("A=1\nwhat is this\n")
    with pytest.raises(UsageError, match=r"line 2: NAME=value is expected, got 'what is this'"):
        parsed("serve", "a:b", "--env-file", str(path))
    with pytest.raises(UsageError, match="cannot be read"):
        parsed("serve", "a:b", "--env-file", str(tmp_path / "absent"))


def test_supervised_processes_get_the_same_values():
    argv = (
        *("--redis", "unix:///tmp/x", "--root-path", "/api", "--header", "X-One: 1", "--no-date-header"),
        *("--ws-max-size", "1000", "--timeout-keep-alive", "2.5", "--forwarded-allow-ips", "10.0.0.0/8,::1"),
    )
    options = parsed("serve", "a:b", *argv, "--workers", "4", "--reload")
    secrets = render_secrets(options, "interface")
    assert secrets == {"TRUNKLINE_REDIS": "unix:///tmp/x"}  # it may hold a password: not for everybody's ps
    again = parsed("interface", *render_flags(options, "interface"), environ=secrets)
    for name in ("redis", "root_path", "header", "date_header", "ws_max_size", "timeout_keep_alive"):
        assert getattr(again, name) == getattr(options, name), name
    assert render_flags(options, "worker") == []


def test_supervised_processes_do_not_read_the_variables_again():
    """The sockets that they name are open already, and serve knows nothing of a worker's."""
    environ = {
        "TRUNKLINE_HOST": "0.0.0.0",
        "TRUNKLINE_PORT": "8080",
        "TRUNKLINE_UDS": "app.sock",
        "TRUNKLINE_FD": "3",
        "TRUNKLINE_UDS_PERMISSIONS": "660",
        "TRUNKLINE_FORWARDED_ALLOW_IPS": "app.sock",
        "TRUNKLINE_ROOT_PATH": "/a",
        "TRUNKLINE_INTERFACES": "2",
        "TRUNKLINE_WORKERS": "2",
        "TRUNKLINE_ADMIN_PORT": "8001",
        "TRUNKLINE_CHANNEL": "thumbnails",
        "TRUNKLINE_PROTOCOL": "tcp",
        "TRUNKLINE_THREADS": "3",
        "TRUNKLINE_REDIS": "redis://:secret@elsewhere",
        "TRUNKLINE_ENCRYPTION_KEYS": "one\ntwo",
        "TRUNKLINE_SSL_KEYFILE_PASSWORD": "secret",
        "TRUNKLINE_LOG_LEVEL": "debug",
    }
    options = parsed("serve", "a:b", environ={**environ, "TRUNKLINE_FD": ""})
    sockets = ("host", "port", "uds", "fd", "uds_permissions")
    again = {}
    for command, argv, skip in (("interface", ("-e", "adopted:7"), sockets), ("worker", ("a:b",), ())):
        flags = render_flags(options, command, skip=skip)
        secrets = render_secrets(options, command)
        again[command] = parsed(command, *argv, *flags, environ={**environ, **secrets, STATUS_VARIABLE: "5"})
        for option in OPTIONS:
            if command in option.commands and option.name not in (*sockets, "endpoint"):
                is_kept = option.name in vars(options) and not option.for_supervisor
                expected = getattr(options, option.name) if is_kept else None
                assert getattr(again[command], option.name) == expected, option.flag
    assert [getattr(again["interface"], name) for name in sockets] == [None] * 5
    assert again["interface"].forwarded_allow_ips == "app.sock"
    assert again["interface"].ssl_keyfile_password == "secret"
    assert again["worker"].channel is None
    assert again["worker"].protocol == ("tcp",)
    assert again["worker"].encryption_keys == ("one", "two")


def test_flags_are_unique_and_fill_fields_that_exist():
    from dataclasses import fields

    from interface_server.settings import InterfaceSettings
    from worker.settings import WorkerSettings

    names = {field.name for cls in (InterfaceSettings, WorkerSettings) for field in fields(cls)}
    elsewhere = {"log_level", "log_config", "env_file"}  # the roof's own
    for command in ("interface", "worker"):
        rows = [option for option in OPTIONS if command in option.commands and not option.for_supervisor]
        assert len({option.flag for option in rows}) == len(rows)
        assert {option.setting for option in rows} - elsewhere <= names
