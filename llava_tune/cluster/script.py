"""The sbatch scripts of a run: readable text, one a stage."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from llava_tune.cluster.site import Site
from llava_tune.constants import FINISHED
from llava_tune.errors import EXIT_BAD_INPUT, STOPPED_EXIT

FAILURES = "failures"
"""In the folder of the scripts: how often training failed since the chain was submitted."""


@dataclass(frozen=True)
class Job:
    """What the scripts are made of.

    Attributes:
        name: of the run; a stage's job is called NAME-STAGE.
        config: the config as it was when the chain was submitted.
        verb: pretrain or finetune.
        work_dir: of the run.
        store: where the prepared data goes, or lies.
        nodes, gpus_per_node: of training; 0 GPUs: on CPUs.
        ranks_per_node: processes of training on a node.
        deepspeed: a preset or file, or None.
        prepare_tasks: tasks of the array that prepares.
        requeue: training that is told to stop saves and queues itself again.
        retries: how often training that failed is queued again.
        stage: a folder on each node's own disk that the store and the images are copied to before training; None: they aren't.
        image_folder: what is copied then, or None.
        formats: that the trained model is exported to.
    """

    name: str
    config: Path
    verb: str
    work_dir: Path
    store: Path
    nodes: int
    gpus_per_node: int
    ranks_per_node: int
    deepspeed: str | None
    prepare_tasks: int
    requeue: bool
    retries: int
    stage: str | None
    image_folder: str | None
    formats: tuple[str, ...]

    def folder(self) -> Path:
        """Where scripts and logs lie."""
        return self.work_dir / "slurm"

    def log(self, stage: str) -> Path:
        """A stage's log (of the array that prepares, a pattern)."""
        return self.folder() / (f"{stage}-%a.log" if stage == "prepare" else f"{stage}.log")


def _head(job: Job, site: Site, stage: str, lines: list[str], *, cpu: bool = False) -> list[str]:
    partition = (site.cpu_partition or site.partition) if cpu else site.partition
    time = (site.cpu_time or site.time) if cpu else site.time
    options = [
        f"--job-name={job.name}-{stage}",
        f"--output={job.log(stage)}",
        "--open-mode=append",
        *lines,
        *([f"--partition={partition}"] if partition else []),
        *([f"--account={site.account}"] if site.account else []),
        *([f"--qos={site.qos}"] if site.qos else []),
        *([f"--constraint={site.constraint}"] if site.constraint and not cpu else []),
        *([f"--time={time}"] if time else []),
        *([f"--mem={site.mem}"] if site.mem and not cpu else []),
        *site.sbatch,
    ]
    return [
        "#!/bin/bash",
        f"# {stage} of {job.name}, written by llava-tune slurm",
        *(f"#SBATCH {option}" for option in options),
        "set -o pipefail",
        *(f"module load {shlex.quote(module)}" for module in site.modules),
        *(f"export {name}={shlex.quote(value)}" for name, value in site.env),
        *site.setup,
        "",
    ]


def _ours(site: Site, *arguments: object) -> str:
    prefix = [*shlex.split(site.container or ""), site.python or sys.executable, "-m", "llava_tune.cli.main"]
    return " ".join(shlex.quote(str(part)) for part in [*prefix, *arguments])


def _srun(site: Site, *options: str) -> str:
    return " ".join(["srun", *options, *map(shlex.quote, site.srun)])


def _gpus(job: Job, nodes: int) -> list[str]:
    lines = [f"--nodes={nodes}", f"--ntasks-per-node={job.ranks_per_node}"]
    return [*lines, *([f"--gpus-per-node={job.gpus_per_node}"] if job.gpus_per_node else [])]


def prepare_script(job: Job, site: Site) -> str:
    """An array of CPU tasks; each writes its share of the store, the last one to end finishes it."""
    lines = [f"--array=0-{job.prepare_tasks - 1}", "--ntasks=1", f"--cpus-per-task={site.prepare_cpus}", "--requeue"]
    command = _ours(site, "prepare", job.config, "--save-folder", job.store, "--num-proc", site.prepare_cpus)
    return "\n".join([*_head(job, site, "prepare", lines, cpu=True), f"exec {command}", ""])


def train_script(job: Job, site: Site) -> str:
    """A look at the nodes, then training; told to stop, it saves and queues itself again, and goes on where it was."""
    lines = [
        *_gpus(job, job.nodes),
        f"--cpus-per-task={site.cpus_per_task}",
        *(["--requeue"] if job.requeue or job.retries else ["--no-requeue"]),
        f"--signal=USR1@{site.signal_seconds}",
    ]
    overrides = ["--dataset.offline-processed-text-folder", str(job.store)]
    staging: list[str] = []
    if job.stage is not None:
        copies = [(str(job.store), "store"), *([(job.image_folder, "images")] if job.image_folder else [])]
        target = f"{job.stage.rstrip('/')}/{job.name}"
        copy = " && ".join(
            f"cp --archive --update --no-target-directory {shlex.quote(source)} {shlex.quote(f'{target}/{name}')}"
            for source, name in copies
        )
        inner = f"mkdir -p {shlex.quote(target)} && {copy}"
        staging = [
            "# the store and the images onto each node's own disk",
            f"{_srun(site, '--ntasks-per-node=1', f'--ntasks={job.nodes}')} bash -c {shlex.quote(inner)} || exit 1",
        ]
        overrides = ["--dataset.offline-processed-text-folder", f"{target}/store"]
        overrides += ["--dataset.image-folder", f"{target}/images"] if job.image_folder else []
    arguments = [job.config, "--work-dir", job.work_dir, *overrides, "--launcher", "slurm"]
    deepspeed = ["--deepspeed", job.deepspeed] if job.deepspeed else []
    finished = shlex.quote(str(job.work_dir / FINISHED))
    failures = shlex.quote(str(job.folder() / FAILURES))
    return "\n".join(
        [
            *_head(job, site, "train", lines),
            *staging,
            "# a bad node ends the job here, in a minute",
            f"{_srun(site, '--kill-on-bad-exit=0')} {_ours(site, 'preflight', *arguments)} || exit 1",
            "",
            "# --kill-on-bad-exit: when a rank dies, the others end. One that saved and stops must not look as if it had died",
            f"export {STOPPED_EXIT}=0",
            f"{_srun(site, '--kill-on-bad-exit=1')} {_ours(site, job.verb, *arguments, '--resume', *deepspeed)}",
            "code=$?",
            "again=",
            f"if [ $code -eq 0 ] && [ ! -f {finished} ]; then",
            *(
                ["    again=saved"]
                if job.requeue
                else ['    echo "stopped after saving; submit the chain again to go on"']
            ),
            "elif [ $code -ne 0 ]; then",
            f"    {_ours(site, 'why', job.work_dir)}",
            f"    failures=$(cat {failures} 2>/dev/null || echo 0)",
            f"    if [ $code -ne {EXIT_BAD_INPUT} ] && [ $failures -lt {job.retries} ]; then",
            f"        echo $((failures + 1)) > {failures}",
            "        again=failed",
            "    fi",
            "fi",
            "# not after scancel",
            'if [ -n "$again" ] && scontrol show job $SLURM_JOB_ID | grep -q JobState=RUNNING; then',
            '    echo "$again; queued again: it goes on from the last checkpoint"',
            "    scontrol requeue $SLURM_JOB_ID",
            "    sleep 60  # until Slurm ends this script",
            "fi",
            "exit $code",
            "",
        ]
    )


def evaluate_script(job: Job, site: Site, arguments: list[str]) -> str:
    """The best checkpoint (the last one, where none was found best) answers the questions, on one node."""
    command = _ours(site, "evaluate", job.work_dir / "best", *arguments, "--launcher", "slurm")
    lines = [*_gpus(job, 1), f"--cpus-per-task={site.cpus_per_task}", "--requeue"]
    return "\n".join(
        [*_head(job, site, "evaluate", lines), f"exec {_srun(site, '--kill-on-bad-exit=1')} {command}", ""]
    )


def export_script(job: Job, site: Site) -> str:
    """The best checkpoint in each format, proved by the gate."""
    lines = ["--nodes=1", "--ntasks=1", f"--cpus-per-task={site.cpus_per_task}", "--requeue"]
    lines += ["--gpus-per-node=1"] if job.gpus_per_node else []
    commands = []
    for name in job.formats:
        folder = export_folder(job.work_dir, name)
        export = _ours(site, "export", job.work_dir / "best", folder, "--format", name)
        commands.append(f"[ -d {shlex.quote(str(folder))} ] || {export} || exit 1")
    return "\n".join([*_head(job, site, "export", lines), *commands, ""])


def export_folder(work_dir: Path, name: str) -> Path:
    """Where a chain's export goes."""
    return work_dir / "export" / name
