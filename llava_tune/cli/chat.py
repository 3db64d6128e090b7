"""llava-tune chat CHECKPOINT|EXPORT [--image FILE] [--web]"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from llava_tune.errors import InputError, missing_package

if TYPE_CHECKING:
    from llava_tune.chat.speakers import Speaker
    from llava_tune.model.generate import Sampling


@dataclass
class Options:
    """Talk to a model; its answers stream. It may be a checkpoint, an export, or a LLaVA of others that transformers opens."""

    model: tyro.conf.Positional[str]
    """Folder of a checkpoint, such as work_dirs/NAME/checkpoint-100, or of an export; or a Hugging Face name (owner/model)."""
    image: tuple[str, ...] = ()
    """Image files for the first message; with --web, examples to click on."""
    max_new_tokens: int = 512
    """Tokens of an answer at most."""
    temperature: float = 0.0
    """0: always the likeliest token; higher: more varied."""
    top_p: float = 1.0
    """With a temperature: draw among the likeliest tokens that make up this share."""
    seed: int | None = None
    """Makes drawn answers repeatable."""
    web: bool = False
    """Serve a page instead of the terminal."""
    host: str = "127.0.0.1"
    """With --web: address to listen on."""
    port: int = 7860
    """With --web: port to listen on."""


def main(arguments: list[str]) -> None:
    """Read lines until the end of the input or /quit; or serve the page."""
    options = tyro.cli(Options, args=arguments, prog="llava-tune chat", use_underscores=False)
    images = [Path(image).expanduser() for image in options.image]
    for image in images:
        if not image.is_file():
            raise InputError(f"--image {image}: no such file")
    if options.web:
        import importlib.util

        if importlib.util.find_spec("gradio") is None:
            raise missing_package("gradio", "web", "chat --web")
    from llava_tune.chat.speakers import open_speaker
    from llava_tune.model.generate import Sampling

    sampling = Sampling(options.temperature, options.top_p, options.seed)
    speaker = open_speaker(options.model)
    if options.web:
        _serve(speaker, images, options, sampling)
        return
    from llava_tune.chat.terminal import Conversation, talk

    talk(Conversation(speaker, options.max_new_tokens, sampling), images)


def _serve(speaker: Speaker, images: list[Path], options: Options, sampling: Sampling) -> None:
    from llava_tune.chat.web import build_page

    page = build_page(
        speaker, [(image, "What is in the picture?") for image in images], options.max_new_tokens, sampling
    )
    folders = sorted({str(image.resolve().parent) for image in images})
    page.launch(
        server_name=options.host,
        server_port=options.port,
        allowed_paths=folders,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"{options.model} at http://{options.host}:{options.port} (end with Ctrl-C)", flush=True)
    page.block_thread()
