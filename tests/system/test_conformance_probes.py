"""The probes of the comparison with other servers (`make conformance`), one test each: here all of them must pass.

What they ask and how is in benchmarks/conformance/; docs/conformance.md names them as proofs of its rows.
"""

import pytest

from benchmarks.conformance import probes_http, probes_lifespan, probes_websocket  # noqa: F401 - they register probes
from benchmarks.conformance.probe import PROBES, Server
from benchmarks.conformance.servers import SERVERS

TRUNKLINE = SERVERS[0]


@pytest.fixture(scope="module")
def running():
    with TRUNKLINE.start() as server:
        yield server


@pytest.mark.parametrize("probe", [p for p in PROBES if not p.needs_launcher], ids=lambda probe: probe.name)
def test_probe(running, probe):
    probe.run(Server(running))  # Failed is an AssertionError; NotOffered fails, too: we offer everything asked for


@pytest.mark.parametrize("probe", [p for p in PROBES if p.needs_launcher], ids=lambda probe: probe.name)
def test_probe_that_starts_servers(probe):
    probe.run(TRUNKLINE)
