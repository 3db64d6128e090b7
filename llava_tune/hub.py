"""Hugging Face's Hub: whether it can be reached is asked once a process, instead of minutes of retries for each file."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from llava_tune.errors import InputError

_SECONDS = 5.0


@cache
def hub_answers() -> bool:
    """Whether the Hub's machine can be reached, or a proxy is set that may; if not, its cache alone is used from now on, by child processes,
    too (HF_HUB_OFFLINE)."""
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    if getproxies().keys() & {"http", "https", "all"}:
        return True
    place = urlsplit(constants.ENDPOINT)
    try:
        port = place.port or (443 if place.scheme == "https" else 80)
        socket.create_connection((place.hostname, port), _SECONDS).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"
        return False
    return True


def not_found(name: str, error: Exception) -> str:
    """Why the Hub gave nothing of that name, and what to do."""
    if hub_answers():
        return str(error).strip().split("\n", 1)[0]
    from huggingface_hub import constants

    return (
        f"there is no such folder, it is not in {constants.HF_HUB_CACHE}, and {constants.ENDPOINT} can't be reached from here (or "
        f"HF_HUB_OFFLINE is set). Name a folder, or run where it can be reached: hf download {name}"
    )


@contextmanager
def from_hub(field: str, name: str) -> Iterator[None]:
    """Around what takes `name` from the Hub, or from its cache.

    Args:
        field: of the config that asks for it; the message begins with it.

    Raises:
        InputError: it can't be had.
    """
    hub_answers()
    try:
        yield
    except Exception as error:
        raise InputError(f"{field}: {not_found(name, error)}") from error
