"""Files are cut at records exactly as a JSON parser sees them, whatever the block and part sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_tune.data.sources import base, open_source
from llava_tune.data.sources import text as text_source
from llava_tune.errors import InputError

values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(alphabet='ab"\\[]{},: \n\u00e9\u4e2d', max_size=12)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
records = st.lists(st.dictionaries(st.text(alphabet='a"\\{}', max_size=5), values, max_size=4), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(
    rows=records,
    block=st.integers(1, 50),
    part=st.integers(1, 80),
    indent=st.sampled_from([None, 1]),
    ascii_=st.booleans(),
)
def test_json_array_is_cut_into_its_records(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[object],
    block: int,
    part: int,
    indent: int | None,
    ascii_: bool,
) -> None:
    path = tmp_path_factory.mktemp("s") / "x.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_source, "_BLOCK", block)
        patch.setattr(base, "PART_BYTES", part)
        source = open_source(path)
        found = []
        end = None
        for span in source.spans():
            assert end is None or span.start == end
            end = span.end
            found += [row for _, row in source.read(span).rows()]
    assert found == rows


@settings(max_examples=100, deadline=None)
@given(rows=records, block=st.integers(1, 50), part=st.integers(1, 80))
def test_jsonl_is_cut_at_lines(
    tmp_path_factory: pytest.TempPathFactory, rows: list[object], block: int, part: int
) -> None:
    path = tmp_path_factory.mktemp("s") / "x.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_source, "_BLOCK", block)
        patch.setattr(base, "PART_BYTES", part)
        source = open_source(path)
        found = [row for span in source.spans() for _, row in source.read(span).rows()]
    assert found == rows


def test_an_array_cut_in_half_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    text = json.dumps([{"id": i, "conversations": []} for i in range(10)])
    path.write_text(text[: len(text) // 2])
    with pytest.raises(InputError, match=r"not closed: the file ends inside record 6, after 5 whole ones"):
        list(open_source(path).spans())
    path.write_text(text + "{}")
    with pytest.raises(InputError, match="goes on with"):
        list(open_source(path).spans())
    path.write_text("")
    with pytest.raises(InputError, match="empty"):
        open_source(path)
    path.write_text("hello")
    with pytest.raises(InputError, match="expected a JSON array"):
        open_source(path)
