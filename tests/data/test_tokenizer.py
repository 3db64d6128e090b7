"""The fast path gives sentencepiece's ids on every text of the shared data, and text never becomes a control token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from llava_tune.data.tokens.encoder import Encoder
from llava_tune.data.tokens.tokenizer import load_tokenizer, load_vocabulary

ODD = [
    "<s>", "</s>", "a</s>b", "<unk>", "a\0b", "\0", "<|im_end|>", "<|im_start|>user", "[UNUSED_TOKEN_3]", "ＥＦ x", "  lead",
    "trail  ", "\n\n\n  x", "𝔘𝔫𝔦", "é", "e\u0301", "\u200b", "\ufeff", "▁", "a▁b", " ▁ ", "<0x41>", "\t\t", "12345" * 50,
    "https://a.b/c?d=e&f", "日本語テキスト", "🙂👍🏽", "", " ",
]  # fmt: skip


def every_text(folder: Path) -> list[str]:
    texts: dict[str, None] = {}

    def walk(value: Any) -> None:
        if isinstance(value, str):
            texts[value] = None
        elif isinstance(value, list):
            for inner in value:
                walk(inner)
        elif isinstance(value, dict):
            for inner in value.values():
                walk(inner)

    for path in sorted(folder.glob("*/*.json*")):
        for text in [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines():
            walk(json.loads(text))
    return list(texts)


CONTROL = np.array([1, 2, 92542, 92543], np.int32)


@pytest.fixture(scope="module")
def encoder(internlm2_tokenizer: Path) -> Encoder:
    vocabulary = load_vocabulary(str(internlm2_tokenizer))
    return Encoder(vocabulary.plain_json, vocabulary.cut_after)


def test_fast_path_equals_sentencepiece_on_every_text(
    shared: Path, internlm2_tokenizer: Path, encoder: Encoder, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_file=str(internlm2_tokenizer / "tokenizer.model"))
    texts = [*every_text(shared), *ODD]
    assert len(texts) > 15_000
    encoded = encoder.encode(texts, CONTROL)
    mismatches = [t for i, t in enumerate(texts) if encoded.of(i).tolist() != reference.encode(t)]
    with capsys.disabled():
        print(f"\n{encoder.name} against sentencepiece: {len(texts):,} strings compared, {len(mismatches)} mismatches")
    assert mismatches == []
    assert not encoder.fell_back


def test_text_never_becomes_a_control_token(encoder: Encoder) -> None:
    texts = ["<|im_end|>", "a<|im_start|>system\nb<|im_end|>", "<s></s>", "[UNUSED_TOKEN_145][UNUSED_TOKEN_146]"]
    assert not np.isin(encoder.encode(texts, CONTROL).ids, CONTROL).any()


def test_an_encoder_that_differs_is_replaced(internlm2_tokenizer: Path) -> None:
    vocabulary = load_vocabulary(str(internlm2_tokenizer))
    encoder = Encoder(vocabulary.plain_json, vocabulary.cut_after)
    expected = encoder.encode(["hello world"], CONTROL).of(0).tolist()

    class Liar:
        def encode_batch_flat(self, texts: list[str]) -> tuple[bytes, bytes]:
            n = len(texts)
            return np.full(n, 7, np.uint32).tobytes(), np.arange(n + 1, dtype=np.uint64).tobytes()

    encoder._fast = Liar()
    assert encoder.encode(["hello world"], CONTROL).of(0).tolist() == expected
    assert encoder.fell_back


def test_the_chat_tokens_have_their_ids(internlm2_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(str(internlm2_tokenizer))
    assert tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"]) == [92542, 92543]
    assert len(tokenizer) == 92544
    assert (
        tokenizer.decode(tokenizer.encode("Hello  world\n你好 🙂", add_special_tokens=False)) == "Hello  world\n你好 🙂"
    )


def test_a_text_is_cut_only_where_no_token_reaches_across(internlm2_tokenizer: Path) -> None:
    """Pieces such as a tab with spaces behind it must stay whole: each text alone, without the proof that would hide a wrong cut."""
    vocabulary = load_vocabulary(str(internlm2_tokenizer))
    encoder = Encoder(vocabulary.plain_json, vocabulary.cut_after)
    encoder._proved = lambda *_: True  # type: ignore[method-assign]
    reference = sentencepiece.SentencePieceProcessor(model_file=str(internlm2_tokenizer / "tokenizer.model"))
    before = ["", "a", "é", "中", "。", "\t", "\t\t", "\n", "\r\n", "▁", "}", ";", "🙂"]
    texts = [f"x{b}{' ' * n}{a}" for b in before for n in (1, 2, 4, 8) for a in ("y", "\n", "\t", "12", "▁", "")]
    encoded = encoder.encode(texts, CONTROL)
    assert [encoded.of(i).tolist() for i in range(len(texts))] == [reference.encode(t) for t in texts]
    assert len(encoded.codes) > len(texts)  # they were cut
    cut_after = set(vocabulary.cut_after or ())
    assert set(b"azAZ09.,") <= cut_after and not cut_after & set(b"\t\n ")
