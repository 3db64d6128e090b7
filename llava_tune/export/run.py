"""Export a checkpoint: write it beside, let another program prove it, then give it its name."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from llava_tune.errors import InputError, RunFailed
from llava_tune.evaluate.answer import Answerer
from llava_tune.export import gate
from llava_tune.export.hf import write_hf
from llava_tune.export.weights import merge_adapters, round_weights
from llava_tune.paths import whole_folder

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Job:
    """An export under way.

    Attributes:
        answerer: the model in fp32, adapters and all.
        beside: the folder to fill; it gets its name, `final`, when the gate is passed.
        final: that name.
        temporary: a folder for what is not kept.
        dtype: of the weights, as the user names it.
        images: pictures for the gate; none for a model without a vision tower.
    """

    answerer: Answerer
    beside: Path
    final: Path
    temporary: Path
    dtype: str
    images: list[Path]

    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def ours(self, asked: list[gate.Conversation], *, merge: bool) -> list[gate.Answer]:
        """What our model answers; afterwards its adapters are merged, and it is rounded to the weights that are written.

        In fp32 the proof is against the model as it was trained, adapters and all; what bf16 rounds away is taken from both.
        """
        exact = self.dtype == "fp32"
        ours = [gate.ask_ours(self.answerer, one) for one in asked] if exact else []
        if merge:
            merge_adapters(self.answerer.llava)
        if not exact:
            round_weights(self.answerer.llava, self.torch_dtype())
            ours = [gate.ask_ours(self.answerer, one) for one in asked]
        return ours

    def check(self, failures: list[str]) -> None:
        """
        Raises:
            RunFailed: there are any.
        """
        if failures:
            raise RunFailed(
                f"the export failed its gate, so {self.final} was not written: {'; '.join(failures)}. Please report this"
            )


def _hf(job: Job) -> str:
    asked = gate.conversations(job.images)
    ours = job.ours(asked, merge=True)
    write_hf(job.answerer, job.beside, job.torch_dtype())
    image_id = json.loads((job.beside / "config.json").read_text()).get("image_token_index")
    return _prove(job, ours, asked, image_id, "opened.py", "transformers")


def _adapter(job: Job) -> str:
    from llava_tune.export.adapter import BASE, write_adapter

    asked = gate.conversations(job.images)
    if job.answerer.llava.vision is not None:
        merge_adapters(job.answerer.llava.vision)
    ours = job.ours(asked, merge=False)
    write_adapter(job.answerer, job.beside, job.torch_dtype())
    image_id = json.loads((job.beside / BASE / "config.json").read_text()).get("image_token_index")
    return _prove(job, ours, asked, image_id, "opened.py", "transformers and peft")


def _llava(job: Job) -> str:
    from llava_tune.constants import IMAGE_TOKEN_INDEX
    from llava_tune.export.llava_layout import write_llava

    asked = gate.conversations(job.images)
    ours = job.ours(asked, merge=True)
    write_llava(job.answerer, job.beside, job.final, job.torch_dtype())
    config = json.loads((job.beside / "config.json").read_text())
    final = config["mm_vision_tower"]
    # The tower is found by its path: where it lies now, for the gate.
    (job.beside / "config.json").write_text(
        json.dumps(config | {"mm_vision_tower": str(job.beside.resolve() / "vision_tower")})
    )
    said = _prove(job, ours, asked, IMAGE_TOKEN_INDEX, "opened_llava.py", "LLaVA's own code")
    (job.beside / "config.json").write_text(json.dumps(config | {"mm_vision_tower": final}, indent=1))
    return said


def _prove(
    job: Job, ours: list[gate.Answer], asked: list[gate.Conversation], image_id: int | None, program: str, name: str
) -> str:
    theirs = gate.ask_folder(job.beside, asked, job.temporary, program)
    report = gate.compare(ours, theirs, image_id, job.answerer.layout.stop_ids)
    job.check(report.failures())
    gate.write_report(job.beside, report, job.torch_dtype())
    return gate.sentence(report, name)


def _gguf(job: Job) -> str:
    from llava_tune.export import gate_llama_cpp
    from llava_tune.export.gguf import rounded, write_gguf

    answerer = job.answerer
    merge_adapters(answerer.llava)
    write_gguf(answerer, job.beside, job.dtype)
    if job.dtype != "fp32":  # what the file's precision rounds away is taken from ours, too
        for parameter in answerer.llava.parameters():
            parameter.data = rounded(parameter.data, job.dtype)
    squares = [gate_llama_cpp.write_square(image, answerer.transform.size, job.temporary) for image in job.images]
    asked = gate.conversations(squares)
    found = gate_llama_cpp.ask_llama_cpp(job.beside, asked, job.temporary, gate_llama_cpp.context(answerer, asked))
    report = gate_llama_cpp.compare(answerer, asked, found)
    job.check(report.failures(job.dtype))
    gate_llama_cpp.write_report(job.beside, report, job.dtype)
    return gate_llama_cpp.sentence(report)


@dataclass(frozen=True)
class Format:
    """A format to export to.

    Attributes:
        run: writes and proves it; returns what the gate found, as a sentence.
        dtypes: that it can be written in, the default first.
        packages: (import name, what installs it) that the gate needs beside our own dependencies.
    """

    run: Callable[[Job], str]
    dtypes: tuple[str, ...]
    packages: tuple[tuple[str, str], ...] = ()


FORMATS = {
    "hf": Format(_hf, ("bf16", "fp32")),
    "gguf": Format(
        _gguf,
        ("fp16", "fp32", "q8_0"),
        (("gguf", "'llava-tune[gguf]'"), ("xllamacpp", "'llava-tune[gguf]'")),
    ),
    "llava": Format(_llava, ("bf16", "fp32"), (("llava", "--no-deps llava-torch"),)),
    "adapter": Format(_adapter, ("bf16", "fp32")),
}


def export(
    checkpoint: Path, folder: Path, *, format: str = "hf", dtype: str | None = None, images: list[Path] | None = None
) -> str:
    """Write `folder`, which another program opens; it is there only if what that program computes is what we compute.

    Args:
        format: a name of FORMATS.
        dtype: of the weights; None: the format's default.
        images: pictures for the gate; none: drawn ones.

    Returns:
        what the gate found, as a sentence.

    Raises:
        InputError: wrong checkpoint, `folder` is there already, the format lacks that dtype or can't hold that model.
        RunFailed: what the other program computes from the export is not what we compute.
    """
    kind = FORMATS[format]
    dtype = dtype or kind.dtypes[0]
    if dtype not in kind.dtypes:
        raise InputError(f"--format {format} can't be written in {dtype}. Choose {' or '.join(kind.dtypes)}")
    for package, install in kind.packages:
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"--format {format} needs the package {package}, which is not installed. Run: pip install {install}"
            )
    if folder.exists():
        raise InputError(f"{folder} is there already. Remove it, or choose another folder")
    for image in images or []:
        if not image.is_file():
            raise InputError(f"--image {image}: no such file")
    answerer = Answerer(checkpoint, dtype=torch.float32)
    with whole_folder(folder) as beside, tempfile.TemporaryDirectory() as temporary:
        pictures = [] if answerer.llava.vision is None else images or gate.write_pictures(Path(temporary))
        job = Job(answerer, beside, folder, Path(temporary), dtype, pictures)
        said = kind.run(job)
        for path in beside.rglob("*"):
            if path.is_file():
                path.chmod(0o644)
    return said
