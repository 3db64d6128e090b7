"""A look at the nodes before training: who didn't come, what differs, what is slow, is named."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_tune.cluster.preflight import Seen, verdict
from llava_tune.train.launch import free_port
from tests.conftest import Finished, Small


def seen(rank: int, **facts: object) -> Seen:
    return Seen(rank, f"node{rank}", 0, versions={"torch": "2.14.1"}, samples=10, clock=100.0, **facts)  # type: ignore[arg-type]


def test_what_differs_between_nodes_is_named() -> None:
    assert verdict([seen(0), seen(1)], []) == ([], [])
    other = seen(1)
    other.versions = {"torch": "2.13.0"}
    assert verdict([seen(0), other], [])[0] == [
        "rank 1 on node1 has other versions: torch 2.13.0 (rank 0 on node0: 2.14.1)"
    ]
    fewer = seen(1)
    fewer.samples = 9
    assert "rank 1 on node1 sees 9 samples, rank 0 10" in verdict([seen(0), fewer], [])[0]
    slow = [seen(r, compute=0.1, link=0.5 if r == 2 else 0.1) for r in range(4)]
    assert verdict(slow, []) == ([], ["rank 2 on node2 hands a message on 5.0 times slower than the median rank"])
    late = seen(1)
    late.clock = 300.0
    assert "clock of node1 is +200 s" in verdict([seen(0), late, seen(2)], [])[1][0]
    assert verdict([seen(0)], [1])[0][0].startswith("rank 1 did not come")


def start(small: Small, work_dir: Path, rank: int, address: str, port: int, *more: object) -> subprocess.Popen[str]:
    env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    env |= {"MASTER_ADDR": address, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "llava_tune.cli.main", "preflight", small.config, "--work-dir", work_dir]
    command += ["--launcher", "torchrun", "--patience", 60, *more]
    return subprocess.Popen([str(c) for c in command], env=env, stderr=subprocess.PIPE, text=True)


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 (::1 is no address of it)")
def test_two_ranks_over_ipv6(small: Small, tmp_path: Path) -> None:
    port = free_port()
    both = [start(small, tmp_path, rank, "::1", port) for rank in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert "preflight: all ranks are ready" in errors[0] and "preflight" not in errors[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_comes_hangs_nobody(small: Small, tmp_path: Path, rank: int) -> None:
    process = start(small, tmp_path, rank, "127.0.0.1", free_port(), "--patience", 3)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    expected = "error: rank 1 did not come" if rank == 0 else "can't reach rank 0 at 127.0.0.1 within 3 s"
    assert expected in error and "Traceback" not in error


def test_one_of_a_names_addresses_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with an IPv6 address that leads nowhere in front of one that does."""
    from llava_tune.cluster import preflight

    def both(host: str, port: int, type: int) -> list[tuple[object, ...]]:
        nowhere, here = ("2001:db8::1", port, 0, 0), ("127.0.0.1", port)
        return [(socket.AF_INET6, type, 0, "", nowhere), (socket.AF_INET, type, 0, "", here)]

    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(socket, "getaddrinfo", both)
        for rank in (0, 1):
            monkeypatch.setattr(preflight, "rank", lambda own=rank: own)
            preflight._until_reachable("node1", server.getsockname()[1], 0.0)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("address", ["no-such-host.invalid", "255.255.255.255"])
def test_an_address_that_leads_nowhere_is_said(small: Small, tmp_path: Path, rank: int, address: str) -> None:
    process = start(small, tmp_path, rank, address, free_port(), "--patience", 2)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert f"can't reach rank 0 at {address} within 2 s: [Errno " in error
    assert len(error.splitlines()) == 1, error


def test_data_that_is_not_there_is_named(small: Small, cli: Callable[..., Finished], tmp_path: Path) -> None:
    done = cli("preflight", small.config, "--work-dir", tmp_path, "--dataset.data-path", "/nowhere.json")
    assert done.code == 1
    assert "dataset.data_path /nowhere.json: not there" in done.err
    done = cli("preflight", small.config, "--work-dir", tmp_path, "--dataset.offline-processed-text-folder", tmp_path)
    assert done.code == 1 and "the prepared data:" in done.err
    store = tmp_path / "store"
    assert cli("prepare", small.config, "--save-folder", store).code == 0
    (tmp_path / "images").mkdir()
    given = ("--dataset.offline-processed-text-folder", store, "--dataset.image-folder", tmp_path / "images")
    done = cli("preflight", small.config, "--work-dir", tmp_path, *given)
    assert done.code == 1 and "images can't be used, such as" in done.err
