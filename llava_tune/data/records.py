"""A record: one conversation and its images, checked. The currency between reading and tokenizing."""

from __future__ import annotations

from typing import Any, NamedTuple

from llava_tune.constants import IMAGE_PLACEHOLDER

USER_ROLES = frozenset({"human", "user"})
ASSISTANT_ROLES = frozenset({"gpt", "assistant"})


class Record(NamedTuple):
    """A conversation: what was said before it, its rounds of (question, answer), and the images in their order."""

    id: str
    images: list[str]
    system: str
    rounds: list[tuple[str, str]]
    fixes: tuple[str, ...] = ()


class BadRecord(ValueError):
    """A record that can't be trained on; the message says why."""


def parse_record(raw: Any, fallback_id: str) -> Record:
    """A LLaVA record {"id", "image", "system", "conversations": [{"from", "value"}, ...]} as a Record.

    Consecutive messages of one role are joined by a newline; an answer before any question and a question after the
    last answer are dropped, and named in `fixes`.

    Raises:
        BadRecord: a wrong structure, an unknown role, no answer, or images and placeholders that don't agree.
    """
    if type(raw) is not dict:
        raise BadRecord(f"expected a JSON object, found {_kind(raw)}")
    conversations = raw.get("conversations")
    if type(conversations) is not list or not conversations:
        raise BadRecord(f"'conversations' must be a list of messages, found {_kind(conversations)}")
    identity = raw.get("id")
    before = raw.get("system") or ""
    if type(before) is not str:
        raise BadRecord(f"'system' must be a string, found {_kind(before)}")
    images = _images(raw.get("image"))
    try:
        rounds, system, fixes = _rounds(conversations)
    except (KeyError, TypeError, AttributeError):
        raise BadRecord(_describe_broken(conversations)) from None
    placeholders = 0
    for question, _ in rounds:
        placeholders += question.count(IMAGE_PLACEHOLDER)
    if placeholders != len(images):
        raise BadRecord(_disagreement(placeholders, len(images)))
    system = "\n".join(text for text in (before, system) if text)
    return Record(fallback_id if identity is None else str(identity), images, system, rounds, fixes)


def _rounds(messages: list[Any]) -> tuple[list[tuple[str, str]], str, tuple[str, ...]]:
    turns: list[list[str]] = []  # [role, text]
    for message in messages:
        role, text = message["from"], message["value"]
        if type(text) is not str:
            raise BadRecord(f"a message's 'value' must be a string, found {_kind(text)}")
        role = "user" if role in USER_ROLES else "assistant" if role in ASSISTANT_ROLES else role
        if role not in ("user", "assistant", "system"):
            raise BadRecord(f"unknown role {role!r} in 'from'; expected human, gpt or system")
        if turns and turns[-1][0] == role:
            turns[-1][1] += "\n" + text
        else:
            turns.append([role, text])
    fixes = []
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else ""
    if any(role == "system" for role, _ in turns):
        raise BadRecord("a system message that is not the first message")
    if turns and turns[0][0] == "assistant":
        turns.pop(0)
        fixes.append("an answer before any question was dropped")
    if turns and turns[-1][0] == "user" and len(turns) > 1:
        turns.pop()
        fixes.append("a last question without an answer was dropped")
    if len(turns) < 2:
        raise BadRecord("no question with an answer")
    return [(q[1], a[1]) for q, a in zip(turns[::2], turns[1::2], strict=True)], system, tuple(fixes)


def _images(value: Any) -> list[str]:
    if value is None or value == "":
        return []
    images = [value] if type(value) is str else value
    if type(images) is not list or not all(type(i) is str and i for i in images):
        raise BadRecord(f"'image' must be a path or a list of paths, found {_kind(value)}")
    for path in images:
        if path[0] in "/\\" or ".." in path.replace("\\", "/").split("/") or "\0" in path:
            raise BadRecord(f"the image path {path!r} leaves the image folder")
    return images


def _disagreement(placeholders: int, images: int) -> str:
    if not images:
        return f"{placeholders} {IMAGE_PLACEHOLDER} in the text but no image"
    if not placeholders:
        return f"{images} image(s) but no {IMAGE_PLACEHOLDER} in the text"
    return f"{placeholders} {IMAGE_PLACEHOLDER} in the text but {images} image(s)"


def _describe_broken(messages: list[Any]) -> str:
    for i, message in enumerate(messages):
        if type(message) is not dict:
            return f"message {i} must be an object with 'from' and 'value', found {_kind(message)}"
        for key in ("from", "value"):
            if key not in message:
                return f"message {i} has no {key!r}"
    return "the messages can't be read"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number", bool: "a boolean"}
    if value is None:
        return "nothing"
    if isinstance(value, (list, dict, str)) and not value:
        return "an empty one"
    return names.get(type(value), type(value).__name__)
