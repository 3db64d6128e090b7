"""A checkpoint served by transformers answers an OpenAI client as we do."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_tune.evaluate.answer import Answerer
from llava_tune.train.launch import free_port
from tests.conftest import Finished, Small, wrong_input

pytestmark = pytest.mark.timeout(400)


def test_an_openai_client_gets_our_answers(
    clip: Path,
    small: Small,
    cli: Callable[..., Finished],
    tmp_path: Path,
) -> None:
    openai = pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    port = free_port()
    command = ["serve", clip, "--port", port, "--dtype", "fp32"]
    process = subprocess.Popen(
        [sys.executable, "-m", "llava_tune.cli.main", *map(str, command)],
        stderr=(tmp_path / "log").open("w"),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 200
        while True:
            assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "log").read_text()
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        answerer = Answerer(clip)
        for image in sorted(small.images.iterdir())[:2]:
            uri = f"data:image/png;base64,{base64.b64encode(image.read_bytes()).decode()}"
            content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "What is this?"}]
            said = client.chat.completions.create(
                model=str((clip / "hf").resolve()),
                messages=[{"role": "user", "content": content}],
                max_tokens=20,
                temperature=0,
            )
            assert said.choices[0].message.content.strip() == answerer.ask("What is this?", [image], 20)
    finally:
        process.kill()
        process.wait()
    printed = cli("serve", clip, "--server", "vllm", "--port", "9000")
    assert printed.out.split() == [
        "vllm",
        "serve",
        str((clip / "hf").resolve()),
        "--host",
        "127.0.0.1",
        "--port",
        "9000",
    ]
    assert "neither a checkpoint" in wrong_input(cli("serve", tmp_path))
