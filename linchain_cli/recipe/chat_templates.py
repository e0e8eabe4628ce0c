"""Chat templates by name, for base models, whose tokenizers often bring none.

They write published formats in turns of plain text: ChatML (Qwen's, SmolLM2's and many others'), Llama 3's
and Gemma's (1 to 3). A model's own template, where there is one, knows more: tools, reasoning. First comes
the tokenizer's beginning of sequence, as in the texts that a base has read.
"""

from __future__ import annotations

from collections.abc import Container

# Where the first turn's mark is the tokenizer's beginning of sequence, it is not written twice.
_CHATML = """\
{%- if bos_token is defined and bos_token and bos_token != '<|im_start|>' %}{{ bos_token }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
_LLAMA_3 = """\
{%- if bos_token is defined and bos_token %}{{ bos_token }}{% endif %}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""
# Gemma has no system turn: what it would say opens the user's next one, as Gemma 3's template has it.
_GEMMA = """\
{%- if bos_token is defined and bos_token %}{{ bos_token }}{% endif %}
{%- set said = namespace(before='') %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{%- set said.before = message['content'] | trim + '\\n\\n' %}
{%- elif message['role'] == 'user' %}
{{- '<start_of_turn>user\\n' + said.before + message['content'] | trim + '<end_of_turn>\\n' }}
{%- set said.before = '' %}
{%- else %}
{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
{{- message['content'] | trim + '<end_of_turn>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""
CHAT_TEMPLATES = {"chatml": _CHATML, "llama3": _LLAMA_3, "gemma": _GEMMA}
_END_MARKS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}


def fitting_template(vocabulary: Container[str]) -> str | None:
    """The name of the template whose turns end with a token of this vocabulary, if there is one."""
    return next((name for name, mark in _END_MARKS.items() if mark in vocabulary), None)
