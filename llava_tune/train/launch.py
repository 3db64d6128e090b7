"""How processes start and find one another: torchrun through NPROC_PER_NODE, Slurm's variables, or one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal
from uuid import uuid4

from llava_tune.errors import InputError, SharedInputError, missing_package

Launcher = Literal["none", "torchrun", "slurm"]


def processes_to_start() -> int:
    """How many processes NPROC_PER_NODE and NNODES ask for in all; 0 if it asks for none, or they run already.

    Raises:
        InputError: they are no numbers, or several nodes have no ADDR to meet at.
    """
    if "NPROC_PER_NODE" not in os.environ or "RANK" in os.environ:
        return 0
    given = {name: os.environ.get(name, "1") for name in ("NPROC_PER_NODE", "NNODES")}
    for name, value in given.items():
        if not value.isdigit() or value == "0":
            raise InputError(
                f"{name} is {value!r}; expected a number of {'processes' if name[1] == 'P' else 'nodes'}, such as 8"
            )
    for name in ("NODE_RANK", "PORT", "MAX_RESTARTS"):
        if not os.environ.get(name, "0").isdigit():
            raise InputError(f"{name} is {os.environ[name]!r}; expected a number, 0 or more")
    if given["NNODES"] != "1" and "ADDR" not in os.environ:
        raise InputError(
            f"NNODES is {given['NNODES']}, but ADDR is not set: the nodes meet at the address of the one with NODE_RANK=0. Start on "
            "each of them: NNODES=2 NODE_RANK=0 (or 1) ADDR=host0 PORT=29500 NPROC_PER_NODE=8 llava-tune ..."
        )
    return int(given["NPROC_PER_NODE"]) * int(given["NNODES"])


def relaunch_under_torchrun(arguments: list[str]) -> None:
    """Become torchrun with the processes that NPROC_PER_NODE asks for.

    NNODES, NODE_RANK, ADDR, PORT and MAX_RESTARTS mean what torchrun's --nnodes, --node-rank, --master-addr, --master-port and
    --max-restarts mean. With MAX_RESTARTS the nodes meet at ADDR:PORT (c10d) each time anew.
    """
    env = os.environ
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", env["NPROC_PER_NODE"]]
    command += ["--nnodes", env.get("NNODES", "1"), "--max-restarts", env.get("MAX_RESTARTS", "0")]
    if env.get("NNODES", "1") == "1":
        # What --standalone does, by address: there are machines that don't know the name localhost.
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{env.get('PORT', '0')}"]
        command += ["--rdzv-id", uuid4().hex, "--local-addr", "127.0.0.1"]
    elif env.get("MAX_RESTARTS", "0") != "0":
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{env['ADDR']}:{env.get('PORT', '29500')}"]
    else:
        options = {"NODE_RANK": "--node-rank", "ADDR": "--master-addr", "PORT": "--master-port"}
        command += [part for name, flag in options.items() if name in env for part in (flag, env[name])]
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(env["NPROC_PER_NODE"]))))
    os.execv(sys.executable, [*command, "-m", "llava_tune.cli.main", *arguments])


def set_rank_variables(launcher: Launcher, deepspeed: bool) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT where the launcher doesn't and somebody asks for them.

    Raises:
        InputError: the launcher's variables are missing.
    """
    if launcher == "slurm":
        _from_slurm()
    elif launcher == "torchrun" and "RANK" not in os.environ:
        raise InputError(
            "--launcher torchrun, but torchrun started no process (RANK is not set). Use NPROC_PER_NODE=N llava-tune ..., or "
            "torchrun --nproc-per-node N -m llava_tune.cli.main ..."
        )
    elif deepspeed and "RANK" not in os.environ:
        # One process: DeepSpeed asks for MPI unless all of these are set.
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _from_slurm() -> None:
    needed = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID")
    missing = [v for v in needed if v not in os.environ]
    if missing:
        raise InputError(
            f"--launcher slurm, but {', '.join(missing)} is not set: not inside a Slurm step. Start it with srun: "
            "srun --ntasks-per-node=GPUS llava-tune pretrain CFG --launcher slurm"
        )
    env = os.environ
    env.update(RANK=env["SLURM_PROCID"], WORLD_SIZE=env["SLURM_NTASKS"], LOCAL_RANK=env["SLURM_LOCALID"])
    env.setdefault("LOCAL_WORLD_SIZE", str(_tasks_here()))
    env.setdefault("MASTER_ADDR", _slurm_master())
    env.setdefault(
        "MASTER_PORT", str(20000 + (int(env["SLURM_JOB_ID"]) * 7 + int(env.get("SLURM_STEP_ID", "0"))) % 20000)
    )


def _tasks_here() -> int:
    """Tasks of the step on this node, from a list such as 2(x3),1 of all its nodes."""
    text = os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_NTASKS_PER_NODE") or "1"
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    node = int(os.environ.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else counts[0]


def own_device(local_rank: int, ranks_here: int, devices: int) -> int:
    """Which of the GPUs that it sees a rank takes.

    Raises:
        InputError: there are more ranks on the node than GPUs.
    """
    if devices >= ranks_here:
        return local_rank
    if devices == 1 and any(f"SLURM_{name}" in os.environ for name in ("GPUS_PER_TASK", "GPU_BIND", "TRES_PER_TASK")):
        return 0  # Slurm shows each task its own
    raise SharedInputError(
        f"{ranks_here} ranks on a node that shows {devices} GPU(s): each rank needs its own. Start as many tasks as GPUs: "
        "srun --ntasks-per-node=GPUS --gpus-per-node=GPUS, or NPROC_PER_NODE=GPUS"
    )


def _slurm_master() -> str:
    """An address of the step's first node that resolves: its name, or what Slurm knows as its NodeAddr."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    first = _scontrol("show", "hostnames", nodes).split()[0]
    try:
        socket.getaddrinfo(first, None)
        return first
    except socket.gaierror:
        fields = dict(f.split("=", 1) for f in _scontrol("show", "node", first).split() if "=" in f)
        return fields.get("NodeAddr", first)


def _scontrol(*arguments: str) -> str:
    try:
        return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(
            f"--launcher slurm: scontrol {' '.join(arguments)} failed ({error}). Set MASTER_ADDR yourself"
        ) from error


def was_restarted() -> bool:
    """Whether torchrun started the processes again after one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0


def rank() -> int:
    """This process's number among all."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def collective_timeout() -> timedelta:
    """How long a collective may wait for a rank: LLAVA_TUNE_COLLECTIVE_TIMEOUT seconds, else 30 minutes."""
    return timedelta(seconds=float(os.environ.get("LLAVA_TUNE_COLLECTIVE_TIMEOUT", "1800")))


@contextmanager
def process_group(deepspeed: bool) -> Iterator[None]:
    """Be together with the other ranks while the block runs. Data is prepared before this, so that no rank waits for it inside a
    collective. After a block that ends well the group is left in order: its threads would else abort the process as it ends.

    Raises:
        InputError: DeepSpeed is asked for and not installed.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        device = own_device(int(os.environ.get("LOCAL_RANK", "0")), ranks_here, torch.cuda.device_count())
        os.environ["LOCAL_RANK"] = str(device)  # the Trainer and DeepSpeed look there
        torch.cuda.set_device(device)
    there_before = torch.distributed.is_initialized()
    if was_restarted() and not there_before:
        _meet_again("nccl" if on_gpu else "gloo")
    if deepspeed:
        _require_deepspeed()
        import deepspeed as ds

        # Before TrainingArguments: ZeRO-3 partitions weights while they load, and needs the group for that.
        ds.init_distributed(dist_backend="nccl" if on_gpu else "gloo", timeout=collective_timeout(), verbose=False)
    elif world_size() > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=collective_timeout())
    yield
    if torch.distributed.is_initialized() and not there_before:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _meet_again(backend: str) -> None:
    """Make the process group after a restart of torchrun's, under keys of its own in the agent's store: PyTorch 2.14 finds the addresses
    there of processes that have ended ("connection refused")."""
    from torch.distributed import PrefixStore, TCPStore, init_process_group

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = TCPStore(address, port, is_master=False, timeout=collective_timeout())
    store = PrefixStore(f"llava_tune/restart-{os.environ['TORCHELASTIC_RESTART_COUNT']}", agent)
    init_process_group(backend, store=store, rank=rank(), world_size=world_size(), timeout=collective_timeout())


def _require_deepspeed() -> None:
    import importlib.util
    import shutil
    from pathlib import Path

    if importlib.util.find_spec("deepspeed") is None:
        raise missing_package("deepspeed", "deepspeed", "--deepspeed")
    os.environ["PATH"] = (
        f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # ninja of this environment
    )
    if shutil.which("ninja") is None:
        raise missing_package("ninja", "deepspeed", "--deepspeed compiles its parts, which")
    if shutil.which("g++") is None and shutil.which("c++") is None:
        raise InputError(
            "--deepspeed compiles its parts when first used, which needs a C++ compiler. Run: apt-get install g++"
        )
