"""`plan` says what a run takes, from the store's lengths or as told, and which lever helps."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Finished, Small, losses, wrong_input

SEVEN = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
RECIPE = "llava_internlm2_chat_7b_clip_vit_large_p14_336_e1_gpu8"


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vicuna")
    (folder / "config.json").write_text(json.dumps(SEVEN))
    return folder


def test_the_published_recipe(vicuna: Path, cli: Callable[..., Finished]) -> None:
    """LLaVA-1.5-7B: 6.74 billion parameters, 2,181 steps of 256; 3.5 hours on 8 A100 mean a plausible utilisation."""
    sizes = ("--samples", 558128, "--tokens", 620, "--model.llm.name", vicuna)
    done = cli("plan", f"{RECIPE}_pretrain", "--gpus", 8, "--gpu", "a100-80g", "--mfu", 0.3, "--price", 2, *sizes)
    assert done.code == 0, done.err
    assert "6,738.4 M" in done.out and "2,181" in done.out and "micro batch 32 fits" in done.out
    hours = float(re.search(r"hours at 30% MFU on 8 GPUs\s*│\s*([\d.]+)", done.out)[1])  # type: ignore[index]
    assert 2.5 < hours < 4.5
    assert f"{round(hours * 8 * 2)}" in done.out or "GPU hours" in done.out


def test_what_does_not_fit_names_levers(vicuna: Path, cli: Callable[..., Finished]) -> None:
    sizes = ("--samples", 1000, "--tokens", 850, "--model.llm.name", vicuna)
    done = cli("plan", f"{RECIPE}_finetune", "--gpus", 8, "--gpu", "a100-40g", *sizes)
    assert "micro batch 16 does not fit" in done.out
    assert re.search(r"--deepspeed deepspeed_zero3: [\d.]+ GiB, fits", done.out)
    assert "is not a multiple of" in wrong_input(cli("plan", f"{RECIPE}_finetune", "--gpus", 7, *sizes))


def test_lengths_come_from_the_store(small: Small, cli: Callable[..., Finished], tmp_path: Path) -> None:
    empty = {"LLAVA_TUNE_CACHE": str(tmp_path / "cache")}
    refused = wrong_input(cli("plan", small.config, "--gpus", 1, env=empty))
    assert "no prepared store says how long the samples are" in refused
    assert cli("prepare", small.config, "--save-folder", tmp_path / "store").code == 0
    store = ("--dataset.offline-processed-text-folder", tmp_path / "store")
    done = cli("plan", small.config, "--gpus", 1, *store)
    assert done.code == 0, done.err
    assert re.search(r"on average\s*│\s*40 ", done.out) and str(tmp_path / "store") in done.out
    ran = cli("pretrain", small.config, "--work-dir", tmp_path / "run", *store)
    assert ran.code == 0
    assert re.search(rf"optimizer steps\s*│\s*{len(losses(tmp_path / 'run'))} ", done.out)
