"""llava-tune list-cfg [PATTERN]"""

from __future__ import annotations

from llava_tune.config.shipped import list_configs
from llava_tune.errors import InputError


def main(arguments: list[str]) -> None:
    """Print the shipped configs whose name holds PATTERN."""
    if any(a in ("-h", "--help") for a in arguments):
        print("usage: llava-tune list-cfg [PATTERN]\n\nList the shipped recipes whose name holds PATTERN.")
        return
    pattern = arguments[0] if arguments else ""
    rows = list_configs(pattern)
    if not rows:
        raise InputError(f"no shipped config holds {pattern!r} in its name. `llava-tune list-cfg` lists all")
    for stage, name, what in rows:
        print(f"{stage:<9} {name}\n          {what}")
