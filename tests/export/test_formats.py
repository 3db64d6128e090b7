"""GGUF in llama.cpp, LLaVA's own layout in LLaVA's own code, an adapter in peft: each computes what we compute, or is not there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llava_tune.evaluate.answer import Answerer
from llava_tune.export.gate import conversations, write_pictures
from llava_tune.export.weights import merge_adapters
from tests.conftest import Finished, Small, wrong_input
from tests.export.conftest import trained

pytestmark = pytest.mark.timeout(400)


def gate_of(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / "gate.json").read_text())
    return facts


@pytest.mark.parametrize(("dtype", "limit"), [("fp32", 0.001), ("q8_0", 0.5)])
def test_internlm2_in_llama_cpp(
    internlm2_dora: Path, cli: Callable[..., Finished], tmp_path: Path, dtype: str, limit: float
) -> None:
    """A sentencepiece vocabulary, merged DoRA, a linear projector through llama.cpp's GELU, a tower with a class token."""
    pytest.importorskip("xllamacpp")
    done = cli("export", internlm2_dora, tmp_path / "gguf", "--format", "gguf", "--dtype", dtype)
    assert done.code == 0, done.err
    gate = gate_of(tmp_path / "gguf")
    assert gate["prompts_equal"] and gate["logprobs"] < limit and gate["greedy"][1] > 50
    if dtype == "fp32":
        assert gate["greedy"][0] >= gate["greedy"][1] - 2  # a model of random numbers has near ties
    # Which build has the class token where is said (llama.cpp issue 25814), in the file and to the user.
    assert gate["class_token"] in ("first", "last") and gate["build"].startswith("xllamacpp 20")
    assert (gate["class_token"] == "last") == ("issue 25814" in done.out)


def test_qwen2_and_text_alone_in_llama_cpp(small: Small, cli: Callable[..., Finished], tmp_path: Path) -> None:
    """Biases in attention, tied embeddings, byte-level BPE, no image."""
    pytest.importorskip("xllamacpp")
    from transformers import AutoTokenizer, Qwen2Config

    tokenizer = AutoTokenizer.from_pretrained(small.folder / "llm")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    Qwen2Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.1,
        **shape,
    ).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    said = [{"from": "human", "value": "What color is it?"}, {"from": "gpt", "value": "It is 猫, 12.5 of them."}]
    text = tmp_path / "text.json"
    text.write_text(json.dumps([{"id": str(k), "conversations": said} for k in range(16)]))
    changes = (
        f"v, l = None, LanguageModel(name={str(tmp_path / 'lm')!r}, weights='random')\n"
        f"d = replace(d, data_path={str(text)!r}, image_folder=None)"
    )
    checkpoint = trained(small, cli, tmp_path, changes)
    done = cli("export", checkpoint, tmp_path / "gguf", "--format", "gguf", "--dtype", "fp32")
    assert done.code == 0, done.err
    gate = gate_of(tmp_path / "gguf")
    assert gate["class_token"] is None and gate["logprobs"] < 0.001
    assert [p.name for p in (tmp_path / "gguf").glob("*.gguf")] == ["model-f32.gguf"]


def test_the_gate_of_llama_cpp_fails_when_anything_is_wrong(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp")
    from llava_tune.export import gate_llama_cpp, gguf

    answerer = Answerer(clip, dtype=torch.float32)
    pictures = [gate_llama_cpp.write_square(p, 64, tmp_path) for p in write_pictures(tmp_path)[:1]]
    asked = conversations(pictures)

    def failures(name: str) -> str:
        folder = tmp_path / name
        folder.mkdir()
        gguf.write_gguf(answerer, folder, "fp32")
        found = gate_llama_cpp.ask_llama_cpp(folder, asked, tmp_path, gate_llama_cpp.context(answerer, asked))
        return "; ".join(gate_llama_cpp.compare(answerer, asked, found).failures("fp32"))

    assert failures("right") == ""
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "interleaved", lambda weight, heads: weight)
        assert "log-probabilities differ" in failures("rotary")
    with monkeypatch.context() as patch:
        mean = dataclasses.replace(answerer.transform, mean=(0.9, 0.5, 0.5))
        write = gguf.write_vision
        patch.setattr(gguf, "write_vision", lambda llava, _, path, dtype: write(llava, mean, path, dtype))
        assert "log-probabilities differ" in failures("mean")
    with monkeypatch.context() as patch:
        add = gguf.gguf.GGUFWriter.add_token_list
        patch.setattr(gguf.gguf.GGUFWriter, "add_token_list", lambda w, t: add(w, [*t[:9], *t[10:], t[9]]))
        assert failures("shifted") != ""


def test_llavas_own_code_opens_its_layout(internlm2_dora: Path, cli: Callable[..., Finished], tmp_path: Path) -> None:
    pytest.importorskip("llava")
    done = cli("export", internlm2_dora, tmp_path / "llava", "--format", "llava", "--dtype", "fp32")
    assert done.code == 0, done.err
    gate = gate_of(tmp_path / "llava")
    assert gate["ids_equal"] and gate["pixels"] == 0 and gate["logits"] < 1e-3 and "LLaVA's own code" in done.out
    config = json.loads((tmp_path / "llava/config.json").read_text())
    assert Path(config["mm_vision_tower"]) == (tmp_path / "llava/vision_tower").resolve()


def test_an_adapter_is_kept_apart_for_peft(internlm2_dora: Path, cli: Callable[..., Finished], tmp_path: Path) -> None:
    done = cli("export", internlm2_dora, tmp_path / "parts", "--format", "adapter")
    assert done.code == 0, done.err
    gate = gate_of(tmp_path / "parts")
    assert gate["ids_equal"] and gate["logits"] < 1e-3 and gate["greedy"][0] == gate["greedy"][1]
    # The base is the model without what the adapter adds: merged, it would be another.
    from safetensors.torch import load_file

    base = load_file(tmp_path / "parts/base/model.safetensors")
    answerer = Answerer(internlm2_dora, dtype=torch.float32)
    merge_adapters(answerer.llava)
    name = "model.layers.0.self_attn.q_proj.weight"
    merged = answerer.llava.llm.state_dict()[name]
    assert (base[f"language_model.{name}"].float() - merged).abs().max() > 1e-3


def test_what_a_format_can_not_hold_is_refused(
    clip: Path, small: Small, cli: Callable[..., Finished], tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    assert "can't be written in bf16" in wrong_input(
        cli("export", clip, tmp_path / "x", "--format", "gguf", "--dtype", "bf16")
    )
    assert "has no adapter" in wrong_input(cli("export", clip, tmp_path / "x", "--format", "adapter"))
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".x*"))
