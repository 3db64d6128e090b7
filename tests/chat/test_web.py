"""The chat's page, in a real browser: a picture is uploaded, a question asked, and the model's own answer read."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llava_tune.train.launch import free_port
from tests.conftest import Finished, Small, wrong_input
from tests.export.conftest import tower, trained

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


def ask(page: Any, text: str, file: Path) -> None:
    """Choose a file, wait until the server has it and the page shows it, and send it with a text; not while an answer is being made."""
    page.locator(".submit-button").first.wait_for(timeout=60_000)
    with page.expect_response(lambda response: "/upload" in response.url, timeout=60_000):
        page.set_input_files("input[type=file]", str(file))
    page.locator(".thumbnail-item").first.wait_for(timeout=60_000)
    box = page.locator("textarea").first
    box.fill(text)
    box.press("Enter")
    page.get_by_test_id("user").filter(has_text=text).first.wait_for(timeout=60_000)


def test_a_picture_is_uploaded_and_the_answer_read(
    browser: Any, small: Small, cli: Callable[..., Finished], tmp_path: Path
) -> None:
    pytest.importorskip("gradio")
    tower(tmp_path, quick_gelu=True)
    checkpoint = trained(small, cli, tmp_path, "v = replace(v, name=tower)")
    from llava_tune.evaluate.answer import Answerer

    pictures = [small.images / "00003.png", small.images / "00005.png"]
    answerer = Answerer(checkpoint)
    first = answerer.ask("What is this?", pictures[:1], 12)
    port = free_port()
    command = [sys.executable, "-m", "llava_tune.cli.main", "chat", str(checkpoint), "--web", "--port", str(port)]
    command += ["--max-new-tokens", "12", "--image", str(pictures[1])]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        assert server.stdout is not None and f"http://127.0.0.1:{port}" in server.stdout.readline()
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}")
        box = page.locator("textarea").first
        box.wait_for(timeout=60_000)
        assert page.get_by_text("What is in the picture?").count() == 1  # the example to click on
        ask(page, "What is this?", pictures[0])
        said = page.get_by_test_id("bot")
        said.first.wait_for(timeout=60_000)
        page.wait_for_function(
            "expected => [...document.querySelectorAll('[data-testid=bot]')].some(e => e.innerText.trim() === expected)",
            arg=first.strip() or "(an empty answer)",
            timeout=60_000,
        )
        assert page.get_by_test_id("user").filter(has_text="What is this?").count() == 1
        # What is no picture is said to be none, and the page lives on.
        broken = tmp_path / "broken.png"
        broken.write_bytes(pictures[0].read_bytes()[:60])
        ask(page, "And this?", broken)
        page.get_by_text("can't be decoded").first.wait_for(timeout=60_000)
    finally:
        server.terminate()
        server.wait(timeout=30)


def test_what_chat_can_not_open_is_refused(small: Small, cli: Callable[..., Finished], tmp_path: Path) -> None:
    assert "no such file" in wrong_input(cli("chat", tmp_path, "--image", tmp_path / "none.png"))
    assert "not a llava-tune checkpoint" in wrong_input(cli("chat", tmp_path))
    (tmp_path / "model-f16.gguf").touch()
    assert "llama.cpp opens" in wrong_input(cli("chat", tmp_path))
    assert "can't open it" in wrong_input(cli("chat", "nobody/nothing"))
