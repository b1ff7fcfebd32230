"""From ``module:attribute`` to the application object, and one clear line for everything that can be wrong with it.

``prepare_import()`` first: it puts the application's directory first on ``sys.path``, and lets an application have
modules named ``worker`` or ``interface_server`` of its own (Celery and RQ projects have a ``worker.py``). Ours of
these names are forgotten from ``sys.modules`` then; what holds them already keeps working. So everything of ours
is imported before, and nothing imports ``worker.…`` by name afterwards. Then ``load_application()``.

Only finding and importing happens here; what kind of application the object is, application.py tells.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.machinery
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Final

__all__ = [
    "ApplicationError",
    "ApplicationNotCallable",
    "BadReference",
    "ImportFailed",
    "NameClash",
    "NoSuchAttribute",
    "NoSuchModule",
    "check_reference",
    "load_application",
    "prepare_import",
]

# Of our top-level packages: those an application has no use for, and may so have its own of; and those it imports
# itself (channel_layer) or that the process still runs in (trunkline).
_YIELDING: Final = ("worker", "interface_server")
_KEPT: Final = ("channel_layer", "trunkline")

# With one of these a module may have attributes that its source does not show.
_DYNAMIC: Final = {"*", "__getattr__", "globals", "locals", "vars", "exec", "eval", "setattr", "modules"}

_REFERENCE: Final = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*(?:\.[^\W\d]\w*)*)")


class ApplicationError(Exception):
    """The application could not be loaded; the text is the one line for the operator.

    ``details`` is the application's own traceback where its code raised, else "".
    """

    details = ""


class BadReference(ApplicationError):
    """Not of the form module:attribute."""


class NoSuchModule(ApplicationError):
    """The module, or a package it is in, was not found."""


class NoSuchAttribute(ApplicationError):
    """The module was imported and does not have the attribute."""


class ApplicationNotCallable(ApplicationError):
    """The attribute, or what the factory returned, cannot be called."""


class NameClash(ApplicationError):
    """The application's directory has a module with the name of a package of ours that it would hide."""


class ImportFailed(ApplicationError):
    """Code of the application raised while it was imported or its factory called; ``details`` shows where."""

    def __init__(self, text: str, error: BaseException) -> None:
        super().__init__(text)
        self.details = _own_traceback(error)


def check_reference(reference: str, app_dir: str | None = None) -> None:
    """Raise ApplicationError where load_application() would for certain; nothing of the application is run for that.

    A supervisor, which must not import it, can so tell a typing error before it starts anything.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise BadReference(f"the application {reference!r} is not of the form module:attribute{_hint(reference)}")
    module_name, attribute_path = match.groups()
    top, *inner = module_name.split(".")
    directory = str(Path(app_dir if app_dir is not None else ".").resolve())
    # PYTHONPATH may come from --env-file, for the processes to be started.
    spec = importlib.machinery.PathFinder.find_spec(
        top, [directory, *os.environ.get("PYTHONPATH", "").split(os.pathsep), *sys.path]
    )
    if spec is None:
        finders = [finder.find_spec for finder in sys.meta_path if hasattr(finder, "find_spec")]
        if not any(find(top, None) is not None for find in finders):
            raise NoSuchModule(_no_module(top, module_name, f"{directory!r} and on Python's path"))
        return
    name = top
    for part in inner:
        name = f"{name}.{part}"
        spec = importlib.machinery.PathFinder.find_spec(name, spec.submodule_search_locations or [])
        if spec is None:
            return  # a package may have other ways to have modules: whoever imports it will know
    if spec.origin is None or not spec.origin.endswith(".py") or spec.submodule_search_locations is not None:
        return
    try:
        names = _names_in(ast.parse(Path(spec.origin).read_bytes()))
    except (OSError, SyntaxError, ValueError):
        return
    attribute = attribute_path.partition(".")[0]
    if not (attribute.startswith("__") or attribute in names or names & _DYNAMIC):
        raise NoSuchAttribute(f"{module_name!r} has no attribute {attribute!r}{_similar(attribute, names)}")


def _names_in(tree: ast.Module) -> set[str]:
    """All names that the source assigns, defines, imports or uses anywhere."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(
            node,
            ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.ExceptHandler | ast.MatchAs | ast.MatchStar,
        ):
            names.add(node.name or "")
        elif isinstance(node, ast.MatchMapping):
            names.add(node.rest or "")
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
    return names


def prepare_import(app_dir: str | None = None) -> str:
    """Make modules in ``app_dir`` (None: the current directory) importable; return its absolute path.

    To be called once, when all modules of ours that this process needs are imported. Raises NameClash.
    """
    directory = str(Path(app_dir if app_dir is not None else ".").resolve())
    if not os.path.isdir(directory):
        raise NoSuchModule(f"the application's directory {directory!r} does not exist")
    clashing = {name: spec for name in (*_YIELDING, *_KEPT) if (spec := _find_foreign(name, directory)) is not None}
    for name in _KEPT:
        if name in clashing:
            raise NameClash(
                f"the application's directory {directory!r} has a module {name!r} ({_place(clashing[name])}), "
                "which is the name of a package of Trunkline: rename it"
            )
    if sys.path[:1] != [directory]:
        sys.path.insert(0, directory)
    for name, spec in clashing.items():
        for loaded in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
            del sys.modules[loaded]
        if spec.loader is None or spec.origin is None:
            # A directory without __init__.py: importing it by name would find our package instead, for Python
            # prefers a regular package anywhere on the path (PEP 420).
            sys.modules[name] = importlib.util.module_from_spec(spec)
    importlib.invalidate_caches()
    return directory


def load_application(reference: str, *, factory: bool = False) -> Any:
    """Import the application that ``module:attribute`` names, and call it first if it is a ``factory``.

    Raises ApplicationError. SystemExit of the application's code passes.
    """
    match = _REFERENCE.fullmatch(reference)
    if match is None:
        raise BadReference(f"the application {reference!r} is not of the form module:attribute{_hint(reference)}")
    module_name, attribute_path = match.groups()
    application: Any = _import(module_name)
    place = module_name
    for name in attribute_path.split("."):
        if not hasattr(application, name):
            raise NoSuchAttribute(f"{place!r} has no attribute {name!r}{_similar(name, dir(application))}")
        application = getattr(application, name)
        place = f"{place}:{name}" if ":" not in place else f"{place}.{name}"
    if not callable(application):
        raise ApplicationNotCallable(f"{reference!r} is not callable: it is a {type(application).__name__}")
    if factory:
        try:
            application = application()
        except Exception as error:
            raise ImportFailed(f"the factory {reference!r} raised {_summary(error)}", error) from error
        if not callable(application):
            raise ApplicationNotCallable(
                f"the factory {reference!r} returned a {type(application).__name__}, which is not callable"
            )
    return application


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name
        is_wanted = missing is not None and (name == missing or name.startswith(f"{missing}."))
        # The same name may be missing in an import statement of the application: then its own frames are in the
        # traceback, and they are what the operator needs.
        if is_wanted and not _own_frames(error.__traceback__):
            raise NoSuchModule(_no_module(missing, name, _looked_in())) from error
        raise ImportFailed(f"importing {name!r} failed: {_summary(error)}", error) from error
    except Exception as error:
        raise ImportFailed(f"importing {name!r} failed: {_summary(error)}", error) from error


def _find_foreign(name: str, directory: str) -> importlib.machinery.ModuleSpec | None:
    """The module of that name in ``directory``, unless it is ours."""
    importlib.invalidate_caches()
    spec = importlib.machinery.PathFinder.find_spec(name, [directory])
    if spec is None:
        return None
    if spec.loader is None or spec.origin is None:  # a directory without __init__.py
        # One without Python files, of configuration say, is no module to anybody.
        return spec if any(Path(directory, name).rglob("*.py")) else None
    return None if _is_ours(name, Path(spec.origin)) else spec


def _is_ours(name: str, path: Path) -> bool:
    # Both by place: Trunkline's own checkout as the application's directory; and by content: a checkout beside an
    # installed copy. An empty file proves nothing.
    ours = _PACKAGE_DIRECTORY.parent / name / "__init__.py"
    if not ours.exists() or path.name != "__init__.py":
        return False
    content = path.read_bytes()
    return path.resolve() == ours.resolve() or (bool(content.strip()) and content == ours.read_bytes())


_PACKAGE_DIRECTORY: Final = Path(__file__).resolve().parent


def _own_frames(trace: TracebackType | None) -> bool:
    """True if frames of other files than the import system and this one are in the traceback."""
    return any(not _is_import_machinery(frame.filename) for frame in traceback.extract_tb(trace))


def _is_import_machinery(filename: str) -> bool:
    return filename == __file__ or filename.startswith("<frozen importlib") or filename == importlib.__file__


def _own_traceback(error: BaseException) -> str:
    """The traceback without the frames of the import system and of this file."""
    shown = traceback.TracebackException.from_exception(error)
    parts: traceback.TracebackException | None = shown
    seen: set[int] = set()
    while parts is not None and id(parts) not in seen:
        seen.add(id(parts))
        parts.stack = traceback.StackSummary.from_list(
            [frame for frame in parts.stack if not _is_import_machinery(frame.filename)]
        )
        parts = parts.__cause__ or parts.__context__
    return "".join(shown.format()).rstrip("\n")


def _summary(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _no_module(missing: str | None, wanted: str, where: str) -> str:
    inside = "" if missing == wanted else f" for {wanted!r}"
    return f"no module named {missing!r}{inside}, looked for in {where}"


def _looked_in() -> str:
    return f"{sys.path[0]!r} and on Python's path" if sys.path else "nothing: sys.path is empty"


def _place(spec: importlib.machinery.ModuleSpec) -> str:
    if spec.origin is not None:
        return spec.origin
    return next(iter(spec.submodule_search_locations or [spec.name]))


def _hint(reference: str) -> str:
    head, colon, tail = reference.partition(":")
    module = head.removesuffix(".py").replace("/", ".").strip(".")
    candidate = f"{module}:{tail or 'app'}"
    if colon and not tail:
        return ", the attribute is missing"
    if candidate != reference and _REFERENCE.fullmatch(candidate):
        return f", did you mean {candidate!r}?"
    return ""


def _similar(name: str, present: Iterable[str]) -> str:
    public = sorted(known for known in present if not known.startswith("_"))
    matches = difflib.get_close_matches(name, public, n=3, cutoff=0.6)
    if not matches:
        # The usual names of applications, whatever was asked for.
        matches = [known for known in ("app", "application", "asgi", "create_app") if known in public]
    return f", did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""
