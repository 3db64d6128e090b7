"""A run as a chain of Slurm jobs: what is done is found, what is queued is left alone, the rest is submitted."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llava_tune.cluster import script
from llava_tune.cluster.script import Job
from llava_tune.cluster.site import Site
from llava_tune.config import Run, to_json
from llava_tune.constants import FINISHED
from llava_tune.errors import InputError, RunFailed
from llava_tune.paths import write_whole

STAGES = ("prepare", "train", "evaluate", "export")
STATE = "chain.json"
_GONE = {"", "UNKNOWN"}
_WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED"}
_AT_WORK = {"RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING"}


@dataclass(frozen=True)
class Stage:
    """A stage of the chain.

    Attributes:
        text: its sbatch script.
        done: there already.
        job_id: of the job that is queued or runs for it, else None.
    """

    name: str
    text: str
    done: bool
    job_id: str | None = None


def evaluate_arguments(run: Run) -> list[str]:
    """What `evaluate` is told, by the config's `evaluation`; all questions are asked."""
    asked = run.evaluation
    arguments = ["--data", str(asked.data_path), "--output", str(_answers(Path(str(run.work_dir))))]
    for flag, value in (
        ("--image-folder", asked.image_folder or run.dataset.image_folder),
        ("--benchmark", asked.benchmark),
        ("--annotations", asked.annotations),
    ):
        arguments += [flag, str(value)] if value else []
    return [*arguments, "--batch-size", str(asked.batch_size), "--max-new-tokens", str(asked.max_new_tokens)]


def _answers(work_dir: Path) -> Path:
    return work_dir / "evaluation" / "answers.jsonl"


def stages(run: Run, job: Job, site: Site) -> list[Stage]:
    """The stages that this run has, in order, each with what is known of it."""
    known = _read_state(job)
    trained = is_trained(run, job.work_dir)
    found = []

    def add(name: str, text: str, done: bool) -> None:
        job_id = known.get(name)
        queued = job_id is not None and not done and state_of(job_id) in _WAITING | _AT_WORK
        found.append(Stage(name, text, done, job_id if queued else None))

    if run.dataset.offline_processed_text_folder is None:
        add("prepare", script.prepare_script(job, site), (job.store / "llava_tune_manifest.json").is_file())
    add("train", script.train_script(job, site), trained)
    if run.evaluation.data_path is not None:
        done = trained and _answers(job.work_dir).is_file()
        add("evaluate", script.evaluate_script(job, site, evaluate_arguments(run)), done)
    if job.formats:
        done = trained and all(script.export_folder(job.work_dir, name).is_dir() for name in job.formats)
        add("export", script.export_script(job, site), done)
    return found


def is_trained(run: Run, work_dir: Path) -> bool:
    """Whether the run in `work_dir` ended, with this config."""
    path = work_dir / FINISHED
    if not path.is_file():
        return False
    then, now = json.loads(path.read_bytes())["run"], json.loads(to_json(run))
    return all(then[part] == now[part] for part in ("model", "optimizer", "training"))


def write_scripts(run: Run, job: Job, chain: list[Stage]) -> None:
    """The config as it is now, and the scripts of the stages that are to come."""
    job.folder().mkdir(parents=True, exist_ok=True)
    write_whole(job.config, to_json(run))
    for stage in chain:
        if not stage.done and stage.job_id is None:
            write_whole(job.folder() / f"{stage.name}.sbatch", stage.text)
            if stage.name == "train":
                (job.folder() / script.FAILURES).unlink(missing_ok=True)


def submit(job: Job, chain: list[Stage]) -> list[Stage]:
    """Submit what is neither done nor queued, each stage after the one before it; returns the chain with all job ids.

    Raises:
        RunFailed: sbatch refuses a job; the ones submitted before it are taken back.
    """
    before: str | None = None
    submitted: list[str] = []
    result = []
    for stage in chain:
        job_id = stage.job_id
        if not stage.done and job_id is None:
            dependency = [f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes"] if before else []
            command = ["sbatch", "--parsable", *dependency, str(job.folder() / f"{stage.name}.sbatch")]
            try:
                job_id = _slurm(command).strip().split(";")[0]
            except RunFailed:
                if submitted:
                    subprocess.run(["scancel", *submitted], capture_output=True)
                raise
            submitted.append(job_id)
        before = job_id or before
        result.append(Stage(stage.name, stage.text, stage.done, job_id))
    ids = _read_state(job) | {stage.name: stage.job_id for stage in result if stage.job_id is not None}
    write_whole(job.folder() / STATE, json.dumps(ids, indent=1))
    return result


def _read_state(job: Job) -> dict[str, str]:
    path = job.folder() / STATE
    ids: dict[str, str] = json.loads(path.read_bytes()) if path.is_file() else {}
    return ids


def _slurm(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        raise InputError(
            f"{command[0]} is not there: this machine doesn't submit to Slurm. Run it on a login node; --dry-run writes the scripts anywhere"
        ) from None
    except subprocess.CalledProcessError as error:
        raise RunFailed(f"{' '.join(command)} failed: {error.stderr.strip()}") from error


def state_of(job_id: str) -> str:
    """Slurm's state of a job (PENDING, RUNNING, COMPLETED, FAILED ...); of an array the one that matters most; '' if it is forgotten."""
    done = subprocess.run(["scontrol", "show", "job", job_id, "--oneliner"], capture_output=True, text=True)
    states = re.findall(r"JobState=(\w+)", done.stdout)
    if not states:
        accounted = subprocess.run(
            ["sacct", "-X", "-n", "-P", "-o", "State", "-j", job_id], capture_output=True, text=True
        )
        states = [line.split()[0] for line in accounted.stdout.splitlines() if line.strip()]
    return max(states, key=_weight, default="")


def _weight(state: str) -> int:
    """Of an array's tasks: one at work counts most, then one that waits, then one that failed."""
    if state in _AT_WORK:
        return 3
    if state in _WAITING:
        return 2
    return 0 if state == "COMPLETED" else 1


def watch(job: Job, chain: list[Stage], say: Callable[[str], None], *, every: float = 5.0) -> bool:
    """Follow the jobs until none is left: what changes of their states, and their logs as they grow.

    Returns:
        Whether every stage's job ended well.
    """
    running = {stage.name: stage.job_id for stage in chain if stage.job_id is not None}
    states: dict[str, str] = {}
    tails = {name: _Tail(job, name) for name in running}
    while True:
        for name, job_id in running.items():
            state = state_of(str(job_id))
            for line in tails[name].lines():
                say(f"[{name}] {line}")
            if state != states.get(name):
                states[name] = state
                say(f"{time.strftime('%H:%M:%S')} {name} ({job_id}): {state or 'gone'}")
        if not any(state in _WAITING | _AT_WORK for state in states.values()):
            return all(state == "COMPLETED" or (state in _GONE and _ended_well(job, n)) for n, state in states.items())
        time.sleep(every)


def _ended_well(job: Job, name: str) -> bool:
    """Of a job that Slurm has forgotten."""
    if name == "prepare":
        return (job.store / "llava_tune_manifest.json").is_file()
    if name == "train":
        return (job.work_dir / FINISHED).is_file()
    if name == "evaluate":
        return _answers(job.work_dir).is_file()
    return all(script.export_folder(job.work_dir, kind).is_dir() for kind in job.formats)


class _Tail:
    """What is new in a stage's logs."""

    def __init__(self, job: Job, name: str) -> None:
        self._folder, self._pattern = job.folder(), job.log(name).name.replace("%a", "*")
        self._read: dict[Path, int] = {path: path.stat().st_size for path in self._folder.glob(self._pattern)}

    def lines(self) -> Iterator[str]:
        for path in sorted(self._folder.glob(self._pattern)):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            yield from (line for line in whole.decode(errors="replace").splitlines() if line.strip())
