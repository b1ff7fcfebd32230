"""docs/sync_code.md, statement by statement: which thread and which loop run what."""

import concurrent.futures
import contextlib
import json
from functools import partial

import httpx
import pytest
from websockets.sync.client import connect

from tests.system.processes import Served

APP = "tests.system.sync_code_app"


@pytest.fixture(scope="module")
def plain():
    # One worker, so that all requests meet in one process.
    with Served(f"{APP}:asgi3", "--lifespan", "off", env={"ASGI_THREADS": "4"}) as running:
        yield running


@pytest.fixture(scope="module")
def site():
    with Served(f"{APP}:site") as running:
        yield running


def together(served, path, count=6):
    """What ``count`` requests of the same moment answer."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        answers = pool.map(partial(httpx.get, timeout=60), [f"{served.url}/{path}"] * count)
        return [answer.json() for answer in answers]


def threads_of(answers):
    return {answer["thread"] for answer in answers}


def test_async_code_runs_on_the_one_loop_in_the_main_thread(plain):
    answers = together(plain, "plain")
    assert all(answer["is_main"] for answer in answers)
    assert len({answer["loop"] for answer in answers}) == 1


def test_a_blocking_call_in_async_code_stops_everything_else(plain):
    answers = together(plain, "blocking", 3)
    assert [answer["together"] for answer in answers] == [1, 1, 1]
    assert all(answer["is_main"] for answer in answers)


def test_a_request_that_blocks_its_worker_for_long_runs_once(tmp_path):
    environment = {"BEGUN_FILE": str(tmp_path / "begun")}
    with Served(f"{APP}:asgi3", "--lifespan", "off", "--workers", "3", env=environment) as served:
        assert httpx.get(f"{served.url}/blocking_for_long", timeout=30).json() == {"begun": 1}
        assert "was lost" not in served.output


def test_sync_to_async_runs_on_one_thread_for_the_whole_worker(plain):
    answers = together(plain, "sensitive", 3)
    assert [answer["together"] for answer in answers] == [1, 1, 1]
    assert len(threads_of(answers)) == 1
    assert not answers[0]["is_main"]


def test_a_thread_sensitive_context_has_a_thread_of_its_own(plain):
    answers = together(plain, "sensitive_in_context", 6)
    assert max(answer["together"] for answer in answers) == 6  # not bounded by ASGI_THREADS
    assert len(threads_of(answers)) == 6


@pytest.mark.parametrize("view", ["insensitive", "to_thread"])
def test_insensitive_code_shares_the_pool_of_the_loop(plain, view):
    answers = together(plain, view, 8)
    assert max(answer["together"] for answer in answers) == 4  # ASGI_THREADS
    assert all(answer["name"].startswith("application") for answer in answers)


def test_context_variables_go_into_threads_and_come_back_and_stay_within_a_request(plain):
    for _ in range(2):
        assert httpx.get(plain.url + "/context", timeout=60).json() == {
            "before": "unset",
            "there": "of the request",
            "back": "of the thread",
        }


def test_async_to_sync_below_sync_to_async_comes_back_to_the_loop(plain):
    answer = httpx.get(plain.url + "/around", timeout=60).json()
    assert not answer["thread"]["is_main"]
    assert answer["again"] == answer["first"]


def test_both_calls_of_asgi_2_run_on_the_loop():
    with Served(f"{APP}:asgi2", "--lifespan", "off") as served:
        answer = httpx.get(served.url, timeout=60).json()
        assert answer["made"] == answer["run"]
        assert answer["made"]["is_main"]


def test_sync_views_of_django_run_beside_each_other_each_in_a_thread_of_its_own(site):
    answers = together(site, "sync", 6)
    assert max(answer["together"] for answer in answers) == 6
    assert len(threads_of(answers)) == 6
    assert not any(answer["is_main"] for answer in answers)
    assert httpx.get(site.url + "/async", timeout=60).json()["is_main"]


def test_sync_consumers_of_a_worker_share_one_thread(site):
    """Of all WebSockets together: Channels gives them no thread-sensitive context."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(site.ws_url + "/")) for _ in range(3)]
        for client in clients:
            client.send("x")
        answers = [json.loads(client.recv(timeout=60)) for client in clients]
    assert [answer["together"] for answer in answers] == [1, 1, 1]
    assert len(threads_of(answers)) == 1
    assert not answers[0]["is_main"]


def test_the_channel_layer_works_from_a_sync_view(site):
    answer = httpx.get(site.url + "/tell", timeout=60).json()
    assert answer["call"]["text"] == "told"
    assert not answer["view"]["is_main"]
    assert answer["call"]["is_main"]  # the loop of the worker, which the request came from


def test_wsgi_requests_have_a_thread_each_and_the_rest_waits():
    with Served(f"{APP}:wsgi", "--interface", "wsgi", "--threads", "3") as served:
        answers = together(served, "", 6)
        assert max(answer["together"] for answer in answers) == 3
        assert len(threads_of(answers)) <= 3
        assert all(answer["name"].startswith("wsgi") for answer in answers)
        for answer in answers:
            assert answer["before"] == "unset"
            assert answer["variable"] == "of the request"
            assert answer["iterated"]["thread"] == answer["thread"]
            assert answer["iterated"]["variable"] == "of the request"
        # No loop is above a WSGI thread, so async_to_sync makes one for the call.
        tell = httpx.get(served.url + "/tell", timeout=60).json()
        assert tell["call"]["loop"] is not None
        assert not tell["call"]["is_main"]
