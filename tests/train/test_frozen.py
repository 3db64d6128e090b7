"""Runs in which most is frozen: the projector alone, and adapters on a 4-bit language model."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from llava_tune.config import load_run
from llava_tune.model import load_checkpoint
from llava_tune.model.vision import build_vision
from tests.conftest import Finished, Small, losses


@pytest.fixture(scope="module")
def pretrained(small: Small, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Flags for a language model and a tower that have weights in files, both frozen."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("pretrained")
    shutil.copytree(small.folder / "llm", folder / "llm")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "llm")).save_pretrained(folder / "llm")
    import open_clip.model

    config = load_run(small.config).model.vision
    tower = build_vision(config)  # cut after the feature layer, so the file is made from a whole one
    import json

    raw = json.loads(Path(config.name).read_text())
    whole = open_clip.model._build_vision_tower(
        raw["embed_dim"], open_clip.model.CLIPVisionCfg(**raw["vision_cfg"]), False
    )
    torch.save({f"visual.{k}": v for k, v in whole.state_dict().items()}, folder / "tower.pt")
    assert set(tower.visual.state_dict()) < set(whole.state_dict())
    return (
        "--model.llm.name", str(folder / "llm"), "--model.llm.weights", "pretrained", "--model.llm.freeze",
        "--model.vision.freeze", "--model.vision.pretrained", str(folder / "tower.pt"),
    )  # fmt: skip


def weight_names(checkpoint: Path) -> list[str]:
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        return list(file.keys())


def test_a_projectors_checkpoint_holds_the_projector_alone(
    small: Small, pretrained: tuple[str, ...], cli: Callable[..., Finished], tmp_path: Path
) -> None:
    run = ("pretrain", small.config, *pretrained, "--training.max-steps", "4")
    done = cli(*run, "--work-dir", tmp_path / "a")
    assert done.code == 0, done.err
    names = weight_names(tmp_path / "a/checkpoint-4")
    assert {n.split(".")[0] for n in names} == {"projector"}
    assert (tmp_path / "a/checkpoint-4/model.safetensors").stat().st_size < 200_000
    data = ("--data", small.folder / "data/test.json", "--image-folder", small.images, "--limit", "2")
    assert cli("evaluate", tmp_path / "a/checkpoint-4", *data).code == 0


@pytest.mark.slow
def test_a_projectors_checkpoint_under_zero_3_is_whole_and_resumes(
    small: Small,
    pretrained: tuple[str, ...],
    cli: Callable[..., Finished],
    two_ranks: Callable[..., Finished],
    tmp_path: Path,
) -> None:
    run = ("pretrain", small.config, *pretrained, "--training.max-steps", "4", "--training.save-steps", "2")
    zero3 = ("--deepspeed", "deepspeed_zero3")
    plain, sharded = tmp_path / "plain", tmp_path / "zero3"
    assert cli(*run, "--work-dir", plain).code == 0
    done = two_ranks(*run, "--work-dir", sharded, *zero3)
    assert done.code == 0, done.err
    assert max(abs(a - b) / b for a, b in zip(losses(sharded), losses(plain), strict=True)) < 1e-4
    with (
        safe_open(plain / "checkpoint-4/model.safetensors", "pt") as a,
        safe_open(sharded / "checkpoint-4/model.safetensors", "pt") as b,
    ):
        assert set(a.keys()) == set(b.keys())
        for name in a.keys():  # noqa: SIM118
            assert torch.allclose(a.get_tensor(name), b.get_tensor(name), atol=1e-3), name
    again = tmp_path / "again"
    done = two_ranks(*run, "--work-dir", again, *zero3, "--resume", sharded / "checkpoint-2")
    assert done.code == 0, done.err
    assert losses(again) == losses(sharded)[2:]


@pytest.mark.slow
def test_qlora_trains_saves_and_opens(
    small: Small, pretrained: tuple[str, ...], cli: Callable[..., Finished], tmp_path: Path
) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes: pip install 'llava-tune[qlora]'")
    qlora = ("--model.llm.quantization", "nf4", "--model.llm.lora.rank", "4", "--optimizer.learning-rate", "5e-3")
    done = cli(
        "finetune", small.config, *pretrained, *qlora, "--training.max-steps", "12", "--work-dir", tmp_path / "q"
    )
    assert done.code == 0, done.err
    found = losses(tmp_path / "q")
    assert found[-1] < found[0] - 0.1
    names = weight_names(tmp_path / "q/checkpoint-12")
    assert any("lora_A" in n for n in names)
    assert {n.split(".")[0] for n in names} == {"projector", "llm"}
    assert all("lora" in n for n in names if n.startswith("llm"))
    llava, run = load_checkpoint(tmp_path / "q/checkpoint-12")
    assert run.model.llm.quantization == "nf4"
    assert type(llava.llm.model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
