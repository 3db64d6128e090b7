"""A config that is another one with some fields set: what the tools write beside the config that they were given."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_tune.config.load import load_run
from llava_tune.config.schema import Run
from llava_tune.config.shipped import find_config
from llava_tune.errors import InputError
from llava_tune.paths import write_whole


def with_fields(run: Run, fields: Mapping[str, Any]) -> Run:
    """A run with fields set by their dotted names, `{"dataset.max_length": 1024}`.

    Raises:
        InputError: there is no such field, or the value doesn't fit.
    """
    changed: Any = run
    for name, value in fields.items():
        changed = _replaced(changed, name.split("."), value, name)
    return changed


def _replaced(owner: Any, path: list[str], value: Any, name: str) -> Any:
    if not dataclasses.is_dataclass(owner) or path[0] not in {f.name for f in dataclasses.fields(owner)}:
        raise InputError(f"{name}: the config has no such field")
    inner = value if len(path) == 1 else _replaced(getattr(owner, path[0]), path[1:], value, name)
    return dataclasses.replace(owner, **{path[0]: inner})  # type: ignore[type-var]


def differing_fields(before: Any, after: Any, prefix: str = "") -> dict[str, Any]:
    """The dotted names and values of the fields in which `after` differs from `before`."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(after):
        old, new = getattr(before, field.name), getattr(after, field.name)
        if old == new:
            continue
        if dataclasses.is_dataclass(new) and type(old) is type(new):
            found |= differing_fields(old, new, f"{prefix}{field.name}.")
        else:
            found[f"{prefix}{field.name}"] = new
    return found


def write_modified(config: str | Path, run: Run, store: Path) -> Path:
    """Write `<config>_modified.py`: the config with `run`'s command-line changes, training from `store`.

    It goes beside the config, or into the working directory for a shipped one.

    Returns:
        Its path.
    """
    path = find_config(config)
    given = Path(config).is_file()
    target = (path.parent if given else Path.cwd()) / f"{path.stem}_modified.py"
    fields = differing_fields(load_run(config), run) | {"dataset.offline_processed_text_folder": str(store.resolve())}
    base = f'Path(__file__).with_name("{path.name}")' if given else f'"{path.stem}"'
    lines = [
        f'"""{path.stem}, training from what `prepare` wrote.',
        "",
        f"    llava-tune {'pretrain' if 'pretrain' in path.stem else 'finetune'} {target.name}",
        '"""',
        "",
        *(["from pathlib import Path", ""] if given else []),
        "from llava_tune.config import load_run, with_fields",
        "",
        "run = with_fields(",
        f"    load_run({base}),",
        "    {",
        *(f'        "{name}": {_literal(value)},' for name, value in fields.items()),
        "    },",
        ")",
        "",
    ]
    write_whole(target, "\n".join(lines))
    return target


def _literal(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
