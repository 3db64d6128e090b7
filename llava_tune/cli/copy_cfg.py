"""llava-tune copy-cfg NAME FOLDER"""

from __future__ import annotations

from pathlib import Path

from llava_tune.config.shipped import copy_config
from llava_tune.errors import InputError


def main(arguments: list[str]) -> None:
    """Copy the shipped config NAME into FOLDER."""
    if len(arguments) != 2 or any(a.startswith("-") for a in arguments):
        text = "usage: llava-tune copy-cfg NAME FOLDER"
        if any(a in ("-h", "--help") for a in arguments):
            print(f"{text}\n\nCopy a shipped recipe into a folder, to edit it. `llava-tune list-cfg` has the names.")
            return
        raise InputError(f"copy-cfg takes a name and a folder, found {len(arguments)} argument(s). {text}")
    print(copy_config(arguments[0], Path(arguments[1])))
