"""The one error that a wrong input raises, and the exit codes of the command line."""

from __future__ import annotations

import os

EXIT_OK = 0
EXIT_RUN_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_REQUEUE = 75
"""A run stopped for a signal after saving (sysexits.h: EX_TEMPFAIL): start it again with --resume, it goes on."""

STOPPED_EXIT = "LLAVA_TUNE_EXIT_WHEN_STOPPED"
"""Environment variable: the exit code of such a run instead of EXIT_REQUEUE, for launchers that kill the other ranks at any but 0."""


class InputError(ValueError):
    """Something the user gave is wrong. The message says what was found, what was expected and what to do next.

    The command line prints the message alone and exits with code 2; a library user catches it as a ValueError.
    """


class SharedInputError(InputError):
    """A wrong input that every rank of a run finds alike, so that one of them says it."""


class RunFailed(RuntimeError):
    """A run can't go on, and the message says all there is to say: it is printed alone, with exit code 1."""


class SharedRunFailed(RunFailed):
    """A failure that every rank of a run finds alike, so that one of them says it."""


def launched_rank(arguments: list[str]) -> str:
    """This process's number among those that torchrun or srun started for one run, before they have met.

    Args:
        arguments: of the command line. Only --launcher slurm says that the tasks of a step are the ranks of a run; else each may have a
            command line of its own, and says itself what is wrong with it.
    """
    ranks = "SLURM_PROCID" if "slurm" in arguments or "--launcher=slurm" in arguments else "RANK"
    return os.environ.get("RANK", os.environ.get(ranks, "0"))


def missing_package(package: str, extra: str, why: str) -> InputError:
    """The error for an optional dependency that isn't installed, with the command that installs it."""
    return InputError(
        f"{why} needs the package {package!r}, which is not installed. Run: pip install 'llava-tune[{extra}]'"
    )
