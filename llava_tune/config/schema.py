"""The typed config of a run. Every field here is a config-file argument and a command-line flag of the same name."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from typing import Annotated, Any, Literal, TypeVar, cast

import pydantic
from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass
from typing_extensions import Self, dataclass_transform

from llava_tune.errors import InputError

T = TypeVar("T")
_STRICT = ConfigDict(extra="forbid", strict=False, validate_default=True)

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(pydantic.Field,))
def _config(cls: type[T]) -> type[T]:
    """A frozen dataclass that checks names and types when it is made, and says what is wrong in one sentence."""
    made: Any = pydantic_dataclass(config=_STRICT, frozen=True, kw_only=True)(cls)
    checked = made.__init__

    @functools.wraps(checked)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            checked(self, *args, **kwargs)
        except pydantic.ValidationError as error:
            raise InputError(_explain(error, [f.name for f in dataclasses.fields(made)])) from None

    made.__init__ = __init__
    return cast(type[T], made)


def _explain(error: pydantic.ValidationError, names: list[str]) -> str:
    """One sentence a problem: which field, what was found, and the nearest right name."""
    sentences = []
    for problem in error.errors():
        where = ".".join([error.title, *(str(part) for part in problem["loc"])])
        kind = problem["type"]
        if kind == "unexpected_keyword_argument":
            close = difflib.get_close_matches(str(problem["loc"][-1]), names, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}? " if close else ""
            sentences.append(f"{where} is not a field; {hint}{error.title} has: {', '.join(names)}")
        elif kind.startswith("missing"):
            sentences.append(f"{where} is missing; it has no default, so the config must set it")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            found = "" if kind == "value_error" else f"; found {problem['input']!r}"
            sentences.append(f"{where}: {message}{found}")
    return "; ".join(sentences)


@_config
class Lora:
    """Low-rank adapters (peft). rank 0 trains none."""

    rank: NonNegativeInt = 0
    """Rank of the adapters; 0 means no adapters."""
    alpha: PositiveFloat = 256.0
    """Scale: the adapter's output is multiplied by alpha / rank."""
    dropout: Share = 0.05
    """Dropout in front of each adapter."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers to adapt; empty: every linear layer of the component but its output head."""
    variant: Literal["lora", "rslora", "dora"] = "lora"
    """Which kind: lora (arXiv:2106.09685), rslora (2312.03732) or dora (2402.09353)."""


@_config
class LanguageModel:
    """The language model: any causal LM of transformers, or an InternLM2 checkpoint in its own layout."""

    name: str
    """Folder or Hugging Face name of the model."""
    tokenizer: str | None = None
    """Folder or Hugging Face name of the tokenizer, where it is not the model's."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """pretrained reads the weights; random takes only the shape from config.json (tests, the demo)."""
    freeze: bool = False
    """Train no weight of the language model (adapters, if any, are still trained)."""
    quantization: Literal["none", "nf4"] = "none"
    """nf4 keeps the frozen weights in 4 bits (QLoRA, arXiv:2305.14314); needs lora.rank above 0."""
    lora: Lora = Lora()
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """Attention implementation of transformers. auto: PyTorch's causal kernel for each sample of a row alone, which costs nothing for
    what is packed beside it; sdpa for models with sliding windows or soft caps."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.quantization != "none" and self.lora.rank == 0:
            raise ValueError(
                "quantization='nf4' keeps the weights frozen, so it needs lora.rank above 0 to train anything"
            )
        if self.lora.rank and not self.freeze:
            raise ValueError(
                "lora.rank is above 0, so the language model's own weights are not trained: set freeze=True"
            )
        return self


@_config
class VisionTower:
    """The image encoder: any ViT that open_clip builds."""

    name: str
    """open_clip model name, or the path of a JSON file in open_clip's model config format."""
    pretrained: str | None = None
    """open_clip tag (such as openai), weights file, Hugging Face CLIP folder or name; None: random weights."""
    freeze: bool = True
    """Train no weight of the vision tower."""
    feature_layer: int = -2
    """Which block's output are the features (-2: the last but one, as in LLaVA)."""
    lora: Lora = Lora()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.feature_layer >= 0:
            raise ValueError(
                f"feature_layer counts from the end and must be negative, such as -2; found {self.feature_layer}"
            )
        if self.lora.rank and not self.freeze:
            raise ValueError("lora.rank is above 0, so the tower's own weights are not trained: set freeze=True")
        return self


@_config
class Projector:
    """What maps vision features to the language model's embeddings."""

    kind: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu"
    """linear (LLaVA) or two layers with a GELU between (LLaVA-1.5)."""
    freeze: bool = False
    """Train no weight of the projector."""


@_config
class Model:
    llm: LanguageModel
    vision: VisionTower | None
    """The image encoder; None: a language model alone, trained on text."""
    projector: Projector = Projector()
    init_from: str | None = None
    """A checkpoint of llava-tune whose weights (a projector's, or more) the model starts from."""


def _function_name(value: Any) -> Any:
    """A function as `file.py:name`, which other processes can load and JSON can hold."""
    if callable(value):
        return f"{inspect.getsourcefile(value) or value.__code__.co_filename}:{value.__name__}"
    return value


Format = Literal["auto", "llava", "sharegpt", "messages", "alpaca"]
Function = Annotated[str, BeforeValidator(_function_name)]


@_config
class DataSource:
    """One of several data sets that a run mixes. What is None here is as the Dataset has it."""

    data_path: str
    """A file, a folder of files or a pattern; see Dataset.data_path."""
    name: str | None = None
    """What reports call it; None: the name of the file or folder."""
    image_folder: str | None = None
    """Folder that its image paths start from."""
    template: str | None = None
    """Its chat template."""
    format: Format = "auto"
    """Of its records; auto: told from the first one."""
    convert: Function | None = None
    """Its own format: a function from a record to LLaVA's."""
    split: str | None = None
    """Which split of a saved DatasetDict, and which of its samples: `train`, `train[:95%]`, `[1000:]`."""
    repeat: PositiveFloat | None = None
    """Times that an epoch goes over it; 0.5: half of it, another half each epoch. None: 1."""
    share: Share | None = None
    """Its share of an epoch's samples, instead of `repeat`; all data sets then need one."""


@_config
class Dataset:
    """Conversations with images, and how they become tokens."""

    data_path: str | None = None
    """JSON, JSONL (also .gz, .zst), Parquet, a folder saved by `datasets`, WebDataset .tar; a file, a folder of such files, or a
    pattern. Not needed with offline_processed_text_folder."""
    image_folder: str | None = None
    """Folder that the records' image paths start from. None: the data is text only, or holds its images itself."""
    template: str = "internlm2_chat"
    """Chat template (llava_tune/data/tokens/templates.py)."""
    system: str | None = None
    """System message of records that have none; None: the template's."""
    format: Format = "auto"
    """Of the records; auto: told from the first one."""
    convert: Function | None = None
    """A format of one's own: a function from a record to LLaVA's (or None, to leave it out); or its `file.py:name`."""
    split: str | None = None
    """Which split of a saved DatasetDict, and which of its samples: `train`, `train[:95%]`, `[1000:]`."""
    sources: tuple[DataSource, ...] = ()
    """Several data sets in one run, instead of data_path."""
    max_length: PositiveInt = 2048
    """Tokens of a sample at most, counted after each image has become its patches; the rest is cut off."""
    image_position: Literal["front", "as_written"] = "front"
    """Where a turn's single <image> goes: to the front of the turn (LLaVA), or where it is written."""
    pad_image_to_square: bool = False
    """Pad an image to a square with the mean colour before resizing (LLaVA-1.5), instead of resizing its shorter side
    and cropping the centre."""
    scaled_image_decoding: bool = False
    """While training, decode JPEGs that are more than twice as large as needed at a half, a quarter or an eighth of their size: several
    times faster for photos of many megapixels; pixels then differ slightly from those of evaluation and export."""
    offline_processed_text_folder: str | None = None
    """A folder that `llava-tune prepare` wrote; None: training prepares one in the cache folder first."""
    trust_processed_folder: bool = False
    """Take an offline_processed_text_folder that has no manifest (XTuner's), after a check of its columns. Nothing then says
    whether its tokenizer, template and max_length are this config's."""
    max_bad_share: Share = 0.01
    """Largest share of records (in prepare) or of images (in training) that may be bad and left out."""
    num_proc: NonNegativeInt = 0
    """Processes that prepare data; 0: one for each core."""
    num_workers: NonNegativeInt = 2
    """Processes for each rank that decode images while training."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.data_path is not None and self.sources:
            raise ValueError(
                "dataset has both data_path and sources: list all data sets in sources, or give one data_path"
            )
        shares = [s.share for s in self.sources]
        if any(share is not None for share in shares):
            if None in shares:
                raise ValueError("a share is given for some of dataset.sources only: give all a share, or all a repeat")
            if any(s.repeat is not None for s in self.sources):
                raise ValueError("dataset.sources has both share and repeat: use one of them")
            if abs(sum(s for s in shares if s) - 1) > 1e-3:
                raise ValueError(f"the shares of dataset.sources add up to {sum(s for s in shares if s):g}, not to 1")
        return self

    def all_sources(self) -> tuple[DataSource, ...]:
        """The data sets, each with all that it takes from here filled in; none if there is only a prepared folder."""
        if self.sources:
            return tuple(
                dataclasses.replace(
                    s, template=s.template or self.template, image_folder=s.image_folder or self.image_folder
                )
                for s in self.sources
            )
        if self.data_path is None:
            return ()
        return (
            DataSource(
                data_path=self.data_path,
                image_folder=self.image_folder,
                template=self.template,
                format=self.format,
                convert=self.convert,
                split=self.split,
            ),
        )


@_config
class Optimizer:
    """AdamW and its schedule. A component's own learning rate replaces learning_rate there."""

    learning_rate: PositiveFloat
    """Peak learning rate."""
    projector_learning_rate: PositiveFloat | None = None
    """Peak learning rate of the projector; None: learning_rate."""
    vision_learning_rate: PositiveFloat | None = None
    """Peak learning rate of the vision tower; None: learning_rate."""
    vision_layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Each block of the vision tower learns at this times the rate of the block behind it (BEiT, arXiv:2106.08254); 1: all alike."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of matrices; norms and biases have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the moments."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    warmup_ratio: Share = 0.03
    """Share of the steps in which the learning rate rises from zero."""
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """Shape after the warmup."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are scaled down to this norm; 0: never."""


@_config
class Training:
    """Batches, steps, precision, checkpoints."""

    global_batch_size: PositiveInt
    """Samples in one optimizer step, over all ranks and accumulation steps."""
    micro_batch_size: PositiveInt = 1
    """Samples that one device holds at once. global_batch_size / (ranks x micro_batch_size) steps accumulate."""
    epochs: PositiveFloat = 1.0
    """Passes over the data."""
    max_steps: NonNegativeInt = 0
    """Stop after this many optimizer steps; 0: as epochs say."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on a GPU that has it, else fp32."""
    gradient_checkpointing: bool = False
    """Recompute the language model's activations in the backward pass: less memory, about a third more time."""
    packing: bool = False
    """Pack samples into rows of dataset.max_length tokens, each seeing only itself: next to no padding. global_batch_size and
    micro_batch_size then count rows."""
    group_by_length: bool = True
    """Without packing: put samples of like length into one global batch, so that little is padding."""
    seed: NonNegativeInt = 42
    """Seed of the order, the new weights and dropout."""
    save_steps: PositiveInt = 500
    """Optimizer steps between checkpoints; one is always written at the end."""
    save_total_limit: PositiveInt = 2
    """Checkpoints kept."""
    save_in_background: bool = True
    """Copy a checkpoint to memory at its step and write it while training goes on, where memory is free for the copy."""
    logging_steps: PositiveInt = 1
    """Optimizer steps between lines of metrics.jsonl and TensorBoard."""
    bad_step: Literal["stop", "skip"] = "stop"
    """What to do with a global batch whose loss or gradient is no finite number, or whose loss jumps (spike_factor): end the run
    before it changes a weight, or leave its update out, at most five times in a row. Its record ids go to skipped.jsonl."""
    spike_factor: NonNegativeFloat = 0.0
    """A loss above this many times the median of the last 64 is a jump; 0: none is."""
    hang_timeout: NonNegativeFloat = 1800.0
    """Seconds without a micro step, a score or a checkpoint after which a rank writes its stacks to crash/ and ends; 0: never."""
    log_ids: bool = False
    """Write the record ids of each step to ids-rank-N.jsonl."""
    report_to: tuple[str, ...] = ()
    """More of the Trainer's own reporters: wandb, trackio, mlflow."""


@_config
class Preview:
    """Questions that the model answers on set images while it trains, printed to the log."""

    every_steps: NonNegativeInt = 0
    """Optimizer steps between previews; 0: none."""
    images: tuple[str, ...] = ()
    """Image files."""
    questions: tuple[str, ...] = ("Describe this image.",)
    """Questions asked of each image."""
    max_new_tokens: PositiveInt = 64
    """Tokens of an answer at most."""


@_config
class Evaluation:
    """Questions with known answers that the model is scored on while it trains; the best checkpoint is kept."""

    every_steps: NonNegativeInt = 0
    """Optimizer steps between evaluations; one more comes at the end. 0: none."""
    data_path: str | None = None
    """Question file: LLaVA JSON or JSONL, exact match; or a benchmark's file (mme: its folder)."""
    image_folder: str | None = None
    """Folder that its images' paths start from; None: dataset.image_folder."""
    benchmark: Literal["vqav2", "textvqa", "gqa", "pope", "mme", "scienceqa", "mmbench", "refcoco"] | None = None
    """Which public benchmark the file is; None: LLaVA's format."""
    annotations: str | None = None
    """vqav2: the file of its answers."""
    limit: PositiveInt | None = 500
    """Ask only the first this many; None: all."""
    batch_size: PositiveInt = 16
    """Questions that a rank answers at once."""
    max_new_tokens: PositiveInt = 32
    """Tokens of an answer at most."""
    keep_best: bool = True
    """Save a checkpoint when the score is the best so far, and never remove it (best.json names it)."""


@_config
class Run:
    """All of a run: the model, its data, how it is trained."""

    model: Model
    dataset: Dataset
    optimizer: Optimizer
    training: Training
    preview: Preview = Preview()
    evaluation: Evaluation = Evaluation()
    work_dir: str | None = None
    """Folder of checkpoints and logs; None: work_dirs/<name of the config>."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        data = self.dataset
        if not data.all_sources() and data.offline_processed_text_folder is None:
            raise ValueError(
                "dataset has neither data_path (a LLaVA JSON or JSONL file, or another kind) nor offline_processed_text_folder (a folder that "
                "`llava-tune prepare` wrote): set one"
            )
        if self.preview.every_steps and not self.preview.images:
            raise ValueError("preview.every_steps is above 0 but preview.images names no image")
        if self.evaluation.every_steps and self.evaluation.data_path is None:
            raise ValueError("evaluation.every_steps is above 0 but evaluation.data_path names no question file")
        model = self.model
        frozen = model.llm.freeze and not model.llm.lora.rank
        if model.vision is not None:
            frozen = frozen and model.vision.freeze and not model.vision.lora.rank and model.projector.freeze
        if frozen:
            raise ValueError("everything is frozen (llm, vision and projector): nothing would be trained")
        return self


def to_json(run: Run) -> str:
    """The config as JSON, as it is kept in a checkpoint."""
    return pydantic.TypeAdapter(Run).dump_json(run, indent=2).decode()


def from_json(text: str | bytes) -> Any:
    """A config from `to_json`'s text."""
    return pydantic.TypeAdapter(Run).validate_json(text)
