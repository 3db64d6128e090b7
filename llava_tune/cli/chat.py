"""llava-tune chat CHECKPOINT [--image FILE]"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

if TYPE_CHECKING:
    from torch import Tensor

    from llava_tune.evaluate.answer import Answerer

HELP = (
    "/image FILE adds an image to your next message, /reset forgets the conversation, /system TEXT sets what is said before \
it, /save FILE writes it, /quit ends"
)


@dataclass
class Options:
    """Talk to a checkpoint in the terminal; its answers stream."""

    checkpoint: tyro.conf.Positional[str]
    """Folder of a checkpoint, such as work_dirs/NAME/checkpoint-100."""
    image: tuple[str, ...] = ()
    """Image files for the first message."""
    max_new_tokens: int = 512
    """Tokens of an answer at most."""


class Conversation:
    """The rounds so far, the images in them, and those waiting for the next message."""

    def __init__(self, answerer: Answerer, max_new_tokens: int) -> None:
        self.answerer, self.max_new_tokens = answerer, max_new_tokens
        self.system = ""
        self.reset()

    def reset(self) -> None:
        """Forget all but the system text."""
        self.rounds: list[tuple[str, str]] = []
        self.images: list[Tensor] = []
        self.waiting: list[Tensor] = []

    def add_image(self, path: str) -> str:
        """Take an image for the next message. Returns what to say."""
        from llava_tune.data import BadImage

        try:
            self.waiting.append(self.answerer.transform.open(Path(path).expanduser()))
        except BadImage as error:
            return f"{path}: {error}"
        return f"{path} goes with your next message"

    def ask(self, text: str) -> str:
        """Answer a message, streaming to standard output."""
        from llava_tune.constants import IMAGE_PLACEHOLDER

        # What is typed is text: a literal <image> must not stand for an image that isn't there.
        typed = text.replace(IMAGE_PLACEHOLDER, "< image>")
        question = "\n".join([*[IMAGE_PLACEHOLDER] * len(self.waiting), typed])
        images = [*self.images, *self.waiting]
        prompt = self.answerer.prompt(self.rounds, question, self.system)
        answer = self.answerer.answer([prompt], images, self.max_new_tokens, streamer=self._streamer())[0]
        self.rounds.append((question, answer))
        self.images, self.waiting = images, []
        return answer

    def _streamer(self) -> Any:
        from transformers import TextStreamer

        return TextStreamer(self.answerer.tokenizer, skip_special_tokens=True)


def main(arguments: list[str]) -> None:
    """Read lines until the end of the input or /quit."""
    options = tyro.cli(Options, args=arguments, prog="llava-tune chat", use_underscores=False)
    from llava_tune.evaluate.answer import Answerer

    conversation = Conversation(Answerer(options.checkpoint), options.max_new_tokens)
    for image in options.image:
        print(conversation.add_image(image))
    print(HELP)
    while True:
        try:
            line = input("you: " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line:
            _handle(conversation, line)


def _handle(conversation: Conversation, line: str) -> None:
    command, _, rest = line.partition(" ")
    if not command.startswith("/"):
        conversation.ask(line)
    elif command == "/image" and rest:
        print(conversation.add_image(rest))
    elif command == "/reset":
        conversation.reset()
        print("forgotten")
    elif command == "/system":
        conversation.system = rest
        print("set")
    elif command == "/save" and rest:
        Path(rest).write_text("".join(f"you: {q}\nmodel: {a}\n" for q, a in conversation.rounds))
        print(f"written to {rest}")
    else:
        print(HELP)
