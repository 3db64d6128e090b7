"""Without the Hub: said at once, with what to do, for each thing that would come from there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from llava_tune.hub import hub_answers
from tests.conftest import Finished, Small, wrong_input

NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9"}


def test_a_command_does_not_try_again_and_again(small: Small, cli: Callable[..., Finished], tmp_path: Path) -> None:
    env = {**NOWHERE, "HF_HOME": str(tmp_path)}
    done = cli("doctor", small.config, "--model.llm.name", "nobody/nothing-7b", env=env)
    message = wrong_input(done)
    assert "it is not in" in message and "can't be reached from here" in message
    assert "hf download nobody/nothing-7b" in message
    assert "Retrying" not in done.err


def test_the_cache_alone_is_used_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE["HF_ENDPOINT"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    hub_answers.cache_clear()
    assert not hub_answers()
    assert constants.is_offline_mode()  # huggingface_hub and transformers ask this before they connect
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    hub_answers.cache_clear()


def test_towers_are_named(tmp_path: Path) -> None:
    program = """if True:
        import json
        from llava_tune.config import VisionTower
        from llava_tune.errors import InputError
        from llava_tune.model.vision import _load
        from torch import nn
        found = []
        for pretrained in ("openai", "openai/clip-vit-large-patch14-336"):
            try:
                _load(nn.Identity(), VisionTower(name="ViT-L-14-336", pretrained=pretrained), {})
            except InputError as error:
                found.append(str(error))
        print(json.dumps(found))
    """
    env = {**os.environ, **NOWHERE, "HF_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, text=True, check=True)
    messages = json.loads(done.stdout.splitlines()[-1])
    assert len(messages) == 2
    assert all("can't be reached from here" in message for message in messages)
    assert "hf download timm/vit_large_patch14_clip_336.openai" in messages[0]
    assert "hf download openai/clip-vit-large-patch14-336" in messages[1]
