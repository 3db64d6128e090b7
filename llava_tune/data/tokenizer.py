"""Tokenizers: any fast one of transformers, and InternLM2's from its sentencepiece model without remote code."""

from __future__ import annotations

import hashlib
import json
import os
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
        raise InputError(f"{model}: converting it gave {len(tokenizer)} tokens for {len(names)} pieces; please report this")
    with whole_folder(target) as folder:
        tokenizer.save_pretrained(folder)
    return target


def plain_json(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer as JSON without its special tokens and post-processor: it encodes every string as ordinary text."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["added_tokens"] = [t for t in backend["added_tokens"] if not t["special"]]
    backend["post_processor"] = backend["truncation"] = backend["padding"] = None
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
    if backend["pre_tokenizer"] == metaspace and backend["normalizer"] is None:
        # The same mapping as a normalizer, which fastokens reads too.
        backend["pre_tokenizer"] = None
        backend["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return json.dumps(backend, ensure_ascii=False, sort_keys=True)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of all that decides the ids: the tokenizer's JSON and its special tokens."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["truncation"] = backend["padding"] = None
    text = json.dumps([backend, tokenizer.bos_token_id, tokenizer.eos_token_id], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
