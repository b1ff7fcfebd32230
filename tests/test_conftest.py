"""The rule of conftest.py that a skip is a failure where everything is installed (CI_NO_SKIP=1)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

TESTS = """
import pytest

def test_passes(): pass
def test_skips(): pytest.skip("no browser")
@pytest.mark.skipif(True, reason="no server")
def test_is_skipped(): pass
@pytest.fixture
def missing(): pytest.skip("no program")
def test_whose_fixture_skips(missing): pass
@pytest.mark.docker
def test_docker(): pytest.skip("no engine")
@pytest.mark.xfail
def test_expected_failure(): assert False
"""


@pytest.mark.parametrize(("no_skip", "failed", "skipped"), [("1", 3, 1), ("0", 0, 4)])
def test_a_skip_is_a_failure_in_ci_docker_excepted(tmp_path: Path, no_skip: str, failed: int, skipped: int) -> None:
    output = run_pytest(tmp_path, TESTS, no_skip)
    assert count(output, "passed") == 1
    assert count(output, "xfailed") == 1
    assert count(output, "failed") + count(output, "errors?") == failed
    assert count(output, "skipped") == skipped
    for reason in ("no browser", "no server", "no program"):
        assert (f"CI_NO_SKIP=1: {reason}" in output or f"CI_NO_SKIP=1: Skipped: {reason}" in output) == bool(failed)


def test_a_skipped_module_is_a_failure_in_ci(tmp_path: Path) -> None:
    text = "import pytest\npytest.importorskip('no_such_module')\n"
    assert count(run_pytest(tmp_path, text, "0"), "skipped") == 1
    output = run_pytest(tmp_path, text, "1")
    assert count(output, "errors?") == 1
    assert "no_such_module" in output


def run_pytest(directory: Path, text: str, no_skip: str) -> str:
    (directory / "test_sample.py").write_text(text)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "-rA", str(directory)],
        cwd=directory,
        env={**os.environ, "CI_NO_SKIP": no_skip, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    ).stdout


def count(output: str, what: str) -> int:
    found = re.search(rf"(\d+) {what}\b", output.splitlines()[-1])
    return int(found[1]) if found else 0
