"""A training run from its config: data, model, Trainer, the end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_tune.config import Run
from llava_tune.errors import SharedInputError
from llava_tune.train.launch import Launcher, process_group, rank, set_rank_variables, world_size

if TYPE_CHECKING:
    from llava_tune.train.session import Trained


def accumulation_steps(run: Run, ranks: int) -> int:
    """Micro batches that add up to a global batch on each rank.

    Raises:
        InputError: the global batch is no multiple of ranks times micro batch.
    """
    training = run.training
    at_once = training.micro_batch_size * ranks
    if training.global_batch_size % at_once:
        raise SharedInputError(
            f"training.global_batch_size {training.global_batch_size} is not a multiple of {ranks} rank(s) x "
            f"training.micro_batch_size {training.micro_batch_size} = {at_once}. Change one of them"
        )
    return training.global_batch_size // at_once


def train(
    run: Run,
    *,
    name: str = "run",
    deepspeed: dict[str, Any] | None = None,
    launcher: Launcher = "none",
    resume: str | None = None,
) -> Trained:
    """Train as the config says; on several ranks, each calls this.

    Args:
        name: the work dir is work_dirs/<name> where the config names none.
        deepspeed: a DeepSpeed config, or None.
        launcher: who started the processes.
        resume: 'latest', a checkpoint's folder, or None.

    Raises:
        InputError: the config, data or checkpoint is wrong.
    """
    set_rank_variables(launcher, deepspeed is not None)
    accumulation = accumulation_steps(run, world_size())
    work_dir = Path(run.work_dir or Path("work_dirs") / name)
    store = get_ready(run)
    # From here on torch: the data was prepared without it, and before any collective.
    state = _fitting_state(resume, work_dir, deepspeed) if resume else None
    with process_group(deepspeed is not None):
        from llava_tune.train.session import run_session

        return run_session(run, store, work_dir, accumulation, deepspeed, resume, state)


def _fitting_state(resume: str, work_dir: Path, deepspeed: dict[str, Any] | None) -> Path | None:
    """See `resharded`; the DeepSpeed config says so if another folder is to be read."""
    from llava_tune.train.checkpoint import find_resume
    from llava_tune.train.reshard import resharded

    checkpoint = find_resume(resume, work_dir)
    if checkpoint is None:
        return None
    state = resharded(checkpoint, work_dir, deepspeed, world_size(), speak=rank() == 0)
    if state is not None and deepspeed is not None:
        deepspeed["checkpoint"] = {**deepspeed.get("checkpoint", {}), "load_universal": True}
    return state


def get_ready(run: Run) -> Path:
    """All that needs no other rank: the language model converted, the data prepared. Returns the store's folder.

    Raises:
        InputError: the model or the data is wrong.
    """
    from llava_tune.train.data import ready_store

    _ready_model(run)
    return ready_store(run)


def _ready_model(run: Run) -> None:
    """Convert an InternLM2 checkpoint into the cache, on one rank of each node, before the ranks meet."""
    from llava_tune.model import internlm2

    folder = Path(run.model.llm.name)
    if not folder.is_dir() or not internlm2.is_internlm2(folder) or run.model.llm.weights == "random":
        return
    from llava_tune.train.waiting import once

    target = internlm2.converted_folder(folder)
    once(
        lock=target.with_suffix(".lock"),
        is_done=target.is_dir,
        work=lambda: _convert(folder),
        progress=lambda: str(sum(f.stat().st_size for f in target.parent.glob(f".{target.name}*/*"))),
        what=f"{folder} to be converted",
        speak=rank() == 0,
    )


def _convert(folder: Path) -> None:
    from llava_tune.model import internlm2

    print(f"converting {folder} from InternLM2's layout to Llama's, once, into the cache", file=sys.stderr, flush=True)
    internlm2.convert(folder)
