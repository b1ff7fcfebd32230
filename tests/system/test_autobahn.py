"""The Autobahn test suite without its groups 12 and 13, which take long: `make autobahn` runs those, too."""

import subprocess
import sys

import pytest

from tests.system.processes import ROOT

# Each with the number of its cases, so that a runner that finds none is noticed.
GROUPS = {
    "frames, pings, fragments, UTF-8, closes": (("1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "10.*"), 247),
    "large messages": (("9.*",), 54),
    # Of each of the seven offers of group 13, and of group 12: a size that is left as it is, one in one frame, one in
    # fragments.
    "compression": ((*(f"12.{n}.{m}" for n in (1, 3) for m in (1, 5, 11)), *(f"13.{n}.6" for n in range(1, 8))), 13),
}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.timeout(300)
def test_all_cases_pass(name):
    patterns, count = GROUPS[name]
    command = [sys.executable, "-m", "tests.autobahn.run", "--cases", *patterns]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"\n{count} cases: " in done.stdout
    assert "UNIMPLEMENTED" not in done.stdout
