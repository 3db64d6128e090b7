"""Command lines run by processes that have the libraries imported already: each is forked here, and is else a process of its own, with its
environment, folder, output and end. (Importing takes two thirds of a short run.)

As a program: reads requests from stdin, a JSON object a line (arguments, env, cwd, out, err), and answers each with the process's number
and, when it has ended, its exit code.
"""

from __future__ import annotations

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

    def run(self, arguments: list[str], env: dict[str, str], timeout: float) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of `llava-tune ARGUMENTS`.

        Raises:
            subprocess.TimeoutExpired: it took longer, and was killed.
        """
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder) / "out", Path(folder) / "err"
            request = {"arguments": arguments, "env": env, "cwd": str(Path.cwd()), "out": str(out), "err": str(err)}
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            child = int(self._process.stdout.readline())
            if not select.select([self._process.stdout], [], [], timeout)[0]:
                os.killpg(child, signal.SIGKILL)
                self._process.stdout.readline()
                raise subprocess.TimeoutExpired(arguments, timeout, out.read_bytes(), err.read_bytes())
            code = int(self._process.stdout.readline())
            return code, out.read_text(), err.read_text()

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _fork_for_each_request() -> dict[str, Any]:
    """Returns in the children, with their request; ends the program when there are no more."""
    while line := os.read(0, 1 << 20):
        while not line.endswith(b"\n"):
            line += os.read(0, 1 << 20)
        child = os.fork()
        if child == 0:
            request: dict[str, Any] = json.loads(line)
            return request
        os.write(1, b"%d\n" % child)
        os.write(1, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
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
    request = _fork_for_each_request()
    os.setsid()
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    for number, name in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        opened = os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    sys.argv[1:] = request["arguments"]
    import llava_tune.cli.main as program

    sys.argv[0] = program.__file__
    program.main()


if __name__ == "__main__":
    _main()
