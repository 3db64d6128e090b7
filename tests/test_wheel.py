"""A wheel has the command, the configs and the tools."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow


def test_a_wheel_in_another_environment_lists_its_configs(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    source = tmp_path / "source"  # a copy: a build leaves files behind
    for name in ("llava_tune", "configs", "tools"):
        shutil.copytree(REPOSITORY / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    build = [*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(n.endswith("scripts/process_untokenized_llava_data.py") for n in names)
    assert "llava_tune/shipped/configs/deepspeed/deepspeed_zero2.json" in names
    # An environment that has the wheel alone, and finds the dependencies of this one.
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, capture_output=True)
    code = "import sys; sys.argv = ['llava-tune', 'list-cfg']; import llava_tune.cli.main as m; print(m.__file__); m.main()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site))
    assert "llava_internlm2_chat_7b_clip_vit_large_p14_336_e1_gpu8_pretrain" in done.stdout
