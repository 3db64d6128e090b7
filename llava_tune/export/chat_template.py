"""Our chat templates as the Jinja text that transformers keeps beside a tokenizer."""

from __future__ import annotations

import json

from llava_tune.data.tokens.templates import Template


def jinja(template: Template, bos: str | None, image_token: str) -> str:
    """A template for `apply_chat_template` whose text encodes to what `Layout` gives.

    A message's content is a string, or a list of {"type": "image"} and {"type": "text", "text": ...}; images go to the front of
    the turn, each with a line break behind it. A string may hold the image token where an image is to be.

    Args:
        bos: written in front of everything; the tokenizer itself then adds none.
    """

    def quoted(text: str) -> str:
        return json.dumps(text, ensure_ascii=False)

    before, after = template.instruction.split("{text}")
    system_before, system_after = template.system.split("{text}")
    system = quoted(template.default_system)
    return "".join(
        [
            "{%- macro said(content) -%}",
            "{%- if content is string -%}{{ content }}{%- else -%}",
            "{%- for part in content if part['type'] != 'text' -%}{{ "
            + quoted(image_token + "\n")
            + " }}{%- endfor -%}",
            "{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}",
            "{%- endif -%}{%- endmacro -%}",
            "{{ " + quoted(bos) + " }}" if bos else "",
            "{%- if messages[0]['role'] == 'system' -%}",
            "{%- set system = said(messages[0]['content']) -%}{%- set rest = messages[1:] -%}",
            "{%- else -%}{%- set system = " + system + " -%}{%- set rest = messages -%}{%- endif -%}",
            "{%- if system -%}{{ " + quoted(system_before) + " + system + " + quoted(system_after) + " }}{%- endif -%}",
            "{%- for message in rest -%}",
            "{%- if message['role'] == 'user' -%}",
            "{{ " + quoted(before) + " + said(message['content']) + " + quoted(after) + " }}",
            "{%- else -%}",
            "{{ said(message['content']) + " + quoted(template.suffix + template.sep) + " }}",
            "{%- endif -%}{%- endfor -%}",
        ]
    )
