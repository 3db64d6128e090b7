"""Our chat templates as the Jinja text that transformers keeps beside a tokenizer."""

from __future__ import annotations

import json

from llava_tune.data.tokens.templates import Template


def parts_said(image_token: str) -> str:
    """The macro for transformers: a message's content is a string, which may hold the image token where an image is to be, or a list of
    {"type": "image"} and {"type": "text", "text": ...}; images go to the front of the turn, each with a line break behind it."""
    return (
        "{%- macro said(content) -%}"
        "{%- if content is string -%}{{ content }}{%- else -%}"
        "{%- for part in content if part['type'] != 'text' -%}{{ " + _quoted(image_token + "\n") + " }}{%- endfor -%}"
        "{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
        "{%- endif -%}{%- endmacro -%}"
    )


MARKERS_SAID = (
    "{%- macro said(content) -%}{%- set pieces = content.split('<__media') -%}"
    "{%- for piece in pieces[1:] -%}{{ '<__media' + piece.split('__>')[0] + '__>\\n' }}{%- endfor -%}"
    "{{ pieces[0] }}"
    "{%- for piece in pieces[1:] -%}{{ piece[(piece.split('__>')[0] | length) + 3:] }}{%- endfor -%}"
    "{%- endmacro -%}"
)
"""The macro for llama.cpp: it makes one string of a message, with a marker such as <__media__> for each image and nothing behind it; they
go to the front of the turn, each with a line break behind it."""


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def jinja(template: Template, bos: str | None, said: str) -> str:
    """A chat template in Jinja whose text encodes to what `Layout` gives.

    Args:
        bos: written in front of everything; the tokenizer itself then adds none.
        said: a macro of that name, which turns a message's content into text: `parts_said` or MARKERS_SAID.
    """

    before, after = template.instruction.split("{text}")
    system_before, system_after = template.system.split("{text}")
    system = _quoted(template.default_system)
    return "".join(
        [
            said,
            "{{ " + _quoted(bos) + " }}" if bos else "",
            "{%- if messages[0]['role'] == 'system' -%}",
            "{%- set system = said(messages[0]['content']) -%}{%- set rest = messages[1:] -%}",
            "{%- else -%}{%- set system = " + system + " -%}{%- set rest = messages -%}{%- endif -%}",
            "{%- if system -%}{{ "
            + _quoted(system_before)
            + " + system + "
            + _quoted(system_after)
            + " }}{%- endif -%}",
            "{%- for message in rest -%}",
            "{%- if message['role'] == 'user' -%}",
            "{{ " + _quoted(before) + " + said(message['content']) + " + _quoted(after) + " }}",
            "{%- else -%}",
            "{{ said(message['content']) + " + _quoted(template.suffix + template.sep) + " }}",
            "{%- endif -%}{%- endfor -%}",
        ]
    )
