"""`llava-tune VERB ...`: finds the verb's file and turns errors into one message and an exit code."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
import warnings

from llava_tune import __version__
from llava_tune.errors import (
    EXIT_BAD_INPUT,
    EXIT_OK,
    EXIT_RUN_FAILED,
    InputError,
    RunFailed,
    SharedInputError,
    SharedRunFailed,
    launched_rank,
)

VERBS = {
    "list-cfg": ("list_cfg", "[PATTERN]", "list the shipped recipes"),
    "copy-cfg": ("copy_cfg", "NAME FOLDER", "copy one of them to edit it"),
    "doctor": ("doctor", "CFG", "read all records and images, and say what would harm the run"),
    "prepare": ("prepare", "CFG --save-folder DIR", "tokenize the data ahead of training"),
    "inspect": ("inspect", "DIR|CFG [--html FILE]", "look at samples as the model will see them"),
    "plan": ("plan", "CFG --gpus N --gpu KIND", "memory, hours, disk and price of a run, before it is queued"),
    "pretrain": ("pretrain", "CFG [--deepspeed NAME]", "train the projector (stage 1)"),
    "finetune": ("finetune", "CFG [--deepspeed NAME]", "fine-tune (stage 2): full, LoRA or QLoRA"),
    "evaluate": ("evaluate", "CHECKPOINT --data FILE", "answer a question file and score the answers"),
    "export": (
        "export",
        "CHECKPOINT FOLDER [--format F]",
        "write it for transformers, llama.cpp, LLaVA's code or peft, proved there",
    ),
    "serve": ("serve", "CHECKPOINT|EXPORT [--port N]", "serve it with OpenAI's protocol through transformers serve"),
    "chat": ("chat", "MODEL [--image FILE] [--web]", "talk to a checkpoint, an export or another LLaVA"),
    "slurm": (
        "slurm",
        "CFG --nodes N --gpus-per-node G",
        "the whole run as a chain of Slurm jobs, requeued and watched",
    ),
    "preflight": ("preflight", "CFG [--launcher slurm]", "look at every node before training; name a bad one"),
    "why": ("why", "WORK_DIR", "why a run failed: the first error, its rank and host"),
    "demo": ("demo", "[--work-dir DIR]", "the whole road on a laptop CPU, in minutes"),
}


def usage() -> str:
    """The text of `llava-tune --help`."""
    width = max(len(f"{verb} {operands}") for verb, (_, operands, _) in VERBS.items())
    rows = "\n".join(f"  {f'{verb} {operands}':<{width}}  {what}" for verb, (_, operands, what) in VERBS.items())
    return (
        f"llava-tune {__version__}: train LLaVA models on data prepared once\n\n"
        f"usage: llava-tune VERB ...\n\n{rows}\n\n"
        "llava-tune VERB --help       the verb's options\n"
        "llava-tune pretrain CFG --help   every field of that config, with its meaning and value\n\n"
        "NPROC_PER_NODE=8 llava-tune pretrain CFG               8 processes through torchrun\n"
        "srun ... llava-tune pretrain CFG --launcher slurm      processes that Slurm started\n"
        "Exit codes: 0 done, 1 the run failed, 2 the input is wrong, 75 stopped by a signal after saving"
    )


def main() -> None:
    """Run a verb and exit."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        sys.exit(EXIT_OK if arguments else EXIT_BAD_INPUT)
    if arguments[0] in ("--version", "-V"):
        print(__version__)
        sys.exit(EXIT_OK)
    if arguments[0] not in VERBS:
        import difflib

        close = difflib.get_close_matches(arguments[0], VERBS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        _complain(f"{arguments[0]!r} is not a verb.{hint} `llava-tune --help` lists them")
        sys.exit(EXIT_BAD_INPUT)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _quiet_libraries()
    try:
        verb = importlib.import_module(f"llava_tune.cli.{VERBS[arguments[0]][0]}")
        verb.main(arguments[1:])
    except InputError as error:
        if not isinstance(error, SharedInputError) or launched_rank(sys.argv[1:]) == "0":
            _complain(str(error))
        sys.exit(EXIT_BAD_INPUT)
    except (TimeoutError, RunFailed) as error:
        if not isinstance(error, SharedRunFailed) or launched_rank(sys.argv[1:]) == "0":
            _complain(str(error))
        sys.exit(EXIT_RUN_FAILED)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _complain(f"{error}. Nothing half-written is left; make space and run the same command again: it goes on")
        sys.exit(EXIT_RUN_FAILED)
    except KeyboardInterrupt:
        _complain("interrupted")
        sys.exit(EXIT_RUN_FAILED)


_IDLE = ("Setting accelerator to CPU", "No CUDA runtime is found", "Gradient accumulation steps mismatch")


def _quiet_libraries() -> None:
    """What they warn of says nothing to a user here: names of theirs that will change, kernels of a GPU that isn't there, that
    the Trainer counts micro batches itself."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for name in ("DeepSpeed", "torch.utils.cpp_extension", "accelerate.accelerator"):  # which set their own levels
        logging.getLogger(name).addFilter(lambda record: not any(text in record.getMessage() for text in _IDLE))
    if not sys.warnoptions:
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")
        warnings.filterwarnings(
            "ignore", message="Grad strides do not match bucket view strides"
        )  # of one small convolution


def _complain(message: str) -> None:
    rank = launched_rank(sys.argv[1:])
    prefix = "error" if rank == "0" else f"error (rank {rank})"
    print(f"{prefix}: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
