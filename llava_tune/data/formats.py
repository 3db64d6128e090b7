"""Record formats: each a function from a record as it is in the file to one as LLaVA's JSON has it."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_tune.constants import IMAGE_PLACEHOLDER
from llava_tune.data.records import BadRecord
from llava_tune.data.sources import Source
from llava_tune.errors import InputError

Convert = Callable[[Any], Any]

_OTHER_PLACEHOLDERS = ("<IMG_CONTEXT>", "<|image|>", "<image_placeholder>")


def sharegpt(record: dict[str, Any]) -> dict[str, Any]:
    """ShareGPT, as LLaMA-Factory writes it: LLaVA's conversations, with `system` and a list of `images`."""
    return {
        "id": record.get("id"),
        "image": _references(record.get("image") or record.get("images")),
        "system": record.get("system"),
        "conversations": record.get("conversations"),
    }


def alpaca(record: dict[str, Any]) -> dict[str, Any]:
    """Alpaca: instruction, input, output, and LLaMA-Factory's `history`, `system` and `images`."""
    instruction, extra, output = record.get("instruction"), record.get("input"), record.get("output")
    if not isinstance(instruction, str) or not isinstance(output, str) or not isinstance(extra, str | None):
        raise BadRecord("'instruction' and 'output' must be strings, and 'input' one or nothing")
    turns = [*(record.get("history") or []), (f"{instruction}\n{extra}" if extra else instruction, output)]
    return {
        "id": record.get("id"),
        "image": _references(record.get("image") or record.get("images")),
        "system": record.get("system"),
        "conversations": [
            {"from": who, "value": text} for pair in turns for who, text in zip(("human", "gpt"), pair, strict=True)
        ],
    }


def messages(record: Any) -> dict[str, Any]:
    """OpenAI's and Hugging Face's messages: {"role", "content"}, the content a text or a list of parts.

    An image part names its file (`image_url`, `image`, `path` or `url`), or takes the next one of the record's `images`.
    """
    if isinstance(record, list):
        record = {"messages": record}
    listed = _references(record.get("image") or record.get("images")) or []
    unnamed = iter([listed] if isinstance(listed, str) else listed)
    found: list[str] = []
    turns = []
    raw = record.get("messages")
    if not isinstance(raw, list):
        raise BadRecord("'messages' must be a list of messages")
    for message in raw:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise BadRecord("a message must be an object with 'role' and 'content'")
        role = {"developer": "system"}.get(message["role"], message["role"])
        turns.append({"from": role, "value": _content(message["content"], unnamed, found)})
    found += unnamed  # those that plain text refers to by a placeholder
    return {"id": record.get("id"), "image": found, "system": record.get("system"), "conversations": turns}


def _content(content: Any, unnamed: Any, found: list[str]) -> Any:
    if not isinstance(content, list):
        return content
    pieces: list[tuple[bool, str]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            pieces.append((False, str(part.get("text", ""))))
        elif kind in ("image_url", "image"):
            named = part.get("image_url") or part.get("image") or part.get("path") or part.get("url")
            if isinstance(named, dict):
                named = named.get("url") or named.get("path")
            named = named or next(unnamed, None)
            if not isinstance(named, str):
                raise BadRecord("an image part names no file, and the record's 'images' has none left")
            found.append(_reference(named))
            pieces.append((True, IMAGE_PLACEHOLDER))
        else:
            raise BadRecord(f"a part of type {kind!r}; text, image and image_url are understood")
    count = sum(image for image, _ in pieces)
    text = "".join(t for image, t in pieces if not image)
    for token in (IMAGE_PLACEHOLDER, *_OTHER_PLACEHOLDERS):
        if count and text.count(token) == count:  # the text says itself where the images go
            return text.replace(token, IMAGE_PLACEHOLDER)
    joined = ""
    for k, (image, text) in enumerate(pieces):
        between = "\n" if k and (image or pieces[k - 1][0]) and not joined.endswith("\n") else ""
        joined += between + text
    return joined


def _references(images: Any) -> Any:
    if isinstance(images, list):
        return [_reference(i.get("path") if isinstance(i, dict) else i) for i in images]
    return _reference(images) if isinstance(images, str) else images


def _reference(image: Any) -> Any:
    if isinstance(image, str):
        if image.startswith("data:"):
            raise BadRecord("an image inside the record (data: URL); save it as a file and name that")
        if image.startswith(("http://", "https://")):
            raise BadRecord(f"an image on the web ({image[:80]}); download it and name the file")
        image = image.removeprefix("file://")
    return image


FORMATS: dict[str, Convert | None] = {"llava": None, "sharegpt": sharegpt, "messages": messages, "alpaca": alpaca}


def detect_format(source: Source) -> str:
    """Tell a source's format by its first record.

    Raises:
        InputError: none of them; names the keys found.
    """
    row = source.first_row()
    if isinstance(row, list) and row and isinstance(row[0], dict) and "role" in row[0]:
        return "messages"
    keys = set(row) if isinstance(row, dict) else set()
    if "conversations" in keys:
        return "sharegpt" if "images" in keys else "llava"
    if "messages" in keys:
        return "messages"
    if {"instruction", "output"} <= keys:
        return "alpaca"
    if row is None or not keys:
        return "llava"  # each record then says what is wrong with it
    raise InputError(
        f"data_path {source.path}: the first record has the keys {', '.join(sorted(map(str, keys)))}, which is none of the "
        f"formats {', '.join(FORMATS)}. Set dataset.convert to a function that makes LLaVA's record of one"
    )


def converter(format: str, convert: str | None) -> Convert | None:
    """The function that makes LLaVA's record; None where the records are that already.

    Raises:
        InputError: `convert` can't be loaded, see `load_function`.
    """
    return load_function(convert) if convert else FORMATS[format]


@functools.lru_cache
def load_function(name: str) -> Convert:
    """The function of `module:name` or `file.py:name`.

    Raises:
        InputError: no such module, file or function.
    """
    place, _, attribute = name.rpartition(":")
    try:
        names = runpy.run_path(place) if place.endswith(".py") else vars(importlib.import_module(place))
    except Exception as error:
        raise InputError(f"dataset.convert {name!r}: loading it failed: {type(error).__name__}: {error}") from error
    found = names.get(attribute)
    if not callable(found):
        raise InputError(f"dataset.convert {name!r}: {place} has no function {attribute!r}")
    return found


def convert_fingerprint(name: str) -> str:
    """Of a function's source text, so that a store made with another version of it is told apart."""
    place, _, _ = name.rpartition(":")
    try:
        text = Path(place).read_text() if place.endswith(".py") else inspect.getsource(load_function(name))
    except (OSError, TypeError):
        text = name
    return hashlib.sha256(text.encode()).hexdigest()
