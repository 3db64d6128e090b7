"""Under ZeRO a run goes on with more or fewer ranks; what can't be read is refused, not begun anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Finished, Small, losses, wrong_input

# Groups with rates and decays of their own, most of the model frozen.
PARTS = (
    "--model.vision.freeze", "--model.llm.freeze", "--model.llm.lora.rank", "4", "--model.llm.lora.dropout", "0",
    "--optimizer.projector-learning-rate", "5e-3", "--optimizer.weight-decay", "0.1",
    "--training.max-steps", "12", "--training.save-steps", "4", "--training.save-total-limit", "3",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_then_one_then_two_have_the_curve_of_two(
    small: Small, cli: Callable[..., Finished], two_ranks: Callable[..., Finished], tmp_path: Path, stage: int
) -> None:
    run = ("pretrain", small.config, *PARTS, "--deepspeed", f"deepspeed_zero{stage}")
    done = two_ranks(*run, "--work-dir", tmp_path / "two")
    assert done.code == 0, done.err
    (tmp_path / "one/.resharded/checkpoint-4").mkdir(parents=True)  # what a killed run left of another checkpoint
    one = cli(*run, "--work-dir", tmp_path / "one", "--resume", tmp_path / "two/checkpoint-4")
    assert one.code == 0, one.err
    assert "optimizer state from 2 rank(s) to 1" in one.err
    again = two_ranks(*run, "--work-dir", tmp_path / "again", "--resume", tmp_path / "one/checkpoint-8")
    assert again.code == 0, again.err
    assert again.err.count("optimizer state from 1 rank(s) to 2") == 1
    expected = losses(tmp_path / "two")
    assert len(expected) == 12
    assert losses(tmp_path / "one") == pytest.approx(expected[4:], rel=1e-5)
    assert losses(tmp_path / "again") == pytest.approx(expected[8:], rel=1e-5)
    assert not (tmp_path / "one/.resharded").exists() and not (tmp_path / "again/.resharded").exists()


def test_what_the_engine_can_not_read_is_refused(small: Small, cli: Callable[..., Finished], tmp_path: Path) -> None:
    run = ("pretrain", small.config, "--training.max-steps", "2")
    assert cli(*run, "--work-dir", tmp_path / "plain").code == 0
    plain = ("--work-dir", tmp_path / "x", "--resume", tmp_path / "plain/checkpoint-2")
    assert "it was made without DeepSpeed" in wrong_input(cli(*run, *plain, "--deepspeed", "deepspeed_zero2"))
    assert cli(*run, "--work-dir", tmp_path / "zero", "--deepspeed", "deepspeed_zero2").code == 0
    zero = ("--work-dir", tmp_path / "x", "--resume", tmp_path / "zero/checkpoint-2")
    said = wrong_input(cli(*run, *zero))
    assert "made with DeepSpeed's ZeRO-1 or ZeRO-2" in said and "--deepspeed deepspeed_zero2" in said
    assert "can't be read with DeepSpeed's ZeRO-3" in wrong_input(cli(*run, *zero, "--deepspeed", "deepspeed_zero3"))
    assert not (tmp_path / "x").exists()
