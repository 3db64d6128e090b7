"""Chat templates: how the turns of a conversation are laid out as text and control tokens."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from llava_tune.errors import InputError

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Template:
    """The layout of one chat format.

    A conversation is `system` (if the record or the template has one), then for each round `instruction` with the
    user's text, the answer, `suffix` and `sep`. The answer and `suffix` are supervised, nothing else is. Only the
    strings in `control` are control tokens; a record's own text never becomes one.
    """

    name: str
    system: str
    instruction: str
    suffix: str
    sep: str
    control: tuple[str, ...]
    default_system: str = ""

    def parts(self, layout: str) -> list[str]:
        """`layout` cut at its control tokens, empty strings left out: 'a<|x|>b' gives ['a', '<|x|>', 'b']."""
        pattern = "(" + "|".join(re.escape(c) for c in self.control) + ")"
        return [part for part in re.split(pattern, layout) if part]


_CHATML = {
    "system": "<|im_start|>system\n{text}<|im_end|>\n",
    "instruction": "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
    "suffix": "<|im_end|>",
    "sep": "\n",
    "control": ("<|im_start|>", "<|im_end|>"),
}

TEMPLATES = {
    t.name: t
    for t in (
        Template(name="internlm2_chat", **_CHATML),  # type: ignore[arg-type]
        Template(name="chatml", **_CHATML),  # type: ignore[arg-type]
        Template(
            name="llama3_chat",
            system="<|start_header_id|>system<|end_header_id|>\n\n{text}<|eot_id|>",
            instruction="<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            suffix="<|eot_id|>",
            sep="",
            control=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ),
        Template(
            name="vicuna",
            system="{text} ",
            instruction="USER: {text} ASSISTANT:",
            suffix="</s>",
            sep="",
            control=("</s>",),
            default_system=VICUNA_SYSTEM,
        ),
    )
}


def get_template(name: str) -> Template:
    """The template of that name.

    Raises:
        InputError: there is none; the message lists them.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    close = difflib.get_close_matches(name, TEMPLATES, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise InputError(f"dataset.template: {name!r} is not a template; {hint}There are: {', '.join(TEMPLATES)}")
