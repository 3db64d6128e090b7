"""Models that answer a conversation piece by piece: a checkpoint of ours, or a folder that transformers opens."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llava_tune.constants import IMAGE_PLACEHOLDER
from llava_tune.errors import InputError
from llava_tune.model.generate import GREEDY, Sampling


@dataclass(frozen=True)
class Turn:
    """What was said: by the user, with image files, and the model's answer (empty: not yet given)."""

    text: str
    images: list[Path] = field(default_factory=list)
    answer: str = ""


class Speaker(ABC):
    """A model that answers.

    Attributes:
        name: of the model, for the page's title.
        sees: whether it takes images.
    """

    name: str
    sees: bool

    @abstractmethod
    def check(self, image: Path) -> None:
        """
        Raises:
            BadImage: the model can't take the file.
        """

    def stream(
        self, turns: list[Turn], system: str = "", max_new_tokens: int = 512, sampling: Sampling = GREEDY
    ) -> Iterator[str]:
        """The answer to the last turn, in pieces as they come."""
        from transformers import TextIteratorStreamer

        streamer = TextIteratorStreamer(
            self._tokenizer, skip_prompt=self._echoes, skip_special_tokens=True, timeout=600
        )
        failed: list[BaseException] = []

        def work() -> None:
            try:
                self._generate(turns, system, max_new_tokens, sampling, streamer)
            except BaseException as error:
                failed.append(error)
                streamer.end()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        yield from (piece for piece in streamer if piece)
        thread.join()
        if failed:
            raise failed[0]

    _tokenizer: Any
    _echoes: bool
    """Whether the streamer is handed the prompt, too."""

    @abstractmethod
    def _generate(self, turns: list[Turn], system: str, max_new_tokens: int, sampling: Sampling, streamer: Any) -> None:
        """Generate the answer to the last turn into a streamer."""


class CheckpointSpeaker(Speaker):
    """A checkpoint of llava-tune."""

    _echoes = False

    def __init__(self, folder: Path) -> None:
        from llava_tune.evaluate.answer import Answerer

        self._answerer = Answerer(folder)
        self._tokenizer = self._answerer.tokenizer
        self.name = str(folder)
        self.sees = self._answerer.llava.vision is not None
        self._pixels: dict[Path, Any] = {}

    def check(self, image: Path) -> None:
        self._open(image)

    def _open(self, image: Path) -> Any:
        if image not in self._pixels:
            self._pixels[image] = self._answerer.transform.open(image)
        return self._pixels[image]

    def _generate(self, turns: list[Turn], system: str, max_new_tokens: int, sampling: Sampling, streamer: Any) -> None:
        # What is typed is text: a literal <image> must not stand for an image that isn't there.
        asked = [
            ("\n".join([*[IMAGE_PLACEHOLDER] * len(t.images), t.text.replace(IMAGE_PLACEHOLDER, "< image>")]), t.answer)
            for t in turns
        ]
        prompt = self._answerer.prompt(asked[:-1], asked[-1][0], system)
        images = [self._open(image) for turn in turns for image in turn.images]
        self._answerer.answer([prompt], images, max_new_tokens, streamer=streamer, sampling=sampling)


class TransformersSpeaker(Speaker):
    """A folder or Hub name that transformers opens: an export (one with its adapter apart, too), or another's LLaVA."""

    _echoes = True

    def __init__(self, name: str) -> None:
        from transformers import AutoConfig, AutoProcessor, AutoTokenizer

        adapter = Path(name) / "adapter"
        folder = str(Path(name) / "base") if adapter.is_dir() else name
        device = "cuda" if torch.cuda.is_available() else "cpu"
        half = device == "cuda" and torch.cuda.is_bf16_supported()
        settings: dict[str, Any] = {"dtype": torch.bfloat16 if half else torch.float32, "trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            self.sees = getattr(config, "vision_config", None) is not None
            opener = AutoProcessor if self.sees else AutoTokenizer
            self._processor: Any = opener.from_pretrained(folder, trust_remote_code=False)
            model: Any = _model_class(self.sees).from_pretrained(folder, **settings)
        except (OSError, ValueError, KeyError) as error:
            first = str(error).strip().split("\n", 1)[0]
            raise InputError(f"{name}: transformers can't open it: {first}") from error
        if adapter.is_dir():
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(adapter))
        self._model = model.to(device).eval()
        self._tokenizer = getattr(self._processor, "tokenizer", self._processor)
        if not self._tokenizer.chat_template and not getattr(self._processor, "chat_template", None):
            raise InputError(f"{name}: it has no chat template, so what is said can't be laid out for it")
        self.name = name

    def check(self, image: Path) -> None:
        from llava_tune.data import ImageTransform

        ImageTransform(224).open(image)  # decodes all of it

    def _generate(self, turns: list[Turn], system: str, max_new_tokens: int, sampling: Sampling, streamer: Any) -> None:
        messages: list[dict[str, Any]] = []
        if system:
            messages.append({"role": "system", "content": self._content(system, [])})
        for turn in turns:
            messages.append({"role": "user", "content": self._content(turn.text, turn.images)})
            if turn.answer:
                messages.append({"role": "assistant", "content": self._content(turn.answer, [])})
        inputs = self._processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self._model.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self._model.dtype)
        with torch.inference_mode():
            self._model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **sampling.arguments())

    def _content(self, text: str, images: list[Path]) -> Any:
        if not self.sees:
            return text
        parts: list[dict[str, Any]] = [{"type": "image", "path": str(image.resolve())} for image in images]
        return [*parts, {"type": "text", "text": text}]


def _model_class(sees: bool) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def open_speaker(name: str) -> Speaker:
    """The model of a checkpoint's folder, an export's, or a Hub name.

    Raises:
        InputError: it is none of these.
    """
    from llava_tune.model.factory import RUN_CONFIG, checkpoint_folder, checkpoint_run

    folder = checkpoint_folder(name)
    if (folder / RUN_CONFIG).is_file():
        return CheckpointSpeaker(folder)
    if next(folder.glob("*.gguf"), None) is not None:
        raise InputError(f"{name} holds GGUF files, which llama.cpp opens; README.md there has the command")
    known: list[Callable[[], bool]] = [(folder / "config.json").is_file, (folder / "base" / "config.json").is_file]
    if any(is_there() for is_there in known) or (not folder.exists() and name.count("/") == 1 and name[0] not in "./~"):
        return TransformersSpeaker(name)
    checkpoint_run(folder)  # says what is wrong with the folder
    raise InputError(f"{name}: neither a checkpoint, nor an export, nor a Hugging Face name (OWNER/NAME)")
