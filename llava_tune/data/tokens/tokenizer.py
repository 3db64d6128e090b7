"""Tokenizers: any fast one of transformers, and InternLM2's from its sentencepiece model without remote code."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from llava_tune.data.tokens.words import cut_table
from llava_tune.errors import InputError
from llava_tune.hub import hub_answers, not_found
from llava_tune.paths import cache_folder, whole_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INTERNLM2_CHAT_TOKENS = {"[UNUSED_TOKEN_145]": "<|im_end|>", "[UNUSED_TOKEN_146]": "<|im_start|>"}
"""What InternLM2's chat models call two unused pieces of the vocabulary."""

_CONVERSION = "2"  # raise it when the conversion below changes: it is part of the cache's key
_VOCABULARY = "2"  # raise it when what is kept of a vocabulary changes


def tokenizer_folder(name: str) -> str:
    """The folder or Hub name that transformers opens for `name`: itself, or the cached conversion of InternLM2's.

    Raises:
        InputError: no such folder, or one that holds no tokenizer.
    """
    folder = Path(name)
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise InputError(
                f"tokenizer {name}: no such folder, and not a Hugging Face name (owner/model). Expected a folder with tokenizer.json"
            )
        return name
    if (folder / "tokenizer.json").is_file():
        return name
    model = folder / "tokenizer.model"
    if model.is_file() and _is_internlm2(model):
        return str(convert_internlm2_tokenizer(model))
    if model.is_file() or (folder / "vocab.json").is_file():
        return name
    raise InputError(f"{name}: the folder holds no tokenizer (looked for tokenizer.json, tokenizer.model, vocab.json)")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A fast tokenizer from a folder or the Hub, never running code that comes with it.

    Raises:
        InputError: there is none, or it is not a fast one.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer

    there = Path(name).is_dir() or hub_answers()
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_folder(name), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = _first_line(error) if there else not_found(name, error)
        raise InputError(f"tokenizer {name!r} can't be loaded: {reason}") from error
    if not tokenizer.is_fast:
        raise InputError(f"tokenizer {name!r} has no fast (tokenizer.json) form, which llava-tune needs")
    return tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


def _proto(model: Path) -> Any:
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(model.read_bytes())
    except Exception as error:
        raise InputError(f"{model}: not a sentencepiece model: {_first_line(error)}") from error
    return proto


def _is_internlm2(model: Path) -> bool:
    return b"[UNUSED_TOKEN_146]" in model.read_bytes()


def convert_internlm2_tokenizer(model: Path) -> Path:
    """Write InternLM2's sentencepiece model as a fast tokenizer into the cache, once. Returns its folder.

    BPE over the ordinary pieces, merges in the order of their ids; user-defined pieces are added tokens; a NUL is its
    byte, as in sentencepiece; the chat model's two unused pieces get their names.
    """
    digest = hashlib.sha256(model.read_bytes() + _CONVERSION.encode()).hexdigest()[:24]
    target = cache_folder() / "tokenizers" / digest
    if target.is_dir():
        return target
    from tokenizers import AddedToken
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    proto = _proto(model)
    names = [INTERNLM2_CHAT_TOKENS.get(p.piece, p.piece) for p in proto.pieces]
    names = ["<|unused_nul|>" if name == "\0" else name for name in names]
    ordinary = {name: i for i, (name, p) in enumerate(zip(names, proto.pieces, strict=True)) if p.type == 1}
    user_defined = [name for name, p in zip(names, proto.pieces, strict=True) if p.type == 4]
    chat = list(INTERNLM2_CHAT_TOKENS.values())
    tokenizer = LlamaTokenizer(
        vocab={name: i for i, name in enumerate(names)},
        merges=generate_merges(ordinary),
        add_prefix_space=False,
        legacy=False,
        additional_special_tokens=[AddedToken(t, normalized=False, special=True) for t in reversed(chat)],
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in user_defined if t not in chat])
    if len(tokenizer) != len(names):
        raise InputError(
            f"{model}: converting it gave {len(tokenizer)} tokens for {len(names)} pieces; please report this"
        )
    with whole_folder(target) as folder:
        tokenizer.save_pretrained(folder)
    return target


@dataclass(frozen=True)
class Vocabulary:
    """What preparing needs of a tokenizer, read from its files without transformers (which imports torch).

    Attributes:
        plain_json: the tokenizer.json without its special tokens and post-processor: it encodes every string as ordinary text.
        added: the added tokens' ids.
        special_ids: ids of the special ones, without the one for unknown text.
        bos, eos: ids, or None.
        longest: characters of the longest token.
        cut_after: bytes behind which a text may be cut before a space (`words.cut_table`); None: texts can't be cut.
        fingerprint: sha256 of all that decides the ids.
    """

    plain_json: str
    added: dict[str, int]
    special_ids: tuple[int, ...]
    bos: int | None
    eos: int | None
    longest: int
    cut_after: tuple[int, ...] | None
    fingerprint: str

    @staticmethod
    def of(backend: dict[str, Any], bos: str | None, eos: str | None) -> Vocabulary:
        """From a parsed tokenizer.json and the names of two tokens."""
        added = {t["content"]: t["id"] for t in backend["added_tokens"]}
        unknown = backend["model"].get("unk_token")
        special = [t["id"] for t in backend["added_tokens"] if t["special"] and t["content"] != unknown]
        content = {**backend, "truncation": None, "padding": None}
        ends = added.get(bos or ""), added.get(eos or "")
        text = msgspec.json.encode([content, *ends], order="sorted")
        plain = _plain(backend)
        table = cut_table(plain)
        return Vocabulary(
            plain_json=msgspec.json.encode(plain, order="sorted").decode(),
            added=added,
            special_ids=tuple(special),
            bos=ends[0],
            eos=ends[1],
            longest=max(map(len, [*plain["model"]["vocab"], *added]), default=1),
            cut_after=None if table is None else tuple(np.flatnonzero(table).tolist()),
            fingerprint=hashlib.sha256(text).hexdigest(),
        )


def _plain(backend: dict[str, Any]) -> dict[str, Any]:
    plain = {**backend, "post_processor": None, "truncation": None, "padding": None}
    plain["added_tokens"] = [t for t in backend["added_tokens"] if not t["special"]]
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
    if plain["pre_tokenizer"] == metaspace and plain["normalizer"] is None:
        # The same mapping as a normalizer, which fastokens reads too.
        plain["pre_tokenizer"] = None
        plain["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    merges = plain["model"].get("merges")
    if merges and not isinstance(merges[0], str) and not any(" " in left or " " in right for left, right in merges):
        plain["model"] = {**plain["model"], "merges": [f"{left} {right}" for left, right in merges]}  # faster to load
    return plain


def load_vocabulary(name: str) -> Vocabulary:
    """The vocabulary of a tokenizer folder or Hub name; kept in the cache once it is made.

    Raises:
        InputError: there is none.
    """
    folder = tokenizer_folder(name)
    files = _local_files(folder)
    if files is None:
        tokenizer = load_tokenizer(folder)
        backend = msgspec.json.decode(tokenizer.backend_tokenizer.to_str())
        return Vocabulary.of(backend, tokenizer.bos_token, tokenizer.eos_token)
    contents = [path.read_bytes() for path in files]
    key = hashlib.sha256(b"\0".join([*contents, _VOCABULARY.encode()])).hexdigest()[:24]
    kept = cache_folder() / "vocabularies" / key
    if kept.is_dir():
        facts = msgspec.json.decode((kept / "facts.json").read_bytes())
        facts = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()}
        return Vocabulary(plain_json=(kept / "plain.json").read_text(encoding="utf-8"), **facts)
    try:
        backend, config = map(msgspec.json.decode, contents)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InputError(f"tokenizer {name!r}: not valid JSON: {_first_line(error)}") from error

    def special(key: str) -> str | None:
        token = config.get(key)
        return token.get("content") if isinstance(token, dict) else token

    vocabulary = Vocabulary.of(backend, special("bos_token"), special("eos_token"))
    with whole_folder(kept) as beside:
        (beside / "plain.json").write_text(vocabulary.plain_json, encoding="utf-8")
        facts = {k: v for k, v in asdict(vocabulary).items() if k != "plain_json"}
        (beside / "facts.json").write_bytes(msgspec.json.encode(facts))
    return vocabulary


def _local_files(name: str) -> tuple[Path, Path] | None:
    """tokenizer.json and tokenizer_config.json of a folder, or of a Hub name (downloaded); None if one is missing."""
    names = ("tokenizer.json", "tokenizer_config.json")
    if Path(name).is_dir():
        first, second = (Path(name) / n for n in names)
        return (first, second) if first.is_file() and second.is_file() else None
    from huggingface_hub import hf_hub_download

    hub_answers()
    try:
        first, second = (Path(hf_hub_download(name, n)) for n in names)
    except Exception:
        return None  # transformers then says what is wrong
    return first, second
