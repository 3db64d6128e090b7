"""A config is validated as a whole before anything is loaded, and every field is a flag."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_tune.config import Run, deepspeed_config, from_json, list_configs, load_run, to_json
from llava_tune.errors import InputError
from tests.conftest import Finished, Small, wrong_input


def write(path: Path, small: Small, old: str, new: str) -> Path:
    text = small.config.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("learning_rate=1e-3", "learning_rat=1e-3", ["learning_rat ", "'learning_rate'"]),
        ("max_length=128", "max_length='long'", ["max_length", "'long'"]),
        ("max_length=128", "max_length=0", ["max_length", "greater than 0"]),
        ("freeze=False", "freeze=False, feature_layer=1", ["feature_layer", "negative"]),
        ('weights="random"', 'weights="random", quantization="nf4"', ["lora.rank"]),
        ("save_steps=100", "save_steps=100, micro_batch=3", ["micro_batch ", "'micro_batch_size'"]),
    ],
)
def test_wrong_field_is_named_with_the_nearest_right_one(
    tmp_path: Path, small: Small, old: str, new: str, expected: list[str]
) -> None:
    with pytest.raises(InputError) as error:
        load_run(write(tmp_path / "c.py", small, old, new))
    for text in expected:
        assert text in str(error.value)


def test_wrong_config_file_is_one_message_and_exit_code_2(
    tmp_path: Path, small: Small, cli: Callable[..., Finished]
) -> None:
    config = write(tmp_path / "c.py", small, "max_steps=6", "max_stepps=6")
    message = wrong_input(cli("pretrain", config))
    assert "max_stepps" in message
    assert "'max_steps'" in message
    assert "error: config" in wrong_input(cli("pretrain", tmp_path / "none.py"))


def test_everything_frozen_is_refused(tmp_path: Path, small: Small) -> None:
    text = small.config.read_text().replace('weights="random"', 'weights="random", freeze=True')
    text = text.replace("freeze=False", "freeze=True").replace("dataset=", "dataset=", 1)
    text = text.replace("    dataset=", "    dataset=", 1).replace(
        '"/vision.json", freeze=True),', '"/vision.json"), projector=Projector(freeze=True),'
    )
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(InputError, match="nothing would be trained"):
        load_run(tmp_path / "c.py")


def test_a_wrong_flag_is_said_by_one_rank_of_a_run_and_by_each_task_of_its_own(
    small: Small, cli: Callable[..., Finished]
) -> None:
    run, task = ("pretrain", small.config, "--training.micro-batch", "3"), {"SLURM_PROCID": "1"}
    alone = cli(*run, env=task)  # a task of a step whose tasks do different work
    assert alone.code == 2 and "--training.micro-batch-size" in alone.err
    rank = cli(*run, "--launcher", "slurm", env=task)
    assert rank.code == 2 and not rank.err


def test_every_field_is_a_flag_and_help_shows_meaning_and_value(small: Small, cli: Callable[..., Finished]) -> None:
    text = cli("pretrain", small.config, "--help").out
    flat: list[str] = []

    def walk(prefix: str, value: object) -> None:
        for field in dataclasses.fields(value):  # type: ignore[arg-type]
            inner = getattr(value, field.name)
            name = f"{prefix}{field.name.replace('_', '-')}"
            walk(f"{name}.", inner) if dataclasses.is_dataclass(inner) else flat.append(name)

    walk("", load_run(small.config))
    assert len(flat) > 50
    missing = [
        name for name in flat if f"--{name}" not in text and name != "dataset.sources"
    ]  # a list: config file only
    assert not missing
    words = " ".join(text.replace("│", " ").split())
    assert "counted after each image has become its patches" in words
    assert "(default: 128)" in words


def test_flags_override_and_a_wrong_one_is_refused(small: Small, cli: Callable[..., Finished], tmp_path: Path) -> None:
    done = cli("prepare", small.config, "--save-folder", tmp_path / "s", "--dataset.max-length", "99")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "s/llava_tune_manifest.json").read_text())["spec"]["max_length"] == 99
    assert cli("prepare", small.config, "--dataset.max-len", "99").code == 2
    zero = cli("prepare", small.config, "--save-folder", tmp_path / "t", "--dataset.max-length", "0")
    assert zero.code == 2
    assert "Dataset.max_length: Input should be greater than 0; found 0" in " ".join(zero.err.replace("│", " ").split())
    assert not (tmp_path / "t").exists()


def test_shipped_recipes_have_the_published_hyper_parameters() -> None:
    runs = {name: load_run(name) for _, name, _ in list_configs("internlm2")}
    assert len(runs) == 5
    base = "llava_internlm2_chat_7b_clip_vit_large_p14_336_"
    # LLaVA-1.5 (arXiv:2310.03744), table 9; LoRA: the authors' finetune_lora.sh
    expected = {
        "e1_gpu8_pretrain": (256, 1e-3, True, 0),
        "e1_gpu8_finetune": (128, 2e-5, False, 0),
        "lora_e1_gpu8_finetune": (128, 2e-4, True, 128),
        "qlora_e1_gpu1_finetune": (128, 2e-4, True, 128),
    }
    for suffix, (batch, rate, freeze, rank) in expected.items():
        run = runs[base + suffix]
        assert (run.training.global_batch_size, run.optimizer.learning_rate) == (batch, rate)
        assert (run.optimizer.schedule, run.optimizer.warmup_ratio, run.optimizer.weight_decay) == ("cosine", 0.03, 0.0)
        assert (run.model.llm.freeze, run.model.llm.lora.rank, run.training.epochs) == (freeze, rank, 1)
        assert run.model.vision is not None and run.model.vision.name == "ViT-L-14-336-quickgelu"
    text = runs[
        "internlm2_chat_7b_qlora_alpaca_e3_gpu1_finetune"
    ]  # XTuner's recipe of internlm2_chat_7b, QLoRA, Alpaca
    assert text.model.vision is None and text.model.llm.quantization == "nf4"
    assert (text.model.llm.lora.rank, text.optimizer.learning_rate, text.training.epochs) == (64, 2e-4, 3)


def test_docstring_of_each_recipe_starts_with_the_command_that_runs_it() -> None:
    for stage, name, _ in list_configs():
        path = Path(__file__).parents[2] / "configs" / stage / f"{name}.py"
        text = " ".join(path.read_text().replace("\\\n", " ").split())
        assert f"llava-tune {stage} {name}" in text


def test_a_config_survives_its_json(small: Small) -> None:
    run = load_run(small.config)
    again = from_json(to_json(run))
    assert isinstance(again, Run)
    assert again == run


def test_deepspeed_presets(tmp_path: Path) -> None:
    for stage in (1, 2, 3):
        assert deepspeed_config(f"deepspeed_zero{stage}")["zero_optimization"]["stage"] == stage
    assert deepspeed_config("deepspeed_zero3_offload")["zero_optimization"]["offload_param"]["device"] == "cpu"
    with pytest.raises(InputError, match="deepspeed_zero2"):
        deepspeed_config("zero2")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        deepspeed_config(str(tmp_path / "x.json"))


def test_list_and_copy(cli: Callable[..., Finished], tmp_path: Path) -> None:
    assert "qlora" in cli("list-cfg", "qlora").out
    copied = cli("copy-cfg", "demo_pretrain", tmp_path / "mine")
    assert Path(copied.out.strip()).is_file()
    assert "exists already" in wrong_input(cli("copy-cfg", "demo_pretrain", tmp_path / "mine"))


def test_help_is_quick_and_free_of_torch() -> None:
    code = "import sys; sys.argv = ['llava-tune', '--help']\ntry:\n import llava_tune.cli.main as m; m.main()\nexcept SystemExit: pass\n"
    code += "print([n for n in ('torch', 'transformers', 'numpy', 'pydantic', 'tyro') if n in sys.modules])"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    assert time.monotonic() - started < 5
