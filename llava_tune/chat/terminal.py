"""The chat in the terminal: lines in, answers streaming out, pictures by their paths."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path

from llava_tune.chat.speakers import Speaker, Turn
from llava_tune.data import BadImage
from llava_tune.model.generate import Sampling

HELP = """/image FILE ...  add pictures to your next message; or write (or drop) their paths in front of it
/reset           forget the conversation
/system TEXT     set what is said before it
/save FILE       write it
/quit            end"""


class Conversation:
    """The turns so far, and the pictures waiting for the next message."""

    def __init__(self, speaker: Speaker, max_new_tokens: int, sampling: Sampling) -> None:
        self.speaker, self.max_new_tokens, self.sampling = speaker, max_new_tokens, sampling
        self.system = ""
        self.reset()

    def reset(self) -> None:
        """Forget all but the system text."""
        self.turns: list[Turn] = []
        self.waiting: list[Path] = []

    def add_image(self, path: Path) -> str:
        """Take a picture for the next message. Returns what to say."""
        if not self.speaker.sees:
            return f"{path}: this model has no vision tower"
        try:
            self.speaker.check(path)
        except BadImage as error:
            return f"{path}: {error}"
        self.waiting.append(path)
        return f"{path} goes with your next message"

    def ask(self, text: str) -> None:
        """Answer a message, streaming to standard output. A failed answer leaves the conversation as it was."""
        turn = Turn(text, self.waiting)
        said = ""
        try:
            for piece in self.speaker.stream([*self.turns, turn], self.system, self.max_new_tokens, self.sampling):
                piece = piece if said else piece.lstrip()
                said += piece
                print(piece, end="", flush=True)
        finally:
            print(flush=True)
        self.turns.append(Turn(text, self.waiting, said.strip()))
        self.waiting = []

    def text(self) -> str:
        """All that was said."""
        lines = [f"system: {self.system}"] if self.system else []
        for turn in self.turns:
            lines += [*(f"image: {path}" for path in turn.images), f"you: {turn.text}", f"model: {turn.answer}"]
        return "".join(f"{line}\n" for line in lines)


def talk(conversation: Conversation, images: list[Path]) -> None:
    """Read lines until the end of the input or /quit.

    Args:
        images: for the first message.
    """
    for image in images:
        print(conversation.add_image(image))
    typed = sys.stdin.isatty()
    if typed:
        _remember_lines()
    print(HELP)
    while True:
        try:
            line = input("you: " if typed else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            return
        if line == "/quit":
            return
        if line:
            try:
                _handle(conversation, line)
            except KeyboardInterrupt:
                print("(stopped)")


def _remember_lines() -> None:
    """Arrow keys and a history that outlives the session, where Python has readline."""
    import atexit

    from llava_tune.paths import cache_folder

    with contextlib.suppress(ImportError, OSError):
        import readline

        file = cache_folder() / "chat_history"
        file.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            readline.read_history_file(file)
        readline.set_history_length(1000)
        atexit.register(readline.write_history_file, file)


def _handle(conversation: Conversation, line: str) -> None:
    command, _, rest = line.partition(" ")
    if command == "/image" and rest:
        paths, unknown = leading_files(rest)
        for path in [*paths, *([Path(unknown)] if unknown else [])]:
            print(conversation.add_image(path))
    elif command == "/reset":
        conversation.reset()
        print("forgotten")
    elif command == "/system":
        conversation.system = rest
        print("set" if rest else "removed")
    elif command == "/save" and rest:
        path = Path(rest).expanduser()
        try:
            path.write_text(conversation.text(), encoding="utf-8")
        except OSError as error:
            print(f"{path}: {error.strerror}")
        else:
            print(f"written to {path}")
    elif command.startswith("/") and not leading_files(line)[0]:
        print(HELP)
    else:
        paths, text = leading_files(line)
        for path in paths:
            print(conversation.add_image(path))
        if text:
            conversation.ask(text)


def leading_files(line: str) -> tuple[list[Path], str]:
    """Files named at the front of a line, as a terminal pastes or drops them (quoted, or with escaped spaces), and the rest."""
    found: list[Path] = []
    rest = line.strip()
    while rest:
        reader = shlex.shlex(rest, posix=True)
        reader.whitespace_split, reader.commenters = True, ""
        try:
            word = reader.get_token()
        except ValueError:  # an unclosed quote: no path
            break
        path = Path((word or "").removeprefix("file://")).expanduser()
        try:
            if not word or not path.is_file():
                break
        except OSError:
            break
        found.append(path)
        rest = rest[_consumed(rest, word) :].lstrip()
    return found, rest


def _consumed(text: str, word: str) -> int:
    """Characters at the front of `text` that shlex reads as `word`."""
    for end in range(len(word), len(text) + 1):
        if end == len(text) or text[end].isspace():
            with contextlib.suppress(ValueError):
                if shlex.split(text[:end]) == [word]:
                    return end
    return len(text)
