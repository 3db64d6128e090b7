"""A look at every node before training: what each rank sees is put together, and a bad node is named."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

from llava_tune.config import Run
from llava_tune.data.dataset import LlavaDataset
from llava_tune.data.images import image_transform
from llava_tune.data.mix import image_folders
from llava_tune.data.store import open_store, read_manifest
from llava_tune.errors import InputError, RunFailed
from llava_tune.train.data import is_foreign
from llava_tune.train.launch import collective_timeout, rank, world_size

GIB = 2**30
IMAGES = 20
"""Images that each rank opens."""
_MESSAGE = 16 << 20
_SLOW = 2.0
"""A rank that takes this many times the median is called slow."""
_CLOCK = 30.0
"""Seconds that a clock may be off; the ranks don't look at quite the same moment."""
_PACKAGES = ("llava-tune", "torch", "transformers", "accelerate", "deepspeed", "peft", "numpy")


@dataclass
class Seen:
    """What one rank saw.

    Attributes:
        gpu: its name; '' on a CPU.
        versions: of the packages that must be the same everywhere.
        problems: that would harm the run.
        samples, images: of the prepared data; opened and whole.
        disk, shm: free bytes of the work dir and of /dev/shm.
        clock: its time, seconds.
        compute, link: seconds for a product of matrices, and for a message to the next rank.
    """

    rank: int
    host: str
    local_rank: int
    gpu: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    samples: int = 0
    images: int = 0
    disk: int = 0
    shm: int = 0
    clock: float = 0.0
    compute: float = 0.0
    link: float | None = None


def look(run: Run, work_dir: Path) -> Seen:
    """What this rank sees by itself."""
    seen = Seen(rank(), socket.gethostname(), int(os.environ.get("LOCAL_RANK", "0")))
    if "SLURMD_NODENAME" in os.environ:
        seen.host = os.environ["SLURMD_NODENAME"]
    for package in _PACKAGES:
        try:
            seen.versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    _look_at_device(seen)
    _look_at_data(run, seen)
    work_dir.mkdir(parents=True, exist_ok=True)
    probe = work_dir / f".preflight-{seen.rank}"
    try:
        probe.write_bytes(b"x")
        probe.unlink()
        seen.disk = shutil.disk_usage(work_dir).free
    except OSError as error:
        seen.problems.append(f"{work_dir} can't be written: {error.strerror}")
    shm = Path("/dev/shm")
    seen.shm = shutil.disk_usage(shm).free if shm.is_dir() else 0
    if run.dataset.num_workers and seen.shm < 256 << 20:
        seen.problems.append(
            f"/dev/shm has {seen.shm / 2**20:.0f} MiB free; data workers hand batches over there (256 MiB are wanted)"
        )
    return seen


def _look_at_device(seen: Seen) -> None:
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if seen.local_rank >= count:
            seen.problems.append(
                f"{count} GPU(s) for local rank {seen.local_rank}: as many tasks as GPUs on a node are wanted"
            )
            return
        device = torch.device("cuda", seen.local_rank)
        seen.gpu = torch.cuda.get_device_name(device)
        free, total = torch.cuda.mem_get_info(device)
        if free < 0.9 * total:
            seen.problems.append(
                f"GPU {seen.local_rank} has {free / GIB:.1f} of {total / GIB:.1f} GiB free: another process is on it"
            )
    else:
        device = torch.device("cpu")
        if os.environ.get("SLURM_GPUS_ON_NODE", "0").split("(")[0] not in ("", "0") and shutil.which("nvidia-smi"):
            seen.problems.append(
                "Slurm gave GPUs, and PyTorch sees none: the driver, or PyTorch's CUDA build, is wrong"
            )
    try:
        size = 4096 if device.type == "cuda" else 512
        matrix = torch.ones(size, size, device=device)
        times = []
        for _ in range(4):
            began = time.perf_counter()
            float((matrix @ matrix)[0, 0])
            times.append(time.perf_counter() - began)
        seen.compute = min(times)
    except RuntimeError as error:
        seen.problems.append(f"{device} can't compute: {str(error).splitlines()[0]}")


def _look_at_data(run: Run, seen: Seen) -> None:
    store = run.dataset.offline_processed_text_folder
    if store is None:
        for source in run.dataset.all_sources():
            if not Path(source.data_path).exists() and "*" not in source.data_path:
                seen.problems.append(f"dataset.data_path {source.data_path}: not there")
        return
    if is_foreign(run, Path(store)):  # another program's: what is in it is checked as training opens it
        if not Path(store).is_dir():
            seen.problems.append(f"the prepared data {store}: not there")
        return
    try:
        rows = open_store(Path(store))
        seen.samples = len(rows)
        manifest = read_manifest(Path(store))
    except (InputError, OSError) as error:
        seen.problems.append(f"the prepared data: {error}")
        return
    if not manifest["images"]:
        return
    try:
        transform = image_transform(run.model.vision, run.dataset.pad_image_to_square)
        dataset = LlavaDataset(Path(store), image_folders(run.dataset, manifest), transform)
    except InputError as error:
        seen.problems.append(str(error))
        return
    bad: list[str] = []
    opened = 0
    step = max(1, len(dataset) // (IMAGES * world_size()))
    for row in range(min(seen.rank * step, len(dataset) - 1), len(dataset), step * world_size()):
        sample = dataset.sample(row)
        opened += len(sample.pixel_values)
        bad += [sample.bad_image] if sample.bad_image else []
        if opened >= IMAGES:
            break
    seen.images = opened - len(bad)
    if len(bad) > max(1, run.dataset.max_bad_share * opened):
        seen.problems.append(f"{len(bad)} of {opened} images can't be used, such as {bad[0]}")


def put_together(
    seen: Seen, patience: float, turn: int, judge: Callable[[list[Seen], list[int]], bool]
) -> tuple[list[Seen], list[int], bool]:
    """(all ranks' findings, the ranks that said nothing within `patience` seconds, whether it is good); elsewhere than on rank 0, which
    judges, the lists are empty.

    Over a store that rank 0 holds, without a collective: a rank that never comes hangs nobody.

    Args:
        turn: counts these calls; each has a port of its own.
    """
    import torch.distributed as dist

    seen.clock = time.time()
    if world_size() == 1:
        return [seen], [], judge([seen], [])
    everyone = [f"seen-{r}" for r in range(world_size())]
    wait = timedelta(seconds=patience)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + turn
    try:
        _until_reachable(address, port, patience)
        store = dist.TCPStore(address, port, is_master=rank() == 0, timeout=wait, wait_for_workers=False)
        store.set(f"seen-{rank()}", json.dumps(asdict(seen)))
        if rank():
            store.wait(["verdict"], 2 * wait)
            good = store.get("verdict") == b"good"
            store.set(f"heard-{rank()}", "1")
            return [], [], good
    except (RuntimeError, OSError) as error:
        message = str(error).splitlines()[0]
        raise RunFailed(
            f"rank {seen.rank} on {seen.host} can't reach rank 0 at {address} within {patience:.0f} s: {message}"
        ) from error
    _until(lambda: store.check(everyone), patience)
    came = [r for r in range(world_size()) if store.check([f"seen-{r}"])]
    found = [Seen(**json.loads(store.get(f"seen-{r}"))) for r in came]
    absent = [r for r in range(world_size()) if r not in came]
    good = judge(found, absent)
    store.set("verdict", "good" if good else "bad")
    _until(lambda: store.check([f"heard-{r}" for r in came if r]), 10)  # the store goes with this process
    return found, absent, good


def _until_reachable(address: str, port: int, seconds: float) -> None:
    """Wait until rank 0 listens; on rank 0 itself, until there is a way to its own address. TCPStore alone would wait twice as long as it is
    told, print a trace each time, and not say why.

    Raises:
        OSError: it didn't come to that.
    """
    kind = socket.SOCK_STREAM if rank() else socket.SOCK_DGRAM  # a datagram socket "connects" without a word sent
    deadline = time.monotonic() + seconds
    while True:
        try:
            problem = OSError("it has no address")
            for family, _, _, _, where in socket.getaddrinfo(address, port, type=kind):
                with socket.socket(family, kind) as probe:
                    probe.settimeout(max(1.0, deadline - time.monotonic()))
                    try:
                        probe.connect(where)
                        return
                    except OSError as error:  # a name may have an address that leads nowhere, and another one
                        problem = error
        except OSError as error:
            problem = error
        if time.monotonic() > deadline:
            raise problem
        time.sleep(0.2)


def _until(true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not true():
        time.sleep(0.05)


def time_links(seen: Seen) -> None:
    """Seconds for a message from each rank to the next, all at once; two rounds, the better counts."""
    import torch
    import torch.distributed as dist

    size = world_size()
    if size == 1:
        return
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=collective_timeout())
    device = torch.device("cuda", seen.local_rank) if on_gpu else torch.device("cpu")
    ours, theirs = torch.ones(_MESSAGE // 4, device=device), torch.empty(_MESSAGE // 4, device=device)
    times = []
    for _ in range(3):
        dist.barrier()
        began = time.perf_counter()
        messages = [
            dist.P2POp(dist.isend, ours, (rank() + 1) % size),
            dist.P2POp(dist.irecv, theirs, (rank() - 1) % size),
        ]
        for request in dist.batch_isend_irecv(messages):
            request.wait()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    seen.link = min(times[1:])
    dist.destroy_process_group()


def verdict(found: list[Seen], absent: list[int]) -> tuple[list[str], list[str]]:
    """(what ends the run, what is only said), each line naming the rank and its host."""
    errors = [
        f"rank {r} did not come: its node is down, or can't reach {os.environ.get('MASTER_ADDR', 'rank 0')}"
        for r in absent
    ]
    notes: list[str] = []
    for seen in found:
        errors += [f"rank {seen.rank} on {seen.host}: {problem}" for problem in seen.problems]
    if not found:
        return errors, notes
    first = found[0]
    for seen in found[1:]:
        other = {k: v for k, v in seen.versions.items() if first.versions.get(k) != v}
        if other:
            known = ", ".join(
                f"{k} {v} (rank {first.rank} on {first.host}: {first.versions.get(k)})" for k, v in other.items()
            )
            errors.append(f"rank {seen.rank} on {seen.host} has other versions: {known}")
        if seen.samples != first.samples and not seen.problems and not first.problems:
            errors.append(
                f"rank {seen.rank} on {seen.host} sees {seen.samples:,} samples, rank {first.rank} {first.samples:,}"
            )
        if seen.gpu != first.gpu:
            notes.append(
                f"rank {seen.rank} on {seen.host} has {seen.gpu or 'no GPU'}, rank {first.rank} {first.gpu or 'none'}"
            )
    clock = statistics.median(s.clock for s in found)
    for seen in found:
        if abs(seen.clock - clock) > _CLOCK:
            notes.append(
                f"the clock of {seen.host} is {seen.clock - clock:+.0f} s off: log lines of nodes can't be compared"
            )
    for what, values in (
        ("computes", {s.rank: s.compute for s in found if s.compute}),
        ("hands a message on", {s.rank: s.link for s in found if s.link is not None}),
    ):
        middle = statistics.median(values.values()) if values else 0.0
        for r, seconds in values.items():
            if len(values) > 2 and seconds > _SLOW * middle:
                host = next(s.host for s in found if s.rank == r)
                notes.append(f"rank {r} on {host} {what} {seconds / middle:.1f} times slower than the median rank")
    return errors, notes
