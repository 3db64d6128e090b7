"""Opens an exported GGUF folder as its users do, with llama.cpp alone, and says what it answers.

python opened_llama_cpp.py FOLDER QUESTIONS.json OUT.json

Runs as a program of its own: nothing of llava_tune is imported here. llama.cpp is that of the xllamacpp package.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import xllamacpp


def main() -> None:
    folder, questions, out = sys.argv[1:]
    asked = json.loads(Path(questions).read_text())
    params: Any = xllamacpp.CommonParams()
    params.model.path = str(next(Path(folder).glob("model-*.gguf")))
    if vision := next(Path(folder).glob("mmproj-*.gguf"), None):
        params.mmproj.path = str(vision)
    params.mmproj_use_gpu = False
    params.n_gpu_layers = 0
    params.n_parallel = 1
    params.n_ctx = asked["context"]
    params.n_batch = params.n_ubatch = asked["context"]
    params.fit_params = False
    params.warmup = False
    # As exact as it goes: what a cache in f16 and flash attention round away isn't the file's fault.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    found = []
    for messages in asked["questions"]:
        answer: Any = server.handle_chat_completions(
            {
                "messages": messages,
                "max_tokens": asked["max_new_tokens"],
                "temperature": 0,
                "logprobs": True,
                "top_logprobs": 1,
                "cache_prompt": False,
            }
        )
        if "choices" not in answer:
            raise SystemExit(f"llama.cpp refuses the question: {answer}")
        choice = answer["choices"][0]
        text = choice["message"]["content"]
        tokens = whole(text, (choice.get("logprobs") or {}).get("content") or [])
        found.append(
            {
                "text": text,
                "ids": [token["id"] for token in tokens],
                "logprobs": [token["logprob"] for token in tokens],
                "prompt_tokens": answer["usage"]["prompt_tokens"],
            }
        )
    build = getattr(xllamacpp, "BUILD_INFO", None)
    Path(out).write_text(json.dumps({"answers": found, "build": str(build), "version": xllamacpp.__version__}))


def whole(text: str, tokens: list[Any]) -> list[Any]:
    """The tokens up to the first that is missing: the server tells none of those that are a part of a character."""
    said = b""
    for k, token in enumerate(tokens):
        said += bytes(token["bytes"])
        if not text.encode().startswith(said):
            return tokens[:k]
    return tokens


if __name__ == "__main__":
    main()
