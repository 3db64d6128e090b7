"""What the verbs share: taking the config's path off the command line, then its fields and the verb's options."""

from __future__ import annotations

from typing import Annotated, TypeVar

import tyro

from llava_tune.config.load import load_run, override
from llava_tune.config.schema import Run
from llava_tune.errors import EXIT_OK, InputError

A = TypeVar("A")

FlatRun = Annotated[Run, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands]
"""A field of a verb's options whose own fields are flags without a prefix: --model.llm.name, not --run.model.llm.name."""


def parse(command: type[A], arguments: list[str], verb: str, description: str) -> tuple[str, A]:
    """The config's path or name, and the verb's options with the config's fields.

    Raises:
        InputError: no config is named, or it is wrong.
        SystemExit: after --help.
    """
    if not arguments or arguments[0].startswith("-"):
        text = f"usage: llava-tune {verb} CFG [options] [config fields]\n\n{description}"
        if arguments and arguments[0] in ("-h", "--help"):
            print(
                f"{text}\n\nCFG is a config file or a name of `llava-tune list-cfg`. With CFG, --help shows every option and field:"
            )
            print(f"  llava-tune {verb} CFG --help")
            raise SystemExit(EXIT_OK)
        raise InputError(f"name a config first. {text.splitlines()[0]}")
    config, rest = arguments[0], arguments[1:]
    return config, override(command, load_run(config), rest, f"llava-tune {verb} {config}", description)
