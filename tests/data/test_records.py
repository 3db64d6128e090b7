"""What a record must be, and what is said of one that isn't."""

from __future__ import annotations

from typing import Any

import pytest

from llava_tune.data.records import BadRecord, parse_record


def said(*turns: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": "r", "conversations": [{"from": role, "value": text} for role, text in turns], **more}


def test_a_plain_record() -> None:
    record = parse_record(
        said(("human", "<image>\nq"), ("gpt", "a"), ("human", "q2"), ("gpt", "a2"), image="x.jpg"), "?"
    )
    assert record.images == ["x.jpg"]
    assert record.rounds == [("<image>\nq", "a"), ("q2", "a2")]


def test_a_string_is_one_image_whatever_its_length() -> None:
    assert parse_record(said(("human", "<image>"), ("gpt", "a"), image="a_long_name.jpg"), "?").images == [
        "a_long_name.jpg"
    ]


def test_roles_out_of_order_are_mended_and_named() -> None:
    record = parse_record(said(("gpt", "lead"), ("human", "q"), ("human", "q2"), ("gpt", "a"), ("human", "last")), "?")
    assert record.rounds == [("q\nq2", "a")]
    assert record.fixes == (
        "an answer before any question was dropped",
        "a last question without an answer was dropped",
    )


def test_a_missing_id_gets_the_place() -> None:
    raw = said(("human", "q"), ("gpt", "a"))
    del raw["id"]
    assert parse_record(raw, "part 0 record 7").id == "part 0 record 7"
    assert parse_record({**raw, "id": 0}, "?").id == "0"


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        ([1], "expected a JSON object, found a list"),
        ({"id": 1}, "'conversations' must be a list of messages, found nothing"),
        ({"conversations": []}, "found an empty one"),
        (said(("human", "q")), "no question with an answer"),
        (said(("gpt", "a")), "no question with an answer"),
        (said(("human", None), ("gpt", "a")), "must be a string, found nothing"),
        (said(("robot", "q"), ("gpt", "a")), "unknown role 'robot'"),
        (said(("human", "q"), ("system", "s"), ("gpt", "a")), "not the first message"),
        ({"conversations": ["x", "y"]}, "message 0 must be an object with 'from' and 'value', found a string"),
        ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "a"}]}, "message 0 has no 'value'"),
        (said(("human", "q"), ("gpt", "a"), image="x.jpg"), "1 image(s) but no <image> in the text"),
        (said(("human", "<image>"), ("gpt", "a")), "1 <image> in the text but no image"),
        (said(("human", "<image>"), ("gpt", "a"), image=["a", "b"]), "1 <image> in the text but 2 image(s)"),
        (said(("human", "<image>"), ("gpt", "a"), image=7), "must be a path or a list of paths, found a number"),
        (said(("human", "<image>"), ("gpt", "a"), image="../x.jpg"), "leaves the image folder"),
        (said(("human", "<image>"), ("gpt", "a"), image="/etc/x.jpg"), "leaves the image folder"),
        (said(("human", "<image>"), ("gpt", "a"), image="a\\..\\x.jpg"), "leaves the image folder"),
        (said(("human", "<image>"), ("gpt", "a"), image="a\0.jpg"), "leaves the image folder"),
    ],
)
def test_bad_records_say_why(raw: Any, why: str) -> None:
    with pytest.raises(BadRecord) as error:
        parse_record(raw, "?")
    assert why in str(error.value)
