"""The chat as a page (Gradio): pictures by upload, paste or drop, answers as they come, examples to start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_tune.chat.speakers import Speaker, Turn
from llava_tune.model.generate import Sampling


def build_page(speaker: Speaker, examples: list[tuple[Path, str]], max_new_tokens: int, sampling: Sampling) -> Any:
    """The Gradio page; `.launch()` serves it.

    Args:
        examples: pictures with a question each, to click on.
    """
    import gradio

    def answer(
        message: dict[str, Any], history: list[dict[str, Any]], system: str, longest: float, warmth: float
    ) -> Iterator[str]:
        turns = [*turns_of(history), Turn(message["text"], [Path(path) for path in message["files"]])]
        for image in turns[-1].images:
            try:
                speaker.check(image)
            except ValueError as error:  # BadImage
                raise gradio.Error(f"{image.name}: {error}") from error
        if turns[-1].images and not speaker.sees:
            raise gradio.Error("this model has no vision tower: ask without a picture")
        chosen = Sampling(warmth, sampling.top_p, sampling.seed)
        said = ""
        for piece in speaker.stream(turns, system, int(longest), chosen):
            said += piece
            yield said.lstrip()
        if not said.strip():
            yield "(an empty answer)"

    settings: list[Any] = [
        gradio.Textbox(label="System text", lines=2),
        gradio.Slider(1, 4096, value=max_new_tokens, step=1, label="Tokens of an answer at most"),
        gradio.Slider(
            0.0, 2.0, value=sampling.temperature, step=0.05, label="Temperature (0: always the likeliest token)"
        ),
    ]
    return gradio.ChatInterface(
        answer,
        multimodal=True,
        title="LLaVA chat",
        description=f"{speaker.name}. Nothing leaves this machine.",
        textbox=gradio.MultimodalTextbox(
            file_types=["image"] if speaker.sees else [],
            file_count="multiple",
            placeholder="Ask something; add pictures by upload, paste or drop" if speaker.sees else "Ask something",
        ),
        additional_inputs=settings,
        examples=[[{"text": text, "files": [str(path)]}] for path, text in examples] or None,
        cache_examples=False,
        flagging_mode="never",
        analytics_enabled=False,
    )


def turns_of(history: list[dict[str, Any]]) -> list[Turn]:
    """Gradio's messages as turns. A file is a message of its own in front of its text, or a part beside it."""
    turns: list[Turn] = []
    text = ""
    images: list[Path] = []
    for message in history:
        for kind, value in _parts(message["content"]):
            if message["role"] != "user":
                turns.append(Turn(text, images, value))
                text, images = "", []
            elif kind == "file":
                images = [*images, Path(value)]
            else:
                text = value
    return turns


def _parts(content: Any) -> Iterator[tuple[str, str]]:
    if isinstance(content, str):
        yield "text", content
    elif isinstance(content, (list, tuple)):
        for part in content:
            yield from [("file", part)] if isinstance(content, tuple) and part else _parts(part)
    elif isinstance(content, dict):
        if content.get("type") == "text" or "text" in content:
            yield "text", content["text"]
        else:
            file = content.get("file", content)
            yield "file", file["path"] if isinstance(file, dict) else str(file)
