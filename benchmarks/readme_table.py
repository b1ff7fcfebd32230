"""Rewrite the table of README's "How fast it is" from the newest full run of `make bench`.

    python benchmarks/readme_table.py             from benchmarks/results/latest.json
    python benchmarks/readme_table.py --from quick --print     from another result, to the terminal only

Everything between the two markers is replaced: figures, ratios, marks, and on what they were measured. What stands
outside of them names no figure that changes. A row of the table is an entry in LINES; what a row of the benchmark is,
and what must be reached, stands in bench.py. Needs nothing but Python and the sources.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from bench import HERE, ROWS, Figure

README = HERE.parent / "README.md"
BEGIN = "<!-- figures: begin (make bench-readme) -->"
END = "<!-- figures: end -->"

# Row, figure, title, unit; ours, and the servers in the columns of uvicorn, granian and Daphne.
PLAIN = ("trunkline", "uvicorn", "granian", "daphne")
BY_HAND = ("trunkline", "uvicorn-redis", "granian-redis", "daphne-pubsub")
CONSUMER = ("trunkline-channels", "uvicorn-pubsub", "", "daphne-pubsub")
ALONE = ("trunkline", "", "", "")
LINES: tuple[tuple[str, str, str, str, tuple[str, str, str, str]], ...] = (
    ("broadcast", "cpu_us", "a message to 1,000 WebSockets of a group: each delivery", "µs", BY_HAND),
    ("consumer", "cpu_us", "the same by an unmodified Channels consumer", "µs", CONSUMER),
    ("http", "cpu_us", "HTTP hello, 64 connections: a request", "µs", PLAIN),
    ("http", "per_s", "… requests per second, each server with its defaults", "", PLAIN),
    ("http-one", "p50_ms", "HTTP hello, 1 connection: the median answer takes", "ms", PLAIN),
    ("echo", "cpu_us", "WebSocket echo, 64 clients: a message", "µs", PLAIN),
    ("connect", "per_s", "WebSockets opened per second, 128 at a time", "", PLAIN),
    ("idle", "server_kb", "an idle WebSocket: memory of the server", "KB", PLAIN),
    ("idle", "worker_kb", "… and of the worker", "KB", ALONE),
    ("broadcast-10k", "cpu_us", "a message to 10,000 WebSockets: each delivery", "µs", ALONE),
    ("http-1000", "cpu_us", "HTTP hello, 1,000 connections: a request", "µs", ("trunkline", "uvicorn", "", "")),
    (
        "http-beside-broadcast",
        "p99_ms",
        "an answer while 10,000 WebSockets are sent to: 99 of 100 within",
        "ms",
        ALONE,
    ),
)


def median(runs: dict[str, Any], row: str, server: str, key: str) -> float | None:
    values = [run[key] for run in runs.get(row, {}).get(server, []) if key in run]
    return statistics.median(values) if values else None


def number(value: float, figure: Figure) -> str:
    return f"{value:,.{figure.digits}f}"


def render(result: dict[str, Any], name: str) -> str:
    machine, runs = result["machine"], result["runs"]
    lines = [
        "| CPU time, or what is said | **Trunkline** | uvicorn | granian | Daphne | ours of uvicorn's | we want |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for row, key, title, unit, servers in LINES:
        figure = next(each for each in ROWS[row].figures if each.key == key)
        values = [median(runs, row, server, key) for server in servers]
        ours, uvicorn = values[:2]
        if ours is None:
            continue
        suffix = f" {unit}" if unit else ""
        cells = ["–" if value is None else f"{number(value, figure)}{suffix}" for value in values]
        cells[0] = f"**{cells[0]}**"
        cells.append(f"{ours / uvicorn:.2f}" if uvicorn else "")
        others = {server: value for server in runs[row] if (value := median(runs, row, server, key)) is not None}
        mark = figure.mark({server: value for server, value in others.items() if server != servers[0]})
        if mark is None:
            cells.append("")
        else:
            sign, met = ("≤", ours <= mark) if figure.better == "lower" else ("≥", ours >= mark)
            cells.append(f"{sign} {number(mark, figure)}{suffix}{'' if met else ': missed'}")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    versions = ", ".join(
        f"{each} {machine['packages'][each]}" for each in ("uvicorn", "granian", "daphne", "channels")
    )
    all_runs = [run for by_server in runs.values() for each in by_server.values() for run in each]
    repetitions = max(len(each) for by_server in runs.values() for each in by_server.values())
    failed = sum(1 for run in all_runs if run.get("error"))
    faults = f"; {failed} of {len(all_runs)} runs failed" if failed else ""
    lines += [
        "",
        f"Measured at revision {machine['revision']} on {machine['cores']} cores of {machine['processor']}, Python "
        f"{machine['python']}, {versions}; load average before {machine['load_average_before']:.1f}; "
        f"{'one run' if repetitions == 1 else f'medians of {repetitions}'}{faults}. "
        f"All rows, with latencies: [{name}.md](benchmarks/results/{name}.md).",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Rewrite README's table of figures.")
    parser.add_argument("--from", dest="name", default="latest", help="a result in benchmarks/results (latest)")
    parser.add_argument("--print", dest="is_printed", action="store_true", help="print it, change nothing")
    arguments = parser.parse_args()
    text = render(json.loads((HERE / "results" / f"{arguments.name}.json").read_text()), arguments.name)
    if arguments.is_printed:
        print(text)
        return
    readme = README.read_text("utf-8")
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise SystemExit(f"README.md must have {BEGIN} and {END} once each")
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", "utf-8")
    print(f"README.md has the figures of {arguments.name}.json")


if __name__ == "__main__":
    main()
