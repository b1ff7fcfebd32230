"""Log levels and --log-config."""

import json
import logging
import subprocess
import sys

import pytest

from trunkline.logs import configure_logging
from trunkline.options import UsageError

SHOW = """
import logging, sys
from trunkline.logs import configure_logging
configure_logging({level!r}, {config!r})
logging.getLogger("trunkline.worker").info("from the worker")
logging.getLogger("trunkline.access").info("a request")
logging.getLogger("application").warning("from elsewhere")
"""


def run(level=None, config=None):
    code = SHOW.format(level=level, config=config)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)


def test_default_look():
    shown = run()
    assert shown.stderr == "INFO:     from the worker\nWARNING:  from elsewhere\n"
    assert shown.stdout == "INFO:     a request\n"


def test_an_application_may_set_up_the_root_logger(tmp_path):
    code = SHOW.format(level=None, config=None).replace(
        'logging.getLogger("trunkline.worker")',
        f"logging.basicConfig(filename={str(tmp_path / 'log')!r}, level=logging.INFO)\n"
        'logging.getLogger("application").info("hello")\n'
        'logging.getLogger("trunkline.worker")',
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert shown.stderr == "INFO:     from the worker\n"
    assert (tmp_path / "log").read_text() == "INFO:application:hello\nWARNING:application:from elsewhere\n"


def test_a_level_hides_what_is_below():
    shown = run(level="warning")
    assert shown.stderr == "WARNING:  from elsewhere\n"
    assert shown.stdout == ""


def test_json_configuration(tmp_path):
    path = tmp_path / "log.json"
    handler = {"class": "logging.FileHandler", "filename": str(tmp_path / "log")}
    path.write_text(
        json.dumps({"version": 1, "handlers": {"file": handler}, "root": {"handlers": ["file"], "level": "INFO"}})
    )
    run(config=str(path))
    assert (tmp_path / "log").read_text() == "from the worker\na request\nfrom elsewhere\n"


def test_a_broken_configuration_is_named(tmp_path):
    path = tmp_path / "log.json"
    path.write_text("{")
    before = logging.getLogger("trunkline").handlers[:]
    with pytest.raises(UsageError, match=r"--log-config: .*log\.json cannot be used"):
        configure_logging(None, str(path))
    assert logging.getLogger("trunkline").handlers == before


def test_a_class_that_cannot_be_imported_is_named(tmp_path):
    path = tmp_path / "log.json"
    path.write_text(json.dumps({"version": 1, "formatters": {"json": {"()": "no_such_package.Json"}}}))
    with pytest.raises(UsageError, match=r"log\.json cannot be used: .*No module named 'no_such_package'"):
        configure_logging(None, str(path))


def test_a_configuration_without_sections_is_one_line(tmp_path):
    path = tmp_path / "log.ini"
    path.write_text("no section")
    with pytest.raises(UsageError, match=r"--log-config: .*log\.ini cannot be used: .*no section headers") as caught:
        configure_logging(None, str(path))
    assert "\n" not in str(caught.value)
