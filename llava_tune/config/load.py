"""A Run from a Python config file, and the command line's overrides of it."""

from __future__ import annotations

import dataclasses
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from llava_tune.config import schema
from llava_tune.config.shipped import find_config
from llava_tune.errors import InputError, launched_rank

A = TypeVar("A")


def load_run(config: str | Path) -> schema.Run:
    """Read a config file, or a shipped config by its name.

    Args:
        config: path of a Python file that sets `run`, or of JSON that llava-tune wrote (for Slurm); or a name that `llava-tune list-cfg` shows.

    Raises:
        InputError: no such file; it fails to run; it sets no `run`; a field is misspelt, of a wrong type or impossible.
    """
    path = find_config(config)
    if path.suffix == ".json":
        try:
            loaded: schema.Run = schema.from_json(path.read_bytes())
        except ValueError as error:
            raise InputError(f"{path}: not a config as llava-tune writes it: {error}") from error
        return loaded
    try:
        namespace = runpy.run_path(str(path))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except SyntaxError as error:
        raise InputError(f"{path}, line {error.lineno}: not valid Python: {error.msg}") from error
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
        SystemExit: 2 after a message, for an unknown flag, a wrong value or an impossible combination; 0 after --help.
    """
    import tyro

    fields = {f.name: f for f in dataclasses.fields(command)}  # type: ignore[arg-type]
    required = {f.name: None for f in fields.values() if f.default is dataclasses.MISSING and f.name != "run"}
    make: Callable[..., A] = command
    default = make(run=run, **required)
    return tyro.cli(
        command,
        default=default,
        args=args,
        prog=prog,
        description=description,
        use_underscores=False,
        console_outputs=launched_rank(args) == "0",  # what is wrong with a config, one rank says
    )
