"""Tokenizers: any fast one of transformers, and InternLM2's from its sentencepiece model without remote code."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_tune.errors import InputError
from llava_tune.paths import cache_folder, whole_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INTERNLM2_CHAT_TOKENS = {"[UNUSED_TOKEN_145]": "<|im_end|>", "[UNUSED_TOKEN_146]": "<|im_start|>"}
"""What InternLM2's chat models call two unused pieces of the vocabulary."""

_CONVERSION = "2"  # raise it when the conversion below changes: it is part of the cache's key


def tokenizer_folder(name: str) -> str:
    """The folder or Hub name that transformers opens for `name`: itself, or the cached conversion of InternLM2's.

    Raises:
        InputError: a folder that holds no tokenizer.
    """
    folder = Path(name)
    if not folder.is_dir():
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

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_folder(name), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"tokenizer {name!r} can't be loaded: {_first_line(error)}") from error
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
        backend: the tokenizer.json, parsed.
        bos, eos: ids, or None.
    """

    backend: dict[str, Any]
    bos: int | None
    eos: int | None

    @property
    def special_ids(self) -> set[int]:
        """Ids of the special added tokens, without the one for unknown text."""
        unknown = self.backend["model"].get("unk_token")
        return {t["id"] for t in self.backend["added_tokens"] if t["special"] and t["content"] != unknown}

    def id_of(self, token: str) -> int | None:
        """The id of an added token, or None."""
        return next((t["id"] for t in self.backend["added_tokens"] if t["content"] == token), None)

    def plain_json(self) -> str:
        """The tokenizer without its special tokens and post-processor: it encodes every string as ordinary text."""
        plain = {**self.backend, "post_processor": None, "truncation": None, "padding": None}
        plain["added_tokens"] = [t for t in self.backend["added_tokens"] if not t["special"]]
        metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
        if plain["pre_tokenizer"] == metaspace and plain["normalizer"] is None:
            # The same mapping as a normalizer, which fastokens reads too.
            plain["pre_tokenizer"] = None
            plain["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        return json.dumps(plain, ensure_ascii=False, sort_keys=True)

    def fingerprint(self) -> str:
        """sha256 of all that decides the ids."""
        content = {**self.backend, "truncation": None, "padding": None}
        text = json.dumps([content, self.bos, self.eos], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def load_vocabulary(name: str) -> Vocabulary:
    """The vocabulary of a tokenizer folder or Hub name.

    Raises:
        InputError: there is none.
    """
    folder = tokenizer_folder(name)
    files = _local_files(folder)
    if files is None:
        tokenizer = load_tokenizer(folder)
        return Vocabulary(
            json.loads(tokenizer.backend_tokenizer.to_str()), tokenizer.bos_token_id, tokenizer.eos_token_id
        )
    try:
        backend, config = (json.loads(path.read_text()) for path in files)
    except ValueError as error:
        raise InputError(f"tokenizer {name!r}: not valid JSON: {_first_line(error)}") from error
    vocabulary = Vocabulary(backend, None, None)

    def special(key: str) -> int | None:
        token = config.get(key)
        content = token.get("content") if isinstance(token, dict) else token
        return vocabulary.id_of(content) if content else None

    return Vocabulary(backend, special("bos_token"), special("eos_token"))


def _local_files(name: str) -> tuple[Path, Path] | None:
    """tokenizer.json and tokenizer_config.json of a folder, or of a Hub name (downloaded); None if one is missing."""
    names = ("tokenizer.json", "tokenizer_config.json")
    if Path(name).is_dir():
        first, second = (Path(name) / n for n in names)
        return (first, second) if first.is_file() and second.is_file() else None
    from huggingface_hub import hf_hub_download

    try:
        first, second = (Path(hf_hub_download(name, n)) for n in names)
    except Exception:
        return None  # transformers then says what is wrong
    return first, second
