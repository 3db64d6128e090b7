"""`inspect` in the terminal and as a page in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Finished, Small, wrong_input

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def many(small: Small, cli: Callable[..., Finished], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 100,000 samples of two data sets, one of them with images."""
    folder = tmp_path_factory.mktemp("many")
    captions = json.loads(small.captions.read_text())
    pictures = [{**captions[k % len(captions)], "id": f"picture {k}"} for k in range(60_000)]
    (folder / "pictures.json").write_text(json.dumps(pictures))
    with (folder / "chat.jsonl").open("w") as file:
        for k in range(40_000):
            answer = "</script><b>" + "long " * 80 if k % 100 == 0 else "short"
            said = [{"from": "human", "value": f"question {k}"}, {"from": "gpt", "value": answer}]
            file.write(json.dumps({"id": f"chat {k}", "conversations": said}) + "\n")
    sources = f"[DataSource(data_path={str(folder / 'pictures.json')!r}), DataSource(data_path={str(folder / 'chat.jsonl')!r})]"
    config = folder / "c.py"
    config.write_text(
        "import dataclasses\nfrom llava_tune.config import DataSource, load_run\n"
        f"run = load_run({str(small.config)!r})\n"
        f"run = dataclasses.replace(run, dataset=dataclasses.replace(run.dataset, data_path=None, max_length=64, sources={sources}))\n"
    )
    done = cli("prepare", config, "--save-folder", folder / "s")
    assert done.code == 0, done.err
    return folder


def test_the_terminal_shows_a_sample(small: Small, many: Path, cli: Callable[..., Finished]) -> None:
    done = cli("inspect", many / "s", "--rows", 3, "--image-folder", small.images)
    assert done.code == 0, done.err
    assert done.out.count("supervised") >= 3
    assert re.search(r"pictures: 60,000 samples, 60,000 images", done.out)
    done = cli("inspect", small.config, "--rows", 1)
    assert done.code == 0, done.err
    assert re.search(r"image 1: .*, \d+ x \d+", done.out)
    assert "[image 1: 16 tokens]" in done.out
    assert "neither a prepared folder nor a config" in wrong_input(cli("inspect", many / "nowhere"))


def dom(page: Path, fragment: str = "") -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run(
        [*command, f"{page.as_uri()}#{fragment}"], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout.split('<script type="application/json"')[0]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt-get install chromium)")
def test_the_page_works_from_a_file_in_chromium(
    small: Small, many: Path, cli: Callable[..., Finished], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    done = cli("inspect", many / "s", "--html", page, "--rows", 300, "--image-folder", small.images)
    assert done.code == 0, done.err
    assert page.stat().st_size < 5e6
    assert not re.search(r'(src|href)="http', page.read_text())
    first = dom(page)
    assert "100,000 samples; 300 of them, drawn at random, are below" in first
    assert first.count("<article>") == 20
    assert "page 1 of 15, 300 samples" in first
    assert first.count("<svg") == 2 and first.count("<rect") > 20
    assert "<td>60.0 %</td>" in first
    assert 'src="data:image/jpeg;base64,' in first
    assert 'class="learnt"' in first
    second = dom(page, "page=2")
    assert "page 2 of 15" in second
    ids = [re.findall(r"<header><b>(.*?)</b>", text) for text in (first, second)]
    assert len(ids[0]) == len(ids[1]) == 20 and not set(ids[0]) & set(ids[1])
    chat = dom(page, "set=chat&sort=long&only=cut")
    assert 0 < chat.count("<article>") <= 20
    assert chat.count("cut to max_length</span>") == chat.count("<article>")
    assert "&lt;/script&gt;&lt;b&gt;long" in chat  # a record's text is text, not markup
    one = re.findall(r"<header><b>(.*?)</b>", first)[0]
    assert re.findall(r"<header><b>(.*?)</b>", dom(page, f"q={one.replace(' ', '%20')}"))[0].startswith(one)
    assert "0 samples" in dom(page, "q=nothing%20like%20this")
