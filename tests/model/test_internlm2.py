"""InternLM2 in its own layout against a reference written from the architecture (arXiv:2403.17297)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llava_tune.config import LanguageModel
from llava_tune.model import internlm2
from llava_tune.model.language import build_language_model

CONFIG = {
    "model_type": "internlm2",
    "architectures": ["InternLM2ForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def random_checkpoint() -> dict[str, Tensor]:
    torch.manual_seed(0)
    c = CONFIG
    hidden, inner, dim = c["hidden_size"], c["intermediate_size"], c["hidden_size"] // c["num_attention_heads"]
    groups = c["num_attention_heads"] // c["num_key_value_heads"]
    weights = {
        "model.tok_embeddings.weight": torch.randn(c["vocab_size"], hidden),
        "model.norm.weight": 1 + 0.1 * torch.randn(hidden),
        "output.weight": torch.randn(c["vocab_size"], hidden) / math.sqrt(hidden),
    }
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}"
        weights |= {
            f"{p}.attention.wqkv.weight": torch.randn(c["num_key_value_heads"] * (groups + 2) * dim, hidden) / 4,
            f"{p}.attention.wo.weight": torch.randn(hidden, hidden) / 7,
            f"{p}.feed_forward.w1.weight": torch.randn(inner, hidden) / 7,
            f"{p}.feed_forward.w3.weight": torch.randn(inner, hidden) / 7,
            f"{p}.feed_forward.w2.weight": torch.randn(hidden, inner) / 10,
            f"{p}.attention_norm.weight": 1 + 0.1 * torch.randn(hidden),
            f"{p}.ffn_norm.weight": 1 + 0.1 * torch.randn(hidden),
        }
    return weights


def reference_logits(w: dict[str, Tensor], ids: list[int]) -> Tensor:
    """One sequence through InternLM2, position by position and head by head; no code of transformers or ours."""
    c = CONFIG
    heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
    dim, groups = c["hidden_size"] // heads, heads // kv
    n = len(ids)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + c["rms_norm_eps"])

    frequencies = c["rope_theta"] ** (-torch.arange(0, dim, 2).double() / dim)

    def rotate(x: Tensor, position: int) -> Tensor:
        angle = position * frequencies
        first, second = x[: dim // 2].double(), x[dim // 2 :].double()
        turned = [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()]
        return torch.cat(turned).float()

    x = w["model.tok_embeddings.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}"
        h = norm(x, w[f"{p}.attention_norm.weight"])
        qkv = (h @ w[f"{p}.attention.wqkv.weight"].T).view(n, kv, groups + 2, dim)
        out = torch.zeros(n, heads, dim)
        for g in range(kv):
            keys = torch.stack([rotate(qkv[t, g, groups], t) for t in range(n)])
            values = qkv[:, g, groups + 1]
            for j in range(groups):
                for t in range(n):
                    q = rotate(qkv[t, g, j], t)
                    score = torch.softmax(keys[: t + 1] @ q / math.sqrt(dim), 0)
                    out[t, g * groups + j] = score @ values[: t + 1]
        x = x + out.reshape(n, -1) @ w[f"{p}.attention.wo.weight"].T
        h = norm(x, w[f"{p}.ffn_norm.weight"])
        gate, up = h @ w[f"{p}.feed_forward.w1.weight"].T, h @ w[f"{p}.feed_forward.w3.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ w[f"{p}.feed_forward.w2.weight"].T
    return norm(x, w["model.norm.weight"]) @ w["output.weight"].T


@pytest.fixture(params=["safetensors", "bin", "sharded bin"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    from safetensors.torch import save_file

    weights = random_checkpoint()
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    if request.param == "safetensors":
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    elif request.param == "bin":
        torch.save(weights, tmp_path / "pytorch_model.bin")
    else:
        names = list(weights)
        for k, part in enumerate((names[::2], names[1::2]), start=1):
            torch.save({n: weights[n] for n in part}, tmp_path / f"pytorch_model-0000{k}-of-00002.bin")
    return tmp_path


def test_logits_equal_the_reference(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build_language_model(LanguageModel(name=str(checkpoint)), torch.float32)
    ids = [1, 5, 17, 96, 33, 33, 2, 64, 8, 41, 3]
    with torch.no_grad():
        ours = model(torch.tensor([ids]), use_cache=False).logits[0]
    difference = (ours - reference_logits(random_checkpoint(), ids)).abs().max().item()
    with capsys.disabled():
        print(f"\nInternLM2 logits, max abs difference from the reference: {difference:.1e}")
    assert difference < 1e-4


def test_a_weight_out_of_place_is_seen(checkpoint: Path) -> None:
    weights = random_checkpoint()
    name = "model.layers.1.attention.wqkv.weight"
    dim = CONFIG["hidden_size"] // CONFIG["num_attention_heads"]
    weights[name] = torch.cat([weights[name][dim:], weights[name][:dim]])
    model = build_language_model(LanguageModel(name=str(checkpoint)), torch.float32)
    with torch.no_grad():
        ours = model(torch.tensor([[1, 5, 17, 96]]), use_cache=False).logits[0]
    assert (ours - reference_logits(weights, [1, 5, 17, 96])).abs().max() > 0.1


def test_conversion_is_made_once_and_runs_no_remote_code(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkpoint / "modeling_internlm2.py").write_text("raise SystemExit('remote code ran')")
    folder = internlm2.convert(checkpoint)
    monkeypatch.setattr(internlm2, "convert_weights", lambda *_: pytest.fail("converted twice"))
    assert internlm2.convert(checkpoint) == folder
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
