"""What the documents name exists: files, flags, variables, tests, defaults, links; and their code is code.

Nobody notices when a document goes stale, so these tests do. They know how the documents write: paths, flags and
names of the source stand in backquotes, code in fenced blocks.
"""

import json
import re
import shlex
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from interface_server.client import Refusal
from interface_server.settings import InterfaceSettings
from trunkline.options import OPTIONS, build_parser, parse
from worker.settings import WorkerSettings

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("channel_layer", "interface_server", "worker", "trunkline")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
TOP = {path.name for path in ROOT.iterdir()}
SOURCE = "".join(
    path.read_text("utf-8")
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*"))
    if path.suffix in (".py", ".lua")
) + (ROOT / "docker-compose.yml").read_text("utf-8")
FLAGS = {f"--{option.flag}" for option in OPTIONS} | {
    f"--no-{option.flag}" for option in OPTIONS if option.convert is None
}
VARIABLES = {option.environment_variable for option in OPTIONS} | {"TRUNKLINE_APP"}
# Flags of other programs that the documents name, in their columns and commands.
FOREIGN_FLAGS = {
    *("--access-log", "--application-close-timeout", "--bind", "--http-timeout", "--no-server-name"),
    *("--ping-interval", "--ping-timeout", "--unix-socket", "--websocket-max-message-size"),
    *("--websocket_connect_timeout", "--websocket_timeout"),  # Daphne
    *("--build", "--profile", "--scale", "--detach"),  # docker compose
    *("--no-deps", "--no-recreate", "--quiet", "--wait"),  # the same
    "--timeout-graceful-shutdown",  # uvicorn
    "--help",
    "--no-cache-dir",  # pip
    *("--uvloop", "--quick", "--servers", "--minutes"),  # benchmarks, the soak
    "--no",  # … and the name of a switch
}

FLAG = re.compile(r"(?<![\w\-])--[a-z](?:[a-z_-]*[a-z])?")

PARAMETERS = pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)


def fenced(text):
    """(language, content, line number) of each fenced block."""
    blocks = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(match[1], match[2], text[: match.start()].count("\n") + 1) for match in blocks]


def quoted(text):
    """What stands in backquotes, outside of fenced blocks."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", prose)]


def slug(heading):
    """The anchor that GitHub makes of a heading."""
    plain = re.sub(r"[`*_]|\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


@PARAMETERS
def test_every_path_exists(document):
    text = document.read_text("utf-8")
    for name in quoted(text):
        path = name.partition("::")[0].rstrip("/")
        if re.fullmatch(r"[\w.\-]+(/[\w.\-]+)+", path) and path.partition("/")[0] in TOP:
            assert (ROOT / path).exists(), f"{document.name} names {name}"


@PARAMETERS
def test_every_test_exists(document):
    for name in quoted(document.read_text("utf-8")):
        path, mark, test = name.partition("::")
        if mark:
            assert f"def {test}(" in (ROOT / path).read_text("utf-8"), f"{document.name} names {name}"


@PARAMETERS
def test_every_flag_exists(document):
    text = document.read_text("utf-8")
    # Not the drawings, blocks without a language: "--accept-->" is an arrow.
    places = [*quoted(text), *(code for language, code, _ in fenced(text) if language)]
    for flag in FLAG.findall("\n".join(places)):
        assert flag in FLAGS | FOREIGN_FLAGS, f"{document.name} names {flag}"
    # In our own commands nothing foreign may stand.
    for command in re.findall(r"trunkline (?:serve|interface|worker)\b[^\n`]*", text):
        for flag in FLAG.findall(command):
            assert flag in FLAGS | {"--help"}, f"{document.name}: {command}"


COMMANDS = [
    (path, shlex.split(re.split(r"  +", command)[0])[1:])  # behind two blanks stands a remark
    for path in [*DOCUMENTS, *sorted((ROOT / "examples").rglob("*.py"))]
    for command in re.findall(
        r"^(?:\$ | +)?(trunkline (?:serve|interface|worker|health)\b.*)", path.read_text("utf-8"), re.M
    )
    if "…" not in command and "FLAG" not in command
]


@pytest.mark.parametrize(
    ("path", "argv"), COMMANDS, ids=lambda value: value.name if isinstance(value, Path) else None
)
def test_every_command_is_understood(path, argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # files that commands name must exist
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name in argv:
        if name.endswith(".pem"):
            Path(name).touch()
    parse(build_parser("0"), argv, {})


@PARAMETERS
def test_every_variable_exists(document):
    for name in re.findall(r"\bTRUNKLINE_[A-Z_]*[A-Z]\b", document.read_text("utf-8")):
        assert name in VARIABLES or f'"{name}"' in SOURCE, f"{document.name} names {name}"


@PARAMETERS
def test_every_constant_exists(document):
    """CAPITALS_WITH_UNDERSCORES and settings in backquotes are names of the source."""
    for name in quoted(document.read_text("utf-8")):
        is_constant = re.fullmatch(r"_?[A-Z]+(_[A-Z0-9]+)+", name) and not name.startswith("TRUNKLINE_")
        is_setting = re.fullmatch(r"[a-z_]+_(s|bytes|bytes_max|max|ms)", name)
        if (is_constant and name != "CHANNEL_LAYERS" and name != "ASGI_THREADS") or is_setting:
            assert re.search(rf"\b{name}\b", SOURCE), f"{document.name} names {name}"


@PARAMETERS
def test_every_python_block_compiles(document):
    for language, code, line in fenced(document.read_text("utf-8")):
        if language == "python":
            compile("\n" * line + code, str(document), "exec")


@PARAMETERS
def test_every_json_block_is_json(document):
    for language, code, _ in fenced(document.read_text("utf-8")):
        if language == "json":
            json.loads(code)


@PARAMETERS
def test_every_link_resolves(document):
    text = re.sub(r"^```.*?^```$", "", document.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (document.parent / path).resolve() if path else document
        assert there.exists(), f"{document.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text("utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{document.name} links to {target}"


def test_every_document_can_be_reached_from_the_readme():
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        document = waiting.pop()
        if document in seen:
            continue
        seen.add(document)
        if document.is_dir():
            waiting += sorted(document.glob("*.md"))
        elif document.suffix == ".md":
            for target in re.findall(r"\]\(([^)#\s]+)", document.read_text("utf-8")):
                if not re.match(r"[a-z]+:", target):
                    waiting.append((document.parent / target).resolve())
    assert set(DOCUMENTS) <= seen


INDEXES = ("docs/README.md", "docs/decisions/README.md")


@pytest.mark.parametrize("index", INDEXES)
def test_an_index_links_to_each_document_beside_it(index):
    path = ROOT / index
    linked = {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8"))}
    missing = [each.name for each in sorted(path.parent.glob("*.md")) if each != path and each.name not in linked]
    assert not missing, f"{index} says nothing of {', '.join(missing)}"


SETTINGS = (ROOT / "docs" / "settings.md").read_text("utf-8")
ROWS = {
    match[1]: match
    for match in re.finditer(
        r"^\| `--([\w-]+)` \| ([^|]*) \| ([^|]*) \| ([^|]+) \| [^|]+ \| [^|]+ \|$", SETTINGS, re.MULTILINE
    )
}
SOURCE_MAP = (ROOT / "docs" / "source_map.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")
DEFAULTS = {
    field.name: field.default for settings in (InterfaceSettings, WorkerSettings) for field in fields(settings)
}


def test_the_settings_have_every_flag():
    assert list(ROWS) == [option.flag for option in OPTIONS], "docs/settings.md has a row for each, in their order"


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.flag)
def test_the_settings_say_what_a_flag_means(option):
    assert len(ROWS[option.flag][4].split()) > 1


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.flag)
def test_the_settings_know_who_has_a_flag(option):
    letters = {"S A": ("serve", "interface", "worker"), "S": ("serve", "interface"), "A": ("serve", "worker")}
    letters["S A, `health`"] = (*letters["S A"], "health")
    shown = ROWS[option.flag][3].strip()
    assert letters.get(shown, (shown.strip("`"),)) == option.commands


@pytest.mark.parametrize(
    "option",
    # Not lists: what they hold by default has no short name.
    [o for o in OPTIONS if not o.repeat and DEFAULTS.get(o.setting, MISSING) not in (MISSING, None, "")],
    ids=lambda option: option.flag,
)
def test_the_settings_know_the_default(option):
    default = DEFAULTS[option.setting]
    if isinstance(default, bool):
        shown = "on" if default else "off"
    elif option.flag == "limit-concurrency":
        assert default == 0
        shown = "no limit"
    else:
        shown = f"{default:g}" if isinstance(default, float) else str(default)
    assert ROWS[option.flag][2].strip() == shown


def test_the_variables_of_compose_stand_in_the_page_on_deployment():
    compose, page = (
        (ROOT / "docker-compose.yml").read_text("utf-8"),
        (ROOT / "docs" / "deployment.md").read_text("utf-8"),
    )
    variables = set(re.findall(r"\$\{(\w+):-([^}]*)\}", compose))
    assert variables
    for name, default in variables:
        assert f"| `{name}` | {default} |" in page


@pytest.mark.parametrize("package", PACKAGES)
def test_the_map_has_every_file(package):
    mapped = set(quoted(SOURCE_MAP))
    for path in (ROOT / package).rglob("*.py"):
        name = str(path.relative_to(ROOT))
        if path.stem not in ("__init__", "__main__"):
            assert name in mapped, f"{name} is not in docs/source_map.md"


@pytest.mark.parametrize("package", [*PACKAGES, "examples", "tests", "benchmarks"])
def test_the_readme_s_map_has_every_package(package):
    assert re.search(rf"^\| `{package}/` \|", README, re.MULTILINE)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("[a-z]*")), ids=lambda path: path.name)
def test_each_example_is_named(path):
    name = f"examples/{path.name}"
    assert any(name in document.read_text("utf-8") for document in DOCUMENTS), f"no document names {name}"


UNITS = {"KiB": 1024, "MiB": 1024**2, "ms": 0.001}
FLOW = (ROOT / "docs" / "flow_control.md").read_text("utf-8")
LIMITS = [
    (constant, cells[1])
    for line in FLOW.splitlines()
    if line.startswith("| ") and len(cells := line.strip("| ").split(" | ")) == 4
    for constant in re.findall(r"`([^`]+)`", cells[2])
]


def values_of(constant):
    """What the source sets a constant, a setting or a flag to; more than one where modules share a name."""
    if constant.startswith("--"):
        (option,) = [option for option in OPTIONS if f"--{option.flag}" == constant]
        return {DEFAULTS[option.setting]}
    values = {DEFAULTS[constant]} if constant in DEFAULTS else set()
    for text in re.findall(rf"^\s*{constant}(?:: \w+)? = ([\w* .]+?)\s*(?:#.*)?$", SOURCE, re.MULTILINE):
        if re.fullmatch(r"[\d_* .]+", text):
            values.add(eval(text))  # a product of numbers
        elif text.isidentifier() and text.isupper():
            values |= values_of(text)
    return values


@pytest.mark.parametrize(("constant", "limit"), LIMITS)
def test_the_limits_of_flow_control_are_those_of_the_source(constant, limit):
    numbers = re.findall(r"(\d[\d,.]*)(?: (KiB|MiB|ms))?", limit.replace("one look, a look a second", ""))
    shown = {float(number.strip(",.").replace(",", "")) * UNITS.get(unit, 1) for number, unit in numbers}
    if shown:  # else the row says "no limit", "as above", "the same window"
        values = values_of(constant)
        assert values & shown or not values, f"{constant} is {values}, docs/flow_control.md says {limit}"


@pytest.mark.parametrize("refusal", Refusal, ids=lambda refusal: refusal.name)
def test_troubleshooting_has_every_refusal(refusal):
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    assert f"| {refusal.status} | {refusal.close_code} | {refusal.reason} |" in page


# Messages as they are written: literals that stand beside each other are one.
TEXTS = re.sub(r'"\s*\n\s*f?"', "", SOURCE)


def test_the_lines_of_troubleshooting_are_written_by_the_source():
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    rows = re.findall(r"^\| (`[^|]*) \| [^|]* \|$", page[page.index("## Lines of the log") :], re.MULTILINE)
    assert len(rows) > 10
    for line in quoted("\n".join(rows)):
        for part in line.split("…"):
            assert part.strip(" :") in TEXTS, f"nothing writes {part!r} of {line!r}"


FAILURES = [
    line.strip("| ").split(" | ")
    for line in (ROOT / "docs" / "failure_modes.md").read_text("utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| this happens")
]


@pytest.mark.parametrize("row", FAILURES, ids=lambda row: row[0])
def test_each_failure_names_its_tests(row):
    assert len(row) == 5, row
    assert re.fullmatch(r"`tests/[\w/]+\.py::test_\w+`", row[4].split(", ")[0]), row
