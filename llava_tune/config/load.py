"""A Run from a Python config file, and the command line's overrides of it."""

from __future__ import annotations

import dataclasses
import difflib
import runpy
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from llava_tune.config import schema
from llava_tune.config.shipped import find_config
from llava_tune.errors import InputError

A = TypeVar("A")


def load_run(config: str | Path) -> schema.Run:
    """Read a config file, or a shipped config by its name.

    Args:
        config: path of a Python file that sets `run`, or a name that `llava-tune list-cfg` shows.

    Raises:
        InputError: no such file; it fails to run; it sets no `run`; a field is misspelt, of a wrong type or impossible.
    """
    path = find_config(config)
    try:
        namespace = runpy.run_path(str(path))
    except pydantic.ValidationError as error:
        raise InputError(f"{path}: {explain(error)}") from error
    except SyntaxError as error:
        raise InputError(f"{path}, line {error.lineno}: not valid Python: {error.msg}") from error
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: running the config failed: {type(error).__name__}: {error}") from error
    run = namespace.get("run")
    if not isinstance(run, schema.Run):
        found = "nothing of that name" if run is None else f"a {type(run).__name__}"
        raise InputError(
            f"{path}: a config sets `run = Run(...)` (from llava_tune.config import Run); found {found}. "
            "`llava-tune copy-cfg NAME FOLDER` gives one to start from"
        )
    return run


def override(command: type[A], run: schema.Run, args: list[str], prog: str, description: str) -> A:
    """Parse a verb's own options and the config's fields, each by its dotted name.

    Args:
        command: a dataclass of the verb's options; its field `run` (a Run) is filled from the config and `args`.
        run: the config as the file gives it; what `--help` shows as current values.
        args: the command line after the config's path.

    Raises:
        InputError: a value that doesn't fit its field, or an impossible combination.
        SystemExit: 2 with tyro's message for an unknown flag, 0 after --help.
    """
    import tyro

    fields = {f.name: f for f in dataclasses.fields(command)}  # type: ignore[arg-type]
    required = {f.name: None for f in fields.values() if f.default is dataclasses.MISSING and f.name != "run"}
    default = command(run=run, **required)
    try:
        return tyro.cli(command, default=default, args=args, prog=prog, description=description, use_underscores=False)
    except pydantic.ValidationError as error:
        raise InputError(f"command line: {explain(error)}") from error


def explain(error: pydantic.ValidationError) -> str:
    """One sentence a problem: which field of which class, what was found, and the nearest right name."""
    cls: Any = getattr(schema, error.title, None)
    names = [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
    sentences = []
    for problem in error.errors():
        where = ".".join([error.title, *(str(part) for part in problem["loc"])])
        kind = problem["type"]
        if kind == "unexpected_keyword_argument":
            close = difflib.get_close_matches(str(problem["loc"][-1]), names, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}? " if close else ""
            sentences.append(f"{where} is not a field; {hint}{error.title} has: {', '.join(names)}")
        elif kind in ("missing", "missing_argument", "missing_keyword_only_argument"):
            sentences.append(f"{where} is missing; it has no default, so the config must set it")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            found = "" if kind == "value_error" else f"; found {problem['input']!r}"
            sentences.append(f"{where}: {message}{found}")
    return "; ".join(sentences)

