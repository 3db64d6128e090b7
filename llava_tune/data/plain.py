"""Plain records in bulk: the common shape of a record as typed structs, checked many at a time without a loop over them.

A record is plain if its messages are a user's and an assistant's in turns, and each of its images stands alone in its turn.
All others go through `records.parse_record`, one by one; both ways give the same samples (tests/data/test_plain.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, compress
from operator import attrgetter
from typing import Any, Literal

import msgspec
import numpy as np

from llava_tune.constants import IMAGE_PLACEHOLDER
from llava_tune.data.records import ASSISTANT_ROLES, USER_ROLES

_ROLE = {**dict.fromkeys(USER_ROLES, 0), **dict.fromkeys(ASSISTANT_ROLES, 1)}
_UNSAFE_PATH = re.compile(r"^[/\\]|\.\.|\0|^$", re.MULTILINE)


class Message(msgspec.Struct, gc=False):
    """One message of a conversation."""

    role: str = msgspec.field(name="from")
    value: str


class RawRecord(msgspec.Struct, gc=False):
    """A record as LLaVA's JSON has it, types checked and nothing else."""

    conversations: list[Message]
    id: str | int | None = None
    image: str | list[str] | None = None
    system: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """What `parse_record` reads."""
        messages = [{"from": m.role, "value": m.value} for m in self.conversations]
        return {"id": self.id, "image": self.image, "system": self.system, "conversations": messages}


@dataclass
class PlainRecords:
    """Records that are plain, as columns.

    Attributes:
        rows: int64 [records], their indices among the records given.
        ids: of each; None where the record has none.
        images: of each.
        rounds: int64 [records], rounds of each.
        questions, answers: of all rounds behind one another; a question with an image is what follows the image.
        has_image: bool [rounds].
        odd: indices of the records that are not plain.
    """

    rows: np.ndarray
    ids: list[str | None]
    images: list[list[str]]
    rounds: np.ndarray
    questions: list[str]
    answers: list[str]
    has_image: np.ndarray
    odd: np.ndarray


def plain_records(records: Sequence[RawRecord], image_position: Literal["front", "as_written"]) -> PlainRecords:
    """Sort out the plain ones of `records`, and lay their text out in columns."""
    conversations = [r.conversations for r in records]
    counts = np.array([len(c) for c in conversations], np.int64)
    messages = list(chain.from_iterable(conversations))
    plain = _in_turns(counts, messages) & np.array([not r.system for r in records], bool)
    images: list[list[str]] = [x if type(x) is list else [x] if x else [] for x in map(_image, records)]
    paths = list(chain.from_iterable(images))
    if paths and _UNSAFE_PATH.search("\n".join(paths)) and any(map(_UNSAFE_PATH.search, paths)):
        plain &= np.array([not any(map(_UNSAFE_PATH.search, some)) for some in images])
    texts = [m.value for m in messages]
    kept: Sequence[RawRecord] = records
    if not plain.all():
        kept = list(compress(records, plain.tolist()))
        texts = list(compress(texts, np.repeat(plain, counts).tolist()))
    rounds = counts[plain] // 2
    questions, answers = texts[::2], texts[1::2]
    has_image = np.array([IMAGE_PLACEHOLDER in q for q in questions], bool)
    alone = np.ones(len(questions), bool)
    for i in np.flatnonzero(has_image).tolist():
        before, after = questions[i].split(IMAGE_PLACEHOLDER, 1)
        if IMAGE_PLACEHOLDER in after or (before and image_position == "as_written"):
            alone[i] = False
        elif image_position == "front":
            rest = (before + after).strip()
            questions[i] = "\n" + rest if rest else ""
        else:
            questions[i] = after
    starts = np.cumsum(rounds) - rounds
    wanted = np.array([len(some) for some in images], np.int64)[plain]
    fits = np.add.reduceat(has_image.astype(np.int64), starts) == wanted if len(rounds) else np.zeros(0, bool)
    fits &= np.logical_and.reduceat(alone, starts) if len(rounds) else True
    rows = np.flatnonzero(plain)
    if not fits.all():
        in_round = np.repeat(fits, rounds).tolist()
        questions, answers = list(compress(questions, in_round)), list(compress(answers, in_round))
        has_image = has_image[in_round]
        kept, rows, rounds = list(compress(kept, fits.tolist())), rows[fits], rounds[fits]
        plain = np.zeros(len(records), bool)
        plain[rows] = True
    if len(rows) != len(records):
        images = list(compress(images, plain.tolist()))
    return PlainRecords(
        rows=rows,
        ids=[r.id if type(r.id) is str or r.id is None else str(r.id) for r in kept],
        images=images,
        rounds=rounds,
        questions=questions,
        answers=answers,
        has_image=has_image,
        odd=np.flatnonzero(~plain),
    )


_image = attrgetter("image")


def _in_turns(counts: np.ndarray, messages: list[Message]) -> np.ndarray:
    """Which records are a question and an answer in turns; bool [records]."""
    code = _ROLE.get
    roles = np.array([code(m.role, 2) for m in messages], np.int8)
    starts = np.cumsum(counts) - counts
    expected = (np.arange(len(roles)) - np.repeat(starts, counts)) % 2
    wrong = np.concatenate([[0], np.cumsum(roles != expected)])
    return (counts > 0) & (counts % 2 == 0) & (wrong[starts + counts] == wrong[starts])
