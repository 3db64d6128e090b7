"""llava-tune slurm CFG --nodes N --gpus-per-node G [--dry-run] [--watch]"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llava_tune.cli.options import FlatRun, parse
from llava_tune.errors import EXIT_RUN_FAILED, InputError

if TYPE_CHECKING:
    from llava_tune.cluster.script import Job
    from llava_tune.config import Run

DESCRIPTION = """Run a config on Slurm as a chain of jobs: prepare (a CPU array), train (after a look at every node; told to stop before the
time limit, it saves, queues itself again and goes on), evaluate (if the config's evaluation.data_path is set) and export. Readable scripts go
to WORK_DIR/slurm. Submitting again finds what is done or queued. Defaults of a site: ~/.config/llava-tune/slurm.toml."""


@dataclass
class Options:
    run: FlatRun
    nodes: int = 1
    """Nodes that train."""
    gpus_per_node: int = 8
    """GPUs of each; 0: train on CPUs."""
    ranks_per_node: int | None = None
    """Processes on each node; unset: one for each GPU."""
    deepspeed: str | None = None
    """A preset or JSON file, as in pretrain."""
    prepare_tasks: int = 4
    """Tasks of the array that prepares the data."""
    save_folder: str | None = None
    """Where the prepared data goes; unset: WORK_DIR/data."""
    export: tuple[Literal["hf", "gguf", "llava", "adapter"], ...] = ("hf",)
    """Formats that the trained model is exported to; empty: none."""
    requeue: bool = True
    """Queue training again when it was stopped after saving."""
    retries: int = 0
    """Times that training is queued again after it failed (a node that died), from its last checkpoint."""
    stage: str | None = None
    """Copy the prepared data and the images to this folder on each node's own disk before training."""
    partition: str | None = None
    """As sbatch has it; so have the following."""
    cpu_partition: str | None = None
    """Of the jobs that prepare; unset: partition."""
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = None
    """Limit of a training job; preparing tasks: cpu_time in slurm.toml."""
    mem: str | None = None
    container: str | None = None
    """A command in front of ours, such as "apptainer exec --nv IMAGE"."""
    dry_run: bool = False
    """Write the scripts and print them; submit nothing."""
    watch: bool = False
    """Stay, and follow states and logs until the chain ends."""


def main(arguments: list[str]) -> None:
    """Write, submit, watch."""
    config, options = parse(Options, arguments, "slurm", DESCRIPTION)
    from llava_tune.cluster import chain
    from llava_tune.cluster.site import load_site

    work_dir = (Path(options.run.work_dir) if options.run.work_dir else Path("work_dirs") / Path(config).stem).resolve()
    run = dataclasses.replace(options.run, work_dir=str(work_dir))
    names = ("partition", "cpu_partition", "account", "qos", "constraint", "time", "mem", "container")
    site = load_site(**{name: getattr(options, name) for name in names})
    job = _job(run, options, work_dir)
    _check(run, options, job)
    stages = chain.stages(run, job, site)
    chain.write_scripts(run, job, stages)
    if options.dry_run:
        for stage in stages:
            if stage.done:
                print(f"# {stage.name}: done already\n")
            else:
                print(f"# ---- {job.folder() / stage.name}.sbatch\n{stage.text}")
        return
    stages = chain.submit(job, stages)
    for before, stage in zip([None, *stages], stages, strict=False):
        if stage.done:
            print(f"{stage.name}: done already")
        else:
            after = f", after {before.name}" if before is not None and not before.done else ""
            print(f"{stage.name}: job {stage.job_id}{after}, log {job.log(stage.name)}")
    if options.watch and not chain.watch(job, stages, lambda line: print(line, flush=True)):
        raise SystemExit(EXIT_RUN_FAILED)


def _job(run: Run, options: Options, work_dir: Path) -> Job:
    from llava_tune.cluster.script import Job

    given = run.dataset.offline_processed_text_folder
    folders = {source.image_folder for source in run.dataset.all_sources()} or {run.dataset.image_folder}
    if options.stage and any(source.image_folder for source in run.dataset.sources):
        raise InputError(
            "--stage copies dataset.image_folder, and a data set of dataset.sources has a folder of its own, which training would read "
            "instead. Leave --stage away, or set dataset.image_folder for all"
        )
    trains_llm = not run.model.llm.freeze or bool(run.model.llm.lora.rank)
    return Job(
        name=work_dir.name,
        config=work_dir / "slurm" / "run.json",
        verb="finetune" if trains_llm else "pretrain",
        work_dir=work_dir,
        store=Path(given or options.save_folder or work_dir / "data").resolve(),
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        ranks_per_node=options.ranks_per_node or max(1, options.gpus_per_node),
        deepspeed=options.deepspeed,
        prepare_tasks=options.prepare_tasks,
        requeue=options.requeue,
        retries=options.retries,
        stage=options.stage,
        image_folder=next(iter(folders)),
        formats=options.export,
    )


def _check(run: Run, options: Options, job: Job) -> None:
    """What would fail on the cluster after waiting in the queue."""
    from llava_tune.config.shipped import deepspeed_config
    from llava_tune.train.run import accumulation_steps

    for name, value in (("--nodes", options.nodes), ("--prepare-tasks", options.prepare_tasks)):
        if value < 1:
            raise InputError(f"{name} is {value}; expected at least 1")
    if options.gpus_per_node and job.ranks_per_node != options.gpus_per_node:
        raise InputError(
            f"--ranks-per-node {job.ranks_per_node} with --gpus-per-node {options.gpus_per_node}: a rank has one GPU. Leave "
            "--ranks-per-node away"
        )
    accumulation_steps(run, options.nodes * job.ranks_per_node)
    if options.deepspeed:
        deepspeed_config(options.deepspeed)
    for source in run.dataset.all_sources():
        if not Path(source.data_path).exists() and "*" not in source.data_path:
            raise InputError(f"dataset.data_path {source.data_path}: no such file (seen from here)")
