"""The arrows between our packages: who may import whom, and that importing has no effect."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A package may import itself and what stands here.
ARROWS = {
    "channel_layer": set(),
    "interface_server": {"channel_layer"},
    "worker": {"channel_layer"},
    "trunkline": {"channel_layer", "interface_server", "worker"},
}
# No I/O is decided or done here: these modules import nothing that could do it.
SANS_IO = (
    *("capacity", "codec", "connection", "errors", "frames", "link", "liveness", "mail", "messages", "names"),
    *("openings", "sharding"),
)
IO_MODULES = {"asyncio", "socket", "ssl", "selectors", "threading", "subprocess", "twisted", "autobahn", "redis"}


def imports_of(path):
    """Module names that a file imports at run time; what stands under TYPE_CHECKING does not count."""
    names = set()

    def walk(nodes):
        for node in nodes:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                walk(node.orelse)
                continue
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names.add(node.module)
            walk(ast.iter_child_nodes(node))

    walk(ast.parse(path.read_text("utf-8")).body)
    return names


def files_of(package):
    # A __main__ is a door of the roof.
    return [path for path in (ROOT / package).rglob("*.py") if path.name != "__main__.py"]


@pytest.mark.parametrize("package", ARROWS)
def test_imports_point_one_way(package):
    for path in files_of(package):
        for name in imports_of(path):
            top = name.partition(".")[0]
            if top in ARROWS and top != package:
                assert top in ARROWS[package], f"{path.relative_to(ROOT)} imports {name}"


def test_what_decides_does_no_io():
    sans_io = [ROOT / "channel_layer" / f"{name}.py" for name in SANS_IO]
    sans_io += files_of("interface_server/protocol")
    sans_io.append(ROOT / "worker" / "events.py")
    for path in sans_io:
        tops = {name.partition(".")[0] for name in imports_of(path)}
        assert not tops & IO_MODULES, f"{path.relative_to(ROOT)} imports {tops & IO_MODULES}"


def test_importing_has_no_effect():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in ARROWS
        for path in files_of(package)
    ]
    code = (
        "import importlib, sys, threading, asyncio\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "assert 'twisted.internet.reactor' not in sys.modules, 'a reactor was installed'\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT, timeout=60)
