"""The recipes and DeepSpeed presets that come with the package."""

from __future__ import annotations

import ast
import difflib
import json
import shutil
from pathlib import Path
from typing import Any

from llava_tune.errors import InputError

_PACKAGE = Path(__file__).parents[1]


def _root() -> Path:
    """configs/ of the checkout, or its copy inside an installed wheel."""
    installed = _PACKAGE / "shipped" / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def _recipes() -> dict[str, Path]:
    return {p.stem: p for stage in ("pretrain", "finetune") for p in sorted((_root() / stage).glob("*.py"))}


def list_configs(pattern: str = "") -> list[tuple[str, str, str]]:
    """(stage, name, first line of the docstring) of each shipped config whose name holds `pattern`."""
    rows = []
    for name, path in _recipes().items():
        if pattern.lower() in name.lower():
            doc = ast.get_docstring(ast.parse(path.read_text())) or ""
            rows.append((path.parent.name, name, doc.split("\n", 1)[0]))
    return rows


def find_config(config: str | Path) -> Path:
    """The path of a config file given by path, or by the name of a shipped one.

    Raises:
        InputError: neither is there.
    """
    path = Path(config)
    if path.is_file():
        return path
    recipes = _recipes()
    if str(config) in recipes:
        return recipes[str(config)]
    close = difflib.get_close_matches(path.stem, recipes, n=1, cutoff=0.4)
    hint = f"Did you mean {close[0]}? " if close else ""
    raise InputError(
        f"config {str(config)!r}: no such file, and no shipped config has that name. {hint}`llava-tune list-cfg` lists them"
    )


def copy_config(name: str, folder: Path) -> Path:
    """Copy a shipped config into `folder` (made if missing). Returns the copy's path.

    Raises:
        InputError: no such config, or the folder already has a file of that name.
    """
    source = find_config(name)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / source.name
    if target.exists():
        raise InputError(f"{target} exists already; it was left as it is. Remove it, or copy to another folder")
    shutil.copyfile(source, target)
    return target


def deepspeed_config(name: str) -> dict[str, Any]:
    """A DeepSpeed config: a shipped preset by its name, or a JSON file.

    Raises:
        InputError: no such preset or file, or the file is no JSON object.
    """
    presets = {p.stem: p for p in sorted((_root() / "deepspeed").glob("*.json"))}
    path = presets.get(name, Path(name))
    if not path.is_file():
        raise InputError(f"--deepspeed {name}: no such preset or JSON file. Presets: {', '.join(presets)}")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"--deepspeed {path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"--deepspeed {path}: expected a JSON object, found {type(config).__name__}")
    return config
