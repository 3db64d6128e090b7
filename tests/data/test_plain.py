"""Records in bulk give what records one by one give, on any conversation."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_tune.data.parts import DataSet, Job, Part, Task, Worker
from llava_tune.data.plain import Message, RawRecord
from llava_tune.data.records import BadRecord, Record, parse_record
from llava_tune.data.sources import Span
from llava_tune.data.tokens.layout import Layout, LayoutSpec
from llava_tune.data.tokens.templates import get_template
from llava_tune.data.tokens.tokenizer import load_tokenizer, load_vocabulary

pieces = [*"ab  \n\t.,12é中。🙂▁<|>", "<image>", "<|im_end|>", "<|im_start|>", "</s>", "word ", "\x00"]
texts = st.lists(st.sampled_from(pieces), max_size=12).map("".join)
turns = st.tuples(st.sampled_from(["human", "human", "gpt", "gpt", "system", "user", "assistant", "other"]), texts)
in_turns = st.lists(st.tuples(texts, texts), min_size=1, max_size=3).map(
    lambda rounds: [turn for q, a in rounds for turn in (("human", q), ("gpt", a))]
)
images = st.one_of(
    st.none(),
    st.just(""),
    st.just("a.jpg"),
    st.just("../a.jpg"),
    st.lists(st.sampled_from(["a.jpg", "b/c.jpg", "/d"]), max_size=2),
)
records = st.builds(
    RawRecord,
    conversations=st.one_of(in_turns, st.lists(turns, max_size=5)).map(lambda said: [Message(*turn) for turn in said]),
    id=st.one_of(st.none(), st.integers(0, 9), st.text(max_size=3)),
    image=images,
    system=st.one_of(st.none(), st.just(""), texts),
)


tokenizer_of = functools.cache(load_tokenizer)


@functools.cache
def worker(tokenizer: str, template: str, max_length: int, position: str) -> tuple[Worker, Layout]:
    spec = LayoutSpec.of(load_vocabulary(tokenizer), get_template(template), max_length, 4, position)  # type: ignore[arg-type]
    made = Worker(Job(Path("/none"), (DataSet(spec, "llava", None),), ()))
    return made, made.layout(spec)


@pytest.mark.parametrize(("position", "max_length"), [("front", 4096), ("as_written", 4096), ("front", 24)])
@settings(max_examples=120, deadline=None)
@given(rows=st.lists(records, min_size=1, max_size=8))
def test_bulk_equals_one_by_one(
    internlm2_tokenizer: Path, position: str, max_length: int, rows: list[RawRecord]
) -> None:
    _, layout = worker(str(internlm2_tokenizer), "internlm2_chat", max_length, position)

    class Source:
        unit = "line"

    part = Part(Task(3, 0, Span(0, 0, 0)), Source(), layout, frozenset())  # type: ignore[arg-type]
    bulk = part.tokenize(rows, 0)

    expected = []
    bad = {}
    for i, row in enumerate(rows):
        try:
            record = parse_record(row.as_dict(), f"part 3 record {i}")
            one = layout.tokenize([record])
        except BadRecord as error:
            bad[i] = str(error)
            continue
        if one.unsupervised:
            bad[i] = one.unsupervised[0][1]
        else:
            expected.append(
                (one.ids[0], one.images[0], one.input_ids.tolist(), one.labels.tolist(), int(one.lengths[0]))
            )
    found = [
        (
            bulk.ids[k],
            bulk.images[k],
            bulk.input_ids[a:b].tolist(),
            bulk.labels[a:b].tolist(),
            int(bulk.lengths[k]),
        )
        for k, (a, b) in enumerate(zip(bulk.offsets[:-1], bulk.offsets[1:], strict=True))
    ]
    assert found == expected
    assert {i: why for i, _, why in part.left_out} == bad
    assert part.counts["samples"] == len(expected)


@settings(max_examples=200, deadline=None)
@given(rounds=st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
def test_tokens_give_the_text_back_and_no_control_token(
    internlm2_tokenizer: Path, rounds: list[tuple[str, str]]
) -> None:
    """Round trip: the ids decode to the conversation; control tokens are the layout's own, however the text looks."""
    _, layout = worker(str(internlm2_tokenizer), "internlm2_chat", 4096, "front")
    tokenizer = tokenizer_of(str(internlm2_tokenizer))
    rounds = [(q.replace("image", "picture"), a.replace("image", "picture")) for q, a in rounds]
    batch = layout.tokenize([Record("x", [], "", rounds)])
    ids = batch.input_ids
    assert int(np.isin(ids, [92543]).sum()) == 2 * len(rounds)
    assert int(np.isin(ids, [92542]).sum()) == 2 * len(rounds)
    assert int(np.isin(ids, [1]).sum()) == 1 and not np.isin(ids, [2]).any()
    pieces = "".join(tokenizer.convert_ids_to_tokens(ids[1:].tolist()))
    said = "".join(f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n" for q, a in rounds)
    backend = tokenizer.backend_tokenizer.decoder
    decoded = backend.decode(tokenizer.convert_ids_to_tokens(ids[1:].tolist())) if backend else pieces
    assert decoded == said.replace("▁", " ")
    answers = "".join(f"{a}<|im_end|>" for _, a in rounds).replace("▁", " ")
    supervised = batch.labels[batch.labels >= 0].tolist()
    assert (backend.decode(tokenizer.convert_ids_to_tokens(supervised)) if backend else "") == answers
