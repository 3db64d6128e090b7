"""What `doctor` can find, how bad each is, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]

EXAMPLES = 20
"""Examples of a finding that a report names; the list of bad records has them all."""


@dataclass(frozen=True)
class Kind:
    """A kind of finding.

    Attributes:
        severity: error: it would harm the run; warning: something is lost or unusual; note: good to know.
        what: one line, for the table.
        advice: what to do.
        lost: the records with it take no part in training; too many of them are an error.
    """

    severity: Severity
    what: str
    advice: str
    lost: bool = False


KINDS = {
    "source": Kind("error", "data files that can't be read", "mend or remove the file; nothing is trained without it"),
    "record": Kind("warning", "records that can't be used", "mend them, or prepare with --skip", lost=True),
    "unsupervised": Kind(
        "warning", "records with nothing supervised within max_length", "raise dataset.max_length", lost=True
    ),
    "image_missing": Kind("warning", "images that are not there", "check dataset.image_folder", lost=True),
    "image_outside": Kind("warning", "image paths that leave the image folder", "mend the paths", lost=True),
    "image_broken": Kind("warning", "images that can't be decoded", "download them again", lost=True),
    "image_huge": Kind("warning", "images too large to decode safely", "resize them", lost=True),
    "duplicate": Kind("warning", "records that are there more than once, word for word", "remove the copies"),
    "duplicate_id": Kind(
        "warning", "ids that several different records have", "give each its own, so that lists name one"
    ),
    "roles": Kind(
        "warning", "records whose roles were out of order and were mended", "see which messages were dropped"
    ),
    "truncated": Kind("warning", "records cut to max_length", "raise dataset.max_length, or shorten them"),
    "control_text": Kind(
        "note", "records whose text spells a control token", "nothing: it is encoded as plain text, never as the token"
    ),
    "placeholder_in_answer": Kind("note", "records with <image> in an answer", "nothing: it is plain text there"),
    "image_rotated": Kind(
        "note", "images that EXIF says are turned", "nothing, or turn them: EXIF is not applied (as in LLaVA)"
    ),
    "image_narrow": Kind("note", "images more than 8 times as long as wide", "little of them is seen after resizing"),
    "image_animated": Kind("note", "images of several frames", "nothing: the first frame is used"),
    "image_mode": Kind("note", "images not in 8-bit RGB or grey", "nothing: they are converted"),
    "image_suffix": Kind(
        "note", "images of another format than their name says", "nothing: the content is what counts"
    ),
    "model": Kind(
        "error", "parts of the model that can't be had", "see the message; or --no-model to leave the model out"
    ),
    "disk": Kind("error", "too little free disk space", "free some, or choose another folder"),
}
ORDER: dict[str, int] = {"error": 0, "warning": 1, "note": 2}


@dataclass
class Finding:
    """A kind of finding, how often it was found, and where.

    Attributes:
        examples: what names it: {"id", "line" or "row", "source", "image", "reason"} as far as they apply.
    """

    kind: str
    count: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)
    severity: Severity = "note"

    def add(self, example: dict[str, Any]) -> None:
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(example)
