"""The first command of a new user, made small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_demo_goes_all_the_way_to_a_model_that_transformers_opens(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llava_tune.cli.main", "demo", "--export", "--work-dir", str(tmp_path / "demo")]
    done = subprocess.run([*command, "--images", "24", "--test-images", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "held-out accuracy: " in done.stdout and " of 12 questions" in done.stdout
    for name in ("answers.png", "answers.jsonl", "pretrain/loss.png", "finetune/loss.png", "exported/config.json"):
        assert (tmp_path / "demo" / name).is_file(), name
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and "--restart" in again.stderr
