"""`make conformance`: the same questions to Trunkline and four other servers, and a table of what they answered.

    python -m benchmarks.conformance                        all servers; writes docs/conformance_comparison.md
    python -m benchmarks.conformance --servers trunkline,daphne --only A9,W12     a part, printed only
    python -m benchmarks.conformance --only empty_messages_are_sent               one probe by its name

Lives here: running probes and the table. What is asked is in probes_*.py, the rules for it in probe.py, the servers
in servers.py.
"""

from __future__ import annotations

import argparse
import platform
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks.conformance import probes_http, probes_lifespan, probes_websocket
from benchmarks.conformance.client import Failed, NotOffered
from benchmarks.conformance.probe import MUST, PROBES, SHOULD, Probe, Server
from benchmarks.conformance.servers import SERVERS, Kind, RunningServer

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "conformance_comparison.md"
PASS, FAIL, NOT_OFFERED = "✓", "✗", "–"
LEVELS = {MUST: "demanded", SHOULD: "recommended"}
MODULES = {
    "HTTP": probes_http,
    "WebSocket": probes_websocket,
    "Lifespan": probes_lifespan,
}


HEAD = f"""# Five servers, the same questions

Written by `make conformance` on {{date}}: {{count}} probes, each a conversation over raw sockets with the same
application under each server, as it is installed from PyPI, with one worker process. The probes are in
`benchmarks/conformance/`; [conformance.md](conformance.md) has the rows, and what we decided where the texts leave a
choice.

*Demanded* (d) is what the texts demand, *recommended* (r) is what they recommend with a "should", or expect. What
they leave to the server is not asked. {PASS} done, {FAIL} not done, {NOT_OFFERED} not offered: the row is about an
option, or came with a newer version of the specification than the server announces (none announced is 2.0). What
fails is asked again of a new process.

The probes were written for Trunkline and are among its tests, so that it does all of them says little; what the
others do not, says more. A probe that asks what no text says is a fault: tell us."""


@dataclass(frozen=True)
class Result:
    mark: str
    text: str = ""


class Prober:
    """Asks one server everything.

    What fails is asked again of a new process, so that no server pays for what an earlier probe has done to it.
    """

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self._stack = ExitStack()
        self._running: RunningServer | None = None

    def __enter__(self) -> Prober:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def ask(self, probe: Probe) -> Result:
        result = self._ask(probe)
        if result.mark == FAIL:
            self._stop()
            result = self._ask(probe)
        return result

    def _ask(self, probe: Probe) -> Result:
        try:
            if probe.needs_launcher:
                probe.run(self.kind)
            else:
                probe.run(Server(self._server()))
        except NotOffered as reason:
            return Result(NOT_OFFERED, str(reason))
        except Failed as failure:
            return Result(FAIL, str(failure))
        except (OSError, RuntimeError, LookupError) as error:  # what a broken connection does to a probe
            return Result(FAIL, f"{type(error).__name__}: {error}")
        return Result(PASS)

    def _server(self) -> RunningServer:
        if self._running is None:
            self._running = self._stack.enter_context(self.kind.start())
        return self._running

    def _stop(self) -> None:
        self._running = None
        self._stack.close()


def run(kinds: Sequence[Kind], probes: Sequence[Probe]) -> dict[str, dict[str, Result]]:
    """Results by the name of the server, then by that of the probe."""
    results: dict[str, dict[str, Result]] = {}
    for kind in kinds:
        begun = time.monotonic()
        mine = results[kind.name] = {}
        with Prober(kind) as prober:
            for probe in probes:
                mine[probe.name] = result = prober.ask(probe)
                if result.mark != PASS:
                    print(f"{kind.name}: {result.mark} {probe.row} {probe.title}: {result.text}", flush=True)
        print(f"{kind.name}: {len(probes)} probes in {time.monotonic() - begun:.0f} s", flush=True)
    return results


def totals(results: dict[str, Result], probes: Sequence[Probe], level: str) -> tuple[int, int, int]:
    """(passed, failed, not offered)"""
    marks = [results[probe.name].mark for probe in probes if probe.level == level]
    return marks.count(PASS), marks.count(FAIL), marks.count(NOT_OFFERED)


def write(kinds: Sequence[Kind], probes: Sequence[Probe], results: dict[str, dict[str, Result]]) -> str:
    """The document."""
    names = [kind.name for kind in kinds]
    lines = [
        *HEAD.format(date=time.strftime("%Y-%m-%d"), count=len(probes)).splitlines(),
        "",
        "| | " + " | ".join(f"{kind.name} {version(kind.package)}" for kind in kinds) + " |",
        "|---|" + "---|" * len(kinds),
    ]
    for level, title in LEVELS.items():
        for index, (mark, what) in enumerate(((PASS, "done"), (FAIL, "not done"), (NOT_OFFERED, "not offered"))):
            cells = [str(totals(results[name], probes, level)[index]) for name in names]
            lines.append(f"| {title}: {what} {mark} | " + " | ".join(cells) + " |")
    lines += ["", f"Python {platform.python_version()}, {platform.system()} {platform.machine()}.", ""]
    for section, module in MODULES.items():
        mine = [probe for probe in probes if probe.run.__module__ == module.__name__]
        if not mine:
            continue
        lines += [f"## {section}", "", "| row | what is asked |  | " + " | ".join(names) + " |"]
        lines.append("|---|---|---|" + "---|" * len(kinds))
        for probe in mine:
            marks = " | ".join(results[name][probe.name].mark for name in names)
            lines.append(f"| {probe.row} | {probe.title} | {probe.level_letter} | {marks} |")
        lines.append("")
    lines += ["## What was seen instead", ""]
    for name in names:
        failed = [(probe, result) for probe in probes if (result := results[name][probe.name]).mark == FAIL]
        lines += [f"**{name}**" + ("" if failed else ": nothing failed."), ""]
        for probe, result in failed:
            text = " ".join(result.text.replace("|", "/").replace("`", "'").split())
            lines.append(f"- {probe.row}, {probe.title.partition(' (')[0]}: `{text}`")
        lines.append("") if failed else None
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--servers", default="", help="names, separated by commas")
    parser.add_argument("--only", default="", help="rows or names of probes, separated by commas")
    arguments = parser.parse_args()
    socket.setdefaulttimeout(10)
    wanted = arguments.servers.lower().split(",")
    kinds = [kind for kind in SERVERS if not arguments.servers or kind.name.lower() in wanted]
    only = set(arguments.only.split(",")) - {""}
    probes = [probe for probe in PROBES if not only or {probe.row, probe.name} & only]
    if not kinds or not probes:
        parser.error("no such server or probe")
    results = run(kinds, probes)
    print()
    width = max(len(probe.title) for probe in probes)
    print(" " * (width + 9) + "  ".join(kind.name for kind in kinds))
    for probe in probes:
        marks = "  ".join(results[kind.name][probe.name].mark.center(len(kind.name)) for kind in kinds)
        print(f"{probe.row:4} {probe.level_letter}  {probe.title:{width}}  {marks}")
    for level, title in LEVELS.items():
        for kind in kinds:
            passed, failed, absent = totals(results[kind.name], probes, level)
            print(f"{title}: {kind.name}: {passed} done, {failed} not done, {absent} not offered")
    if not arguments.servers and not only:
        DOCUMENT.write_text(write(kinds, probes, results), "utf-8")
        print(f"written: {DOCUMENT}")
    return int(any(result.mark == FAIL for result in results.get("Trunkline", {}).values()))


if __name__ == "__main__":
    sys.exit(main())
