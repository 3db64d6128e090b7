"""llava-tune serve CHECKPOINT|EXPORT [--port 8000]"""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from llava_tune.errors import InputError, missing_package


@dataclass
class Options:
    """Serve a checkpoint or an export through `transformers serve`, which speaks OpenAI's protocol (/v1/chat/completions, images by
    URL or data URI); or print the command of another server."""

    model: tyro.conf.Positional[str]
    """Folder of a checkpoint, which is exported to CHECKPOINT/hf first if that is not there; or of an export."""
    host: str = "localhost"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Of the export, if one is made."""
    server: Literal["transformers", "vllm"] = "transformers"
    """transformers starts here; of vllm the command is printed."""


def main(arguments: list[str]) -> None:
    """Export if needed, then become the server."""
    options = tyro.cli(Options, args=arguments, prog="llava-tune serve", use_underscores=False)
    if options.server == "transformers":
        for package in ("fastapi", "uvicorn"):
            if importlib.util.find_spec(package) is None:
                raise missing_package(package, "serve", "serve")
    folder = ready_export(Path(options.model), options.dtype)
    if options.server == "vllm":
        print(shlex.join(["vllm", "serve", str(folder), "--host", options.host, "--port", str(options.port)]))
        return
    address = ["--host", options.host, "--port", str(options.port)]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), *address]
    print(
        f"model {folder} at http://{options.host}:{options.port}/v1\n$ {shlex.join(command)}",
        file=sys.stderr,
        flush=True,
    )
    os.execv(sys.executable, command)


def ready_export(folder: Path, dtype: Literal["bf16", "fp32"]) -> Path:
    """The folder itself if it is an export, else CHECKPOINT/hf, exported now if it is not there.

    Raises:
        InputError: neither a checkpoint nor an export.
    """
    from llava_tune.model.factory import RUN_CONFIG, checkpoint_folder

    folder = checkpoint_folder(folder)
    if (folder / "config.json").is_file() and not (folder / RUN_CONFIG).is_file():
        return folder.resolve()
    if not (folder / RUN_CONFIG).is_file():
        raise InputError(
            f"{folder}: neither a checkpoint of llava-tune (no {RUN_CONFIG}) nor an export (no config.json)"
        )
    target = folder / "hf"
    if not target.is_dir():
        from llava_tune.export.run import export

        print(f"exporting {folder} to {target}", file=sys.stderr, flush=True)
        export(folder, target, dtype=dtype)
    return target.resolve()
