"""The first command of a new user, made small."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava_tune.cli import demo
from llava_tune.errors import InputError
from tests.conftest import Finished


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_demo_goes_all_the_way_to_a_model_that_transformers_opens(
    cli: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str]) -> SimpleNamespace:
        """Its commands are processes here, too, forked from one that has the libraries."""
        assert command[:3] == [sys.executable, "-m", "llava_tune.cli.main"]
        done = cli(*command[3:])
        assert done.code == 0, done.err
        return SimpleNamespace(returncode=done.code)

    monkeypatch.setattr(demo, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setenv("LLAVA_TUNE_DEMO", "")  # the demo sets it
    folder = tmp_path / "demo"
    demo.main(["--export", "--work-dir", str(folder), "--images", "24", "--test-images", "2"])
    said = capsys.readouterr().out
    assert "held-out accuracy: " in said and " of 12 questions" in said
    for name in ("answers.png", "answers.jsonl", "pretrain/loss.png", "finetune/loss.png", "exported/config.json"):
        assert (folder / name).is_file(), name
    with pytest.raises(InputError, match="--restart"):
        demo.main(["--work-dir", str(folder)])
