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
    """Folder of a checkpoint, which is exported to CHECKPOINT/hf (llama.cpp: CHECKPOINT/gguf) first if that is not there; or of an export."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on."""
    dtype: Literal["bf16", "fp32", "fp16", "q8_0"] | None = None
    """Of the export, if one is made; unset: the format's default."""
    server: Literal["transformers", "vllm", "llama.cpp"] = "transformers"
    """transformers starts here; of the others the command is printed."""


def main(arguments: list[str]) -> None:
    """Export if needed, then become the server."""
    options = tyro.cli(Options, args=arguments, prog="llava-tune serve", use_underscores=False)
    if options.server == "transformers":
        for package in ("fastapi", "uvicorn"):
            if importlib.util.find_spec(package) is None:
                raise missing_package(package, "serve", "serve")
    address = ["--host", options.host, "--port", str(options.port)]
    if options.server == "llama.cpp":
        print(
            shlex.join(
                [
                    "llama-server",
                    *_gguf_files(ready_export(Path(options.model), options.dtype, "gguf")),
                    "--jinja",
                    *address,
                ]
            )
        )
        return
    folder = ready_export(Path(options.model), options.dtype)
    if options.server == "vllm":
        print(shlex.join(["vllm", "serve", str(folder), *address]))
        return
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), *address]
    print(
        f"model {folder} at http://{options.host}:{options.port}/v1\n$ {shlex.join(command)}",
        file=sys.stderr,
        flush=True,
    )
    os.execv(sys.executable, command)


def _gguf_files(folder: Path) -> list[str]:
    model, vision = next(folder.glob("model-*.gguf")), next(folder.glob("mmproj-*.gguf"), None)
    return ["-m", str(model), *(["--mmproj", str(vision)] if vision else [])]


def ready_export(folder: Path, dtype: str | None, kind: str = "hf") -> Path:
    """The folder itself if it is an export of that kind, else CHECKPOINT/KIND, exported now if it is not there.

    Raises:
        InputError: neither a checkpoint nor such an export.
    """
    from llava_tune.model.factory import RUN_CONFIG, checkpoint_folder

    folder = checkpoint_folder(folder)
    marks = {"hf": "config.json", "gguf": "model-*.gguf"}
    if not (folder / RUN_CONFIG).is_file():
        if next(folder.glob(marks[kind]), None) is not None:
            return folder.resolve()
        raise InputError(
            f"{folder}: neither a checkpoint of llava-tune (no {RUN_CONFIG}) nor an export of format {kind} (no {marks[kind]})"
        )
    target = folder / kind
    if not target.is_dir():
        from llava_tune.export.run import export

        print(f"exporting {folder} to {target}", file=sys.stderr, flush=True)
        export(folder, target, format=kind, dtype=dtype)
    return target.resolve()
