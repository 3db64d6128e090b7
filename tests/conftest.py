"""Fixtures: the shared data (skipped with a reason where absent), a small LLaVA's parts, and running the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

from llava_tune.train.launch import free_port
from tests.warm import Warm

# The same examples in every run, so that a red CI is this commit's doing; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("explore")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY.parent / "shared"
# Two processes, which meet by address: --standalone needs a machine that knows the name localhost.
MEETING = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *MEETING]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["LLAVA_TUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared data at {SHARED}, which is not there")
    return SHARED / "data"


@pytest.fixture(scope="session")
def internlm2_tokenizer(shared: Path) -> Path:
    return shared / "internlm2_tokenizer"


@dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def warm(_own_cache: None) -> Iterator[Warm]:
    process = Warm()
    yield process
    process.close()


@pytest.fixture(scope="session")
def cli(warm: Warm) -> Callable[..., Finished]:
    def run(*arguments: object, env: dict[str, str] | None = None, timeout: float = 300) -> Finished:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        return Finished(*warm.run([str(a) for a in arguments], [environment], timeout))

    return run


@pytest.fixture(scope="session")
def two_ranks(warm: Warm) -> Callable[..., Finished]:
    """Two processes with what torchrun sets, less torchrun itself."""

    def run(*arguments: object, timeout: float = 300) -> Finished:
        shared = {
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        common = {**os.environ, "OMP_NUM_THREADS": "1", **shared}
        ranks = [{**common, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
        return Finished(*warm.run([*map(str, arguments), "--launcher", "torchrun"], ranks, timeout))

    return run


def wrong_input(finished: Finished) -> str:
    """The message of a run that must have ended with exit code 2 and one message, no traceback."""
    assert finished.code == 2, (finished.code, finished.out, finished.err)
    assert "Traceback" not in finished.err, finished.err
    lines = [line for line in finished.err.splitlines() if line.startswith("error")]
    assert len(lines) == 1, finished.err
    return lines[0]


@dataclass(frozen=True)
class Small:
    """A drawn data set and the parts of a small LLaVA in one folder, and a config that names them."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "small.py"

    @property
    def captions(self) -> Path:
        return self.folder / "data/captions.json"

    @property
    def images(self) -> Path:
        return self.folder / "data/images"


CONFIG = '''"""A small run for tests."""
from llava_tune.config import *

d = {folder!r}
run = Run(
    model=Model(
        llm=LanguageModel(name=d + "/llm", weights="random"),
        vision=VisionTower(name=d + "/vision.json", freeze=False),
    ),
    dataset=Dataset(
        data_path=d + "/data/captions.json", image_folder=d + "/data/images", max_length=128, num_workers=0
    ),
    optimizer=Optimizer(learning_rate=1e-3, warmup_ratio=0.1),
    training=Training(global_batch_size=4, micro_batch_size=2, max_steps=6, save_steps=100),
)
'''


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    from llava_tune.demo.scenes import write_data
    from llava_tune.demo.small import texts_of, write_language_model, write_vision_tower

    folder = tmp_path_factory.mktemp("small")
    write_data(folder / "data", train=48, test=6, seed=3)
    texts = texts_of([folder / "data/captions.json", folder / "data/train.json"])
    write_language_model(folder / "llm", texts, vocab_size=400, width=64, layers=2, heads=4)
    write_vision_tower(folder / "vision.json", image_size=64)
    (folder / "small.py").write_text(CONFIG.format(folder=str(folder)))
    return Small(folder)


def losses(work_dir: Path) -> list[float]:
    """The losses of a run's metrics.jsonl, in order."""
    return [json.loads(line)["loss"] for line in (work_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def slurm() -> Iterator[None]:
    script = SHARED / "slurm/start-slurm.sh"
    if not script.is_file() or os.geteuid() != 0:
        pytest.skip("needs root and the shared Slurm script, which starts two nodes here")
    env = {**os.environ, "SLURM_CI_RESOLVE": "0"}  # node names that resolve nowhere, as on many clusters
    started = subprocess.run(["bash", str(script)], capture_output=True, text=True, env=env)
    if started.returncode:
        pytest.skip(f"Slurm does not start here: {started.stdout[-300:]}{started.stderr[-300:]}")
    yield
    subprocess.run(["bash", str(script), "stop"], capture_output=True, env=env)
