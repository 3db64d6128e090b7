"""Full-size CLIP-ViT-L/14-336, InternLM2's real tokenizer and vocabulary, COCO captions, on two processes under ZeRO."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import Finished, losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CONFIG = """from llava_tune.config import *
run = Run(
    model=Model(
        llm=LanguageModel(name={llm!r}, tokenizer={tokenizer!r}),
        vision=VisionTower(name="ViT-L-14-336-quickgelu"),
    ),
    dataset=Dataset(data_path={data!r}, image_folder={images!r}, max_length=1024, num_workers=0),
    optimizer=Optimizer(learning_rate=1e-3),
    training=Training(global_batch_size=2, micro_batch_size=1, max_steps={steps}, save_steps=100, group_by_length=False),
)
"""


def write_internlm2(folder: Path) -> None:
    """A small random InternLM2 in its own layout with the real vocabulary."""
    hidden, inner, heads, kv, layers, vocabulary = 64, 160, 4, 2, 2, 92544
    torch.manual_seed(0)
    scale = 1 / math.sqrt(hidden)
    weights = {
        "model.tok_embeddings.weight": torch.randn(vocabulary, hidden) * 0.02,
        "model.norm.weight": torch.ones(hidden),
    }
    weights["output.weight"] = torch.randn(vocabulary, hidden) * 0.02
    for i in range(layers):
        p = f"model.layers.{i}"
        weights |= {
            f"{p}.attention.wqkv.weight": torch.randn((heads + 2 * kv) * hidden // heads, hidden) * scale,
            f"{p}.attention.wo.weight": torch.randn(hidden, hidden) * scale,
            f"{p}.feed_forward.w1.weight": torch.randn(inner, hidden) * scale,
            f"{p}.feed_forward.w3.weight": torch.randn(inner, hidden) * scale,
            f"{p}.feed_forward.w2.weight": torch.randn(hidden, inner) * scale,
            f"{p}.attention_norm.weight": torch.ones(hidden),
            f"{p}.ffn_norm.weight": torch.ones(hidden),
        }
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    config = {
        "model_type": "internlm2", "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv, "hidden_act": "silu",
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 1000000, "bias": False, "torch_dtype": "float32",
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def test_zero_2_and_3_on_two_processes_have_the_losses_of_one(
    shared: Path, cli: Callable[..., Finished], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_internlm2(tmp_path / "internlm2")
    data = shared / "coco_captions"
    config = tmp_path / "coco.py"
    names = {"llm": tmp_path / "internlm2", "tokenizer": shared / "internlm2_tokenizer"}
    steps = int(os.environ.get("LLAVA_TUNE_COCO_STEPS", "0"))
    if not steps:
        pytest.skip("7 s an image and core: run by hand with LLAVA_TUNE_COCO_STEPS=4")
    names |= {"data": data / "coco_captions.json", "images": data / "images", "steps": steps}
    config.write_text(CONFIG.format(**{k: str(v) for k, v in names.items()}))
    one = cli("pretrain", config, "--work-dir", tmp_path / "one", env={"OMP_NUM_THREADS": "2"}, timeout=600)
    assert one.code == 0, one.err
    expected = losses(tmp_path / "one")
    assert len(expected) == steps
    for preset in ("deepspeed_zero2", "deepspeed_zero3"):
        work_dir = tmp_path / preset
        run = ("pretrain", config, "--work-dir", work_dir, "--deepspeed", preset)
        done = cli(*run, env={"NPROC_PER_NODE": "2"}, timeout=600)
        assert done.code == 0, done.err
        found = losses(work_dir)
        worst = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
        with capsys.disabled():
            print(f"\n{preset} on 2 processes: {found}\none process: {expected}\nworst relative difference {worst:.1e}")
        assert worst < 1e-3
