"""Loading applications, each case in a process of its own: importing changes sys.path and sys.modules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from worker.loading import ApplicationError, NoSuchAttribute, check_reference

ROOT = Path(__file__).resolve().parents[2]

# What run() does, without the broker; then the application's answer.
PROGRAM = """
import sys
import interface_server.settings
import worker.process, worker.instance, worker.loading
from worker.loading import ApplicationError, load_application, prepare_import
instance_module = worker.instance
directory, reference, factory = sys.argv[1:4]
try:
    prepare_import(directory)
    application = load_application(reference, factory=factory == "factory")
except ApplicationError as error:
    print(type(error).__name__, error, sep="|")
    print(error.details)
    sys.exit(2)
print("loaded", application)
# Ours still work after their names were forgotten.
print(instance_module.describe_wait.__module__, instance_module.Phase.RUNNING)
"""


def load(directory: Path, reference: str, factory: str = "", cwd: Path | None = None) -> tuple[int, str]:
    finished = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{PROGRAM}",
            directory,
            reference,
            factory,
        ],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
    )
    assert finished.stderr == ""
    return finished.returncode, finished.stdout


def write(directory: Path, **files: str) -> None:
    for name, text in files.items():
        path = directory / (name.replace("__init__", "@").replace("__", "/").replace("@", "__init__") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def first_line(output: str) -> str:
    return output.partition("\n")[0]


def test_a_module_attribute_and_a_dotted_one(tmp_path: Path) -> None:
    write(tmp_path, project__asgi="class box:\n    @staticmethod\n    def app(): ...\napplication = print\n")
    assert load(tmp_path, "project.asgi:application")[0] == 0
    status, output = load(tmp_path, "project.asgi:box.app")
    assert status == 0
    assert "box.app" in output


def test_a_factory_is_called(tmp_path: Path) -> None:
    write(tmp_path, main="def make():\n    return len\ndef bad():\n    return 5\ndef broken():\n    return 1 / 0\n")
    assert "built-in function len" in load(tmp_path, "main:make", "factory")[1]
    status, output = load(tmp_path, "main:bad", "factory")
    assert (status, first_line(output)) == (
        2,
        "ApplicationNotCallable|the factory 'main:bad' returned a int, which is not callable",
    )
    status, output = load(tmp_path, "main:broken", "factory")
    assert first_line(output) == "ImportFailed|the factory 'main:broken' raised ZeroDivisionError: division by zero"
    assert "main.py" in output
    assert "loading.py" not in output


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("main", "'main' is not of the form module:attribute, did you mean 'main:app'?"),
        ("main.py", "did you mean 'main:app'?"),
        ("src/main.py:api", "did you mean 'src.main:api'?"),
        ("main:", "the attribute is missing"),
        (":app", "is not of the form"),
        ("", "is not of the form"),
        ("main:app:x", "is not of the form"),
        ("main app", "is not of the form"),
        ("main:app()", "is not of the form"),
        (".main:app", "did you mean 'main:app'?"),
    ],
)
def test_a_reference_of_the_wrong_form(tmp_path: Path, reference: str, text: str) -> None:
    status, output = load(tmp_path, reference)
    assert status == 2
    assert first_line(output).startswith("BadReference|")
    assert text in first_line(output)


def test_no_such_module_names_the_place_that_was_searched(tmp_path: Path) -> None:
    write(tmp_path, package____init__="", module="")
    for reference, what in [
        ("absent:app", "'absent'"),
        ("absent.asgi:app", "'absent' for 'absent.asgi'"),
        ("package.absent:app", "'package.absent'"),
        ("module.absent:app", "'module.absent'"),
    ]:
        status, output = load(tmp_path, reference)
        assert (status, output) == (
            2,
            f"NoSuchModule|no module named {what}, looked for in {str(tmp_path)!r} and on Python's path\n\n",
        )


def test_a_failing_import_inside_the_application_shows_its_own_traceback(tmp_path: Path) -> None:
    write(
        tmp_path, main="import absent_library\n", package____init__="", package__asgi="import package.asgi.deeper\n"
    )
    status, output = load(tmp_path, "main:app")
    assert status == 2
    assert first_line(output) == (
        "ImportFailed|importing 'main' failed: ModuleNotFoundError: No module named 'absent_library'"
    )
    assert 'main.py", line 1' in output
    assert "importlib" not in output
    assert "loading.py" not in output
    assert first_line(load(tmp_path, "package.asgi:app")[1]).startswith("ImportFailed|")


def test_an_application_that_misses_its_own_name_is_not_taken_for_absent(tmp_path: Path) -> None:
    write(tmp_path, main="raise ModuleNotFoundError(\"No module named 'main'\", name='main')\n")
    assert first_line(load(tmp_path, "main:app")[1]).startswith("ImportFailed|")


def test_a_syntax_error_shows_its_line(tmp_path: Path) -> None:
    write(tmp_path, main="x = 1\ndef app(:\n")
    status, output = load(tmp_path, "main:app")
    assert status == 2
    assert first_line(output).startswith("ImportFailed|importing 'main' failed: SyntaxError")
    assert "def app(:" in output


def test_no_such_attribute_suggests_others(tmp_path: Path) -> None:
    write(tmp_path, main="application = print\nclass a:\n    inner = print\n")
    for reference, text in [
        ("main:aplication", "'main' has no attribute 'aplication', did you mean 'application'?"),
        ("main:zzz", "'main' has no attribute 'zzz', did you mean 'application'?"),
        ("main:a.iner", "'main:a' has no attribute 'iner', did you mean 'inner'?"),
    ]:
        assert load(tmp_path, reference) == (2, f"NoSuchAttribute|{text}\n\n")


def test_not_callable(tmp_path: Path) -> None:
    write(tmp_path, main="app = {}\n")
    assert load(tmp_path, "main:app") == (2, "ApplicationNotCallable|'main:app' is not callable: it is a dict\n\n")


def test_no_such_directory(tmp_path: Path) -> None:
    status, output = load(tmp_path / "absent", "main:app")
    assert status == 2
    assert "does not exist" in output


def test_the_directory_may_be_relative(tmp_path: Path) -> None:
    write(tmp_path / "src", main="app = print\n")
    assert load(Path("src"), "main:app", cwd=tmp_path)[0] == 0


def test_an_application_may_have_modules_named_worker_and_interface_server(tmp_path: Path) -> None:
    write(
        tmp_path,
        worker="mine = 'my worker'\n",
        interface_server="mine = 'my interface_server'\n",
        main=(
            "import worker, interface_server\n"
            "class app:\n"
            "    seen = worker.mine, interface_server.mine\n"
            "    def __call__(self): ...\n"
            "    def __repr__(self): return repr(self.seen)\n"
            "app = app()\n"
        ),
    )
    status, output = load(tmp_path, "main:app")
    assert (status, output) == (
        0,
        "loaded ('my worker', 'my interface_server')\nworker.instance Phase.RUNNING\n",
    )


@pytest.mark.parametrize("regular", [True, False], ids=["package", "namespace package"])
def test_the_application_may_be_in_a_package_named_worker(tmp_path: Path, regular: bool) -> None:
    write(tmp_path, worker__asgi="from worker.settings import app\n", worker__settings="app = len\n")
    if regular:
        write(tmp_path, worker____init__="")
    assert "loaded <built-in function len>" in load(tmp_path, "worker.asgi:app")[1]


def test_a_directory_of_such_a_name_without_python_files_is_no_clash(tmp_path: Path) -> None:
    write(tmp_path, main="import channel_layer.names\napp = channel_layer.names.new_process_id\n")
    for name in ("channel_layer", "worker"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "Dockerfile").write_text("FROM scratch\n")
    assert load(tmp_path, "main:app")[0] == 0


@pytest.mark.parametrize("name", ["channel_layer", "channel_layer__part", "channel_layer____init__", "trunkline"])
def test_a_clash_with_what_applications_import_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path, main="app = print\n", **{name: ""})
    status, output = load(tmp_path, "main:app")
    assert status == 2
    top = name.partition("__")[0]
    assert first_line(output).startswith(
        f"NameClash|the application's directory {str(tmp_path)!r} has a module {top!r}"
    )
    assert "rename it" in output


def test_our_own_checkout_as_the_application_directory_is_no_clash(tmp_path: Path) -> None:
    status, output = load(ROOT, "worker.loading:load_application")
    assert (status, first_line(output).partition(" at ")[0]) == (0, "loaded <function load_application")


def test_a_copy_of_ours_beside_the_installed_one_is_no_clash(tmp_path: Path) -> None:
    write(tmp_path, main="import channel_layer\napp = channel_layer.get_channel_layer\n")
    copy = tmp_path / "channel_layer"
    copy.mkdir()
    (copy / "__init__.py").write_bytes((ROOT / "channel_layer" / "__init__.py").read_bytes())
    assert load(tmp_path, "main:app")[0] == 0


@pytest.mark.parametrize(
    ("source", "reference", "text"),
    [
        ("", "nosuchmodule:app", "no module named 'nosuchmodule', looked for in"),
        ("", "nosuchmodule.inner:app", "no module named 'nosuchmodule' for 'nosuchmodule.inner', looked for in"),
        (
            "application = 1",
            "checked:applikation",
            "'checked' has no attribute 'applikation', did you mean 'application'?",
        ),
        ("application = 1", "checked", "is not of the form module:attribute"),
    ],
)
def test_what_is_wrong_for_certain_is_found_without_an_import(
    tmp_path: Path, source: str, reference: str, text: str
) -> None:
    (tmp_path / "checked.py").write_text(source + "\nraise SystemExit('it was imported')\n")
    with pytest.raises(ApplicationError) as caught:
        check_reference(reference, str(tmp_path))
    assert text in str(caught.value)
    assert "checked" not in sys.modules


@pytest.mark.parametrize(
    "source",
    [
        "app = 1",
        "def app(): ...",
        "class app: ...",
        "import os as app",
        "from os import path as app",
        "from os import *",
        "globals()['ap' + 'p'] = 1",
        "def __getattr__(name): ...",
        "with open('x') as app: ...",
        "for app in (): ...",
        "if (app := 1): ...",
        "match 1:\n    case app: ...",
        "not Python at all (its import tells more)",
    ],
)
def test_what_may_be_right_passes_the_check(tmp_path: Path, source: str) -> None:
    (tmp_path / "checked.py").write_text(source)
    check_reference("checked:app", str(tmp_path))
    check_reference("checked:__doc__", str(tmp_path))


def test_packages_may_have_what_their_source_does_not_show(tmp_path: Path) -> None:
    package = tmp_path / "checkedpackage"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text("app = 1")
    check_reference("checkedpackage:inner", str(tmp_path))
    check_reference("checkedpackage.other:app", str(tmp_path))
    check_reference("checkedpackage.inner:app", str(tmp_path))
    with pytest.raises(NoSuchAttribute):
        check_reference("checkedpackage.inner:application", str(tmp_path))
