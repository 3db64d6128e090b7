"""Small trained checkpoints that the exports are made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Finished, Small
from tests.train.test_coco import write_internlm2

TOWER = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {},
}


def trained(small: Small, cli: Callable[..., Finished], folder: Path, changes: str, *more: object) -> Path:
    """A checkpoint of the small model with `changes` to its config, after a few steps."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "c.py"
    config.write_text(
        "from dataclasses import replace\nfrom llava_tune.config import *\n"
        f"run = load_run({str(small.config)!r})\nm, v, l, d = run.model, run.model.vision, run.model.llm, run.dataset\n"
        f"tower = {str(folder / 'tower.json')!r}\n{changes}\n"
        "run = replace(run, model=replace(m, vision=v, llm=l), dataset=d)\n"
    )
    done = cli("finetune", config, "--work-dir", folder / "run", "--optimizer.learning-rate", "3e-3", *more)
    assert done.code == 0, done.err
    return folder / "run/checkpoint-6"


def tower(folder: Path, **more: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tower.json").write_text(json.dumps({**TOWER, **more}))


@pytest.fixture(scope="session")
def clip(small: Small, cli: Callable[..., Finished], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    tower(folder, quick_gelu=True)
    return trained(small, cli, folder, "v = replace(v, name=tower)")


@pytest.fixture(scope="session")
def exported(clip: Path, cli: Callable[..., Finished]) -> Path:
    folder = clip.parent / "hf"
    done = cli("export", clip, folder, "--dtype", "fp32")
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="session")
def internlm2_dora(
    small: Small, internlm2_tokenizer: Path, cli: Callable[..., Finished], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """InternLM2 with 92,544 ids and a DoRA adapter, a linear projector, a tower with GELU."""
    folder = tmp_path_factory.mktemp("internlm2")
    write_internlm2(folder / "lm")
    tower(folder, quick_gelu=False)
    changes = (
        "v = replace(v, name=tower)\nm = replace(m, projector=Projector(kind='linear'))\n"
        f"l = LanguageModel(name={str(folder / 'lm')!r}, tokenizer={str(internlm2_tokenizer)!r}, freeze=True, "
        "lora=Lora(rank=4, alpha=16, dropout=0.0, variant='dora'))"
    )
    return trained(small, cli, folder, changes)
