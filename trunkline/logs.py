"""Logging of the commands: levels, the default look, and --log-config.

Loggers: ``trunkline.supervisor``, ``trunkline.interface``, ``trunkline.worker``, ``trunkline.channel_layer`` and
``trunkline.access`` (one line a request). Everything goes to stderr but the access log, which goes to stdout.
"""

from __future__ import annotations

import json
import logging
import logging.config
import sys
from pathlib import Path
from typing import Any, Final

from trunkline.options import UsageError

__all__ = ["TRACE", "configure_logging"]

# uvicorn's level below DEBUG; here: every frame and every blob.
TRACE: Final = 5

_DEFAULT: Final[dict[str, Any]] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "default": {"()": "trunkline.logs.LevelFormatter", "format": "%(levelprefix)s %(message)s"},
    },
    "handlers": {
        "default": {"class": "logging.StreamHandler", "formatter": "default", "stream": "ext://sys.stderr"},
        "access": {"class": "logging.StreamHandler", "formatter": "default", "stream": "ext://sys.stdout"},
    },
    "loggers": {
        "trunkline": {"handlers": ["default"], "level": "INFO", "propagate": False},
        "trunkline.access": {"handlers": ["access"], "level": "INFO", "propagate": False},
    },
}

_COLOURS: Final = {"WARNING": "33", "ERROR": "31", "CRITICAL": "91", "INFO": "32", "DEBUG": "36", "TRACE": "34"}


class LevelFormatter(logging.Formatter):
    """``INFO:     message``, as people know it from uvicorn; coloured on a terminal."""

    def __init__(self, format: str) -> None:  # named as logging.config calls it
        super().__init__(format)
        self._colour = sys.stderr.isatty()

    def formatMessage(self, record: logging.LogRecord) -> str:
        name = record.levelname
        shown = f"\033[{_COLOURS.get(name, '0')}m{name}\033[0m" if self._colour else name
        record.levelprefix = f"{shown}:" + " " * (8 - len(name))
        return super().formatMessage(record)


def configure_logging(level: str | None, config_file: str | None) -> None:
    """Set up logging for this process. Raises UsageError where the file cannot be used."""
    logging.addLevelName(TRACE, "TRACE")
    if config_file is None:
        logging.config.dictConfig(_DEFAULT)
        # For what has no handler. Not one of the root logger: an application's basicConfig() would then do nothing.
        logging.lastResort = logging.getLogger("trunkline").handlers[0]
    else:
        _load(config_file)
    if level is not None:
        number = TRACE if level == "trace" else logging.getLevelName(level.upper())
        logging.getLogger("trunkline").setLevel(number)
        if config_file is None:
            logging.getLogger().setLevel(max(number, logging.DEBUG))
            # The access log has a switch of its own: --log-level info or lower shows it, warning hides it.
            logging.getLogger("trunkline.access").setLevel(max(number, logging.INFO))


def _load(config_file: str) -> None:
    path = Path(config_file)
    try:
        if path.suffix == ".json":
            logging.config.dictConfig(json.loads(path.read_text("utf-8")))
        elif path.suffix in (".yaml", ".yml"):
            try:
                import yaml  # not a dependency: only those who write YAML have it
            except ImportError as error:
                raise UsageError(f"--log-config: {config_file} needs PyYAML: pip install pyyaml") from error
            logging.config.dictConfig(yaml.safe_load(path.read_text("utf-8")))
        else:
            logging.config.fileConfig(config_file, disable_existing_loggers=False)
    except UsageError:
        raise
    except Exception as error:  # logging.config raises whatever its parts raise
        cause = "" if error.__cause__ is None else f": {error.__cause__}"  # of what it could not import, for example
        text = " ".join(f"{error}{cause}".split())  # configparser's span lines
        raise UsageError(f"--log-config: {config_file} cannot be used: {text}") from error
