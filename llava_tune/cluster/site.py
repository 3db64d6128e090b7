"""What is the same for every job on a site: partitions, accounts, modules, containers; from one TOML file."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydantic
from pydantic import ConfigDict, PositiveInt
from pydantic.dataclasses import dataclass

from llava_tune.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Site:
    """Fields of slurm.toml; each can be given on the command line too.

    Attributes:
        partition, cpu_partition: of GPU jobs, and of preparing (None: the same).
        account, qos, constraint: as sbatch has them.
        time, cpu_time: limits of a GPU job and of a preparing task, as sbatch writes them.
        signal_seconds: how long before the limit training is told to save.
        cpus_per_task: cores of a training rank.
        prepare_cpus: cores of a preparing task.
        mem: memory of a node, as sbatch writes it; None: the partition's default.
        modules: loaded in each job.
        setup: shell lines run in each job before the command, such as one that activates an environment.
        container: a command in front of ours, such as "apptainer exec --nv /images/llava.sif".
        python: the interpreter that has llava-tune; None: the one that submits.
        sbatch, srun: more options of each, such as "--exclusive" or "--container-image=...".
        env: variables set in each job.
    """

    partition: str | None = None
    cpu_partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = None
    cpu_time: str | None = None
    signal_seconds: PositiveInt = 120
    cpus_per_task: PositiveInt = 8
    prepare_cpus: PositiveInt = 16
    mem: str | None = None
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    container: str | None = None
    python: str | None = None
    sbatch: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()


def site_file() -> Path:
    """LLAVA_TUNE_SLURM_CONFIG, else llava-tune/slurm.toml in the user's config folder (XDG_CONFIG_HOME or ~/.config)."""
    if given := os.environ.get("LLAVA_TUNE_SLURM_CONFIG"):
        return Path(given)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "llava-tune" / "slurm.toml"


def load_site(path: Path | None = None, **given: Any) -> Site:
    """The site's file, if there is one, with what is given (and not None) in its place.

    Raises:
        InputError: the file is no TOML, or a field is misspelt or of a wrong type.
    """
    path = path or site_file()
    fields: dict[str, Any] = {}
    if path.is_file():
        try:
            fields = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not valid TOML: {error}") from error
    if isinstance(fields.get("env"), dict):
        fields["env"] = [(name, str(value)) for name, value in fields["env"].items()]
    try:
        site = pydantic.TypeAdapter(Site).validate_python(fields)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        known = ", ".join(Site.__dataclass_fields__)
        raise InputError(f"{path}: {name}: {first['msg']}. Its fields are {known}") from error
    return replace(site, **{name: value for name, value in given.items() if value is not None})
