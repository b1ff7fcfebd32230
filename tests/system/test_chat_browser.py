"""The chat in two browser windows, driven as people use it."""

import os
import shutil
import signal

import pytest

from tests.system.processes import Served

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


def enter(browser, url, name):
    """Open a window in a session of its own, under a name."""
    page = browser.new_context().new_page()
    page.set_default_timeout(20_000)
    page.add_init_script(f"if (!sessionStorage.name) sessionStorage.name = {name!r}")
    page.goto(url)
    page.wait_for_selector("#state[data-state=open]")
    return page


def say(page, text):
    page.fill("#text", text)
    page.press("#text", "Enter")


def people(page, *names):
    """Wait until exactly these people are shown."""
    page.wait_for_function(
        "names => [...document.querySelectorAll('#people li')].map(li => li.textContent).join() === names.join()",
        arg=sorted(names),
    )


def test_two_windows_exchange_messages_and_survive_a_dead_worker(browser):
    with Served("chat:application", "--app-dir", "examples/chat", "--workers", "1") as served:
        ada = enter(browser, served.url, "Ada")
        grace = enter(browser, served.url, "Grace")
        people(ada, "Ada", "Grace")
        people(grace, "Ada", "Grace")
        say(ada, "hello <b>Grace</b>")
        grace.wait_for_selector("#said .line >> text=hello <b>Grace</b>")
        say(grace, "hello Ada")
        ada.wait_for_selector("#said .line >> text=hello Ada")

        # The worker dies: the pages come back by themselves, and everybody is still here.
        with ada.expect_websocket(timeout=20_000), grace.expect_websocket(timeout=20_000):
            os.kill(served.pids("worker")[0], signal.SIGKILL)
        for page in (ada, grace):
            page.wait_for_selector("#state[data-state=open]")
            people(page, "Ada", "Grace")
        say(ada, "are we back?")
        grace.wait_for_selector("#said .line >> text=are we back?")

        # A name changes, a room changes, somebody leaves.
        grace.fill("#name", "Admiral Grace")
        grace.press("#name", "Enter")
        people(ada, "Ada", "Admiral Grace")
        grace.fill("#other-room", "kitchen")
        grace.press("#other-room", "Enter")
        grace.wait_for_selector("#room >> text=kitchen")
        people(grace, "Admiral Grace")
        people(ada, "Ada")
        if os.environ.get("TRUNKLINE_SCREENSHOT"):  # for people who change the page
            ada.screenshot(path=os.environ["TRUNKLINE_SCREENSHOT"])
        ada.context.close()
        grace.context.close()
