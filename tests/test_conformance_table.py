"""docs/conformance.md has every row of the texts, and everything it names as a proof exists; the comparison with
other servers is that of the probes there are, and shows ours without a fault.
"""

import ast
import re
from pathlib import Path

import pytest

from benchmarks.conformance import probes_http, probes_lifespan, probes_websocket
from benchmarks.conformance.probe import PROBES

ROOT = Path(__file__).resolve().parent.parent
TABLE = (ROOT / "docs" / "conformance.md").read_text("utf-8")
COMPARISON = (ROOT / "docs" / "conformance_comparison.md").read_text("utf-8")
# How many rows each text has, as we count them.
COUNTS = {"A": 16, "H": 29, "W": 18, "L": 9, "T": 7, "X": 8, "C": 23}
ROWS = [
    [cell.strip() for cell in line.strip("| ").split(" | ")]
    for line in TABLE.splitlines()
    if re.match(r"\| [A-Z]\d+ \|", line)
]
PROVEN = re.findall(r"`((?:tests|benchmarks)/[\w/]+\.py)::(\w+)`", TABLE)
MODULES = {module.__name__.rpartition(".")[2]: module for module in (probes_http, probes_lifespan, probes_websocket)}


def functions(path):
    """Names of the functions and methods of a file."""
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_no_row_is_missing():
    assert [row[0] for row in ROWS] == [
        f"{letter}{n}" for letter, count in COUNTS.items() for n in range(1, count + 1)
    ]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_has_a_question_an_answer_and_a_proof(row):
    _, asked, answer, proof = row
    assert asked
    assert answer
    assert re.search(r"`(tests|benchmarks)/[\w/]+\.py::\w+`", proof)


@pytest.mark.parametrize("path", sorted({path for path, _ in PROVEN}))
def test_every_test_it_names_exists(path):
    named = {name for found, name in PROVEN if found == path}
    assert named <= functions(path)
    if path.startswith("benchmarks/"):
        assert named <= {probe.name for probe in PROBES}
    else:
        assert all(name.startswith("test_") for name in named)


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
def test_every_probe_is_in_a_row(probe):
    module = probe.run.__module__.rpartition(".")[2]
    (row,) = [row for row in ROWS if row[0] == probe.row]
    assert f"`benchmarks/conformance/{module}.py::{probe.name}`" in row[3]


def test_probes_have_names_and_titles_of_their_own():
    assert len({probe.name for probe in PROBES}) == len(PROBES)
    assert len({(probe.run.__module__, probe.title) for probe in PROBES}) == len(PROBES)


# The comparison


def test_the_comparison_has_all_probes_and_no_other():
    """`make conformance` writes it; it is stale when this fails."""
    rows = re.findall(r"^\| ([A-Z]\d+) \| (.*?) \| ([dr]) \| (.) \|", COMPARISON, re.MULTILINE)
    assert sorted(rows) == sorted((probe.row, probe.title, probe.level_letter, "✓") for probe in PROBES)


def test_the_comparison_shows_us_ahead_of_everybody():
    for level in ("demanded", "recommended"):
        done = cells_of(rf"{level}: done")
        failed = cells_of(rf"{level}: not done")
        assert done[0] > max(done[1:])
        assert failed[0] < min(failed[1:])


def cells_of(title):
    (line,) = re.findall(rf"^\| {title} . \| (.*) \|$", COMPARISON, re.MULTILINE)
    return [int(cell) for cell in line.split(" | ")]
