"""Command lines run by processes that have the libraries imported already: each is forked here, and is else a process of its own, with its
environment, folder, output and end. (Importing takes two thirds of a short run.)

As a program: reads requests from stdin, a JSON object a line (arguments, envs, cwd, folder), starts a process for each of the environments,
and answers with their numbers and, when all have ended, their exit codes. Each writes to FOLDER/out-N and FOLDER/err-N.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


class Warm:
    """The process to fork from, as seen by the tests."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, "-m", "tests.warm"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=Path(__file__).parents[1]
        )

    def run(self, arguments: list[str], envs: list[dict[str, str]], timeout: float) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of `llava-tune ARGUMENTS`, in a process for each environment; of several, the first code that isn't 0
        and all that they wrote.

        Raises:
            subprocess.TimeoutExpired: they took longer, and were killed.
        """
        with tempfile.TemporaryDirectory() as folder:
            request = {"arguments": arguments, "envs": envs, "cwd": str(Path.cwd()), "folder": folder}
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            children = json.loads(self._process.stdout.readline())
            in_time = bool(select.select([self._process.stdout], [], [], timeout)[0])
            for child in () if in_time else children:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
            codes = json.loads(self._process.stdout.readline())
            out, err = (
                "".join(path.read_text() for path in sorted(Path(folder).glob(f"{n}-*"))) for n in ("out", "err")
            )
            if not in_time:
                raise subprocess.TimeoutExpired(arguments, timeout, out, err)
            return next((code for code in codes if code), 0), out, err

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _fork_for_each_request() -> tuple[int, dict[str, Any]]:
    """Returns in the children, with their number and request; ends the program when there are no more."""
    while line := sys.stdin.buffer.readline():
        request: dict[str, Any] = json.loads(line)
        children = []
        for number in range(len(request["envs"])):
            if (child := os.fork()) == 0:
                os.setsid()
                return number, request
            children.append(child)
        os.write(1, f"{children}\n".encode())
        codes: dict[int, int] = {}
        while len(codes) < len(children):
            child, status = os.wait()
            codes[child] = os.waitstatus_to_exitcode(status)
            for other in children if codes[child] else ():  # as torchrun does
                if other not in codes:
                    os.killpg(other, signal.SIGTERM)
        os.write(1, f"{list(codes.values())}\n".encode())
    sys.exit(0)


def _main() -> None:
    import llava_tune.evaluate.run
    import llava_tune.export.run
    import llava_tune.train.session  # noqa: F401

    names = [(thread / "comm").read_text().strip() for thread in Path("/proc/self/task").iterdir()]
    names = [
        name for name in names if name != "jemalloc_bg_thd"
    ]  # pyarrow's allocator, which starts it again after a fork
    assert len(names) == 1, f"{names}: a forked process would have only the first of these threads"
    gc.freeze()  # else each collection copies the pages of all libraries
    number, request = _fork_for_each_request()
    os.environ.clear()
    os.environ.update(request["envs"][number])
    os.chdir(request["cwd"])
    for stream, name in enumerate(
        (os.devnull, f"{request['folder']}/out-{number}", f"{request['folder']}/err-{number}")
    ):
        opened = os.open(name, os.O_RDWR if stream == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, stream)
        os.close(opened)
    sys.argv[1:] = request["arguments"]
    import llava_tune.cli.main as program

    sys.argv[0] = program.__file__
    program.main()


if __name__ == "__main__":
    _main()
