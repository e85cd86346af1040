"""Chat templates that rewrite earlier turns, close the last in another way, or mark what the assistant wrote."""

import re

import numpy as np
from chats import CONTROL
from transformers import PreTrainedTokenizerFast

from retention_gates.data.chat import encode_chat
from retention_gates.data.files import BadRow

# what contents are made of
WORDS = ["the ", "river", "\n", " ", "<", "think", "<think>", "</think>", "é", "|>"]

# Reasoning stays in the turns behind the last question alone, and the last turn always has some.
LAST_REASONING = """{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- set reasoning = m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content else '' -%}
{%- set answer = m.content.split('</think>')[-1].lstrip() -%}
{{- '<|im_start|>assistant\n' -}}
{%- if loop.index0 > ns.last and (loop.last or reasoning) -%}
{{- '<think>\n' + reasoning + '\n</think>\n\n' -}}
{%- endif -%}
{{- answer + '<|im_end|>\n' -}}
{%- else -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

# The same, and the prompt opens the block of reasoning.
OPENED_REASONING = LAST_REASONING[: LAST_REASONING.rindex("{%- if add")] + (
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n<think>\n' -}}{%- endif -%}"
)

# The same, and the prompt closes it.
CLOSED_REASONING = OPENED_REASONING.replace("<think>\n' -}}{%- endif", "<think>\n\n</think>\n\n' -}}{%- endif")

# A chat that is no prompt ends with another token.
TOKEN_AT_THE_END = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)

# The last turn closes in another way, and reasoning of earlier ones is gone.
CHANNELS = """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- if m.thinking and loop.last and not add_generation_prompt -%}
{{- '<|im_start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' -}}
{%- endif -%}
{{- '<|im_start|>assistant<|channel|>final<|message|>' + m.content -}}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' -}}
{%- else -%}{{- '<|im_start|>' + m.role + '<|message|>' + m.content + '<|end|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant' -}}{%- endif -%}"""

# Reasoning is gone from all turns, the last one too, and the prompt opens it.
NO_REASONING = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}{% else %}"
    "{{ '<|assistant|>' + m.content.split('</think>')[-1] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
# Questions are hidden once they are answered, and nothing else moves.
HIDDEN_QUESTIONS = (
    "{% for m in messages %}{% set is_old = m.role == 'user' and loop.index < messages | length - 1 %}"
    "{{ '<|' + m.role + '|>' + ('*' * (m.content | length) if is_old else m.content) + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

TEMPLATES = {
    "last reasoning": LAST_REASONING,
    "opened reasoning": OPENED_REASONING,
    "closed reasoning": CLOSED_REASONING,
    "token at the end": TOKEN_AT_THE_END,
    "channels": CHANNELS,
    "no reasoning": NO_REASONING,
    "hidden questions": HIDDEN_QUESTIONS,
}

BLOCKS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>\n' }}{% generation %}"
    "{{ m.content + '<|end|>\n' }}{% endgeneration %}{% else %}{{ '<|user|>\n' + m.content + '<|end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def check_rows(messages: list[dict], tokenizer: PreTrainedTokenizerFast) -> None:
    """Each row is a rendering; each of its targets ends the chat up to its turn, but for control tokens."""
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    texts = [tokenizer.apply_chat_template(messages[:n], tokenize=False) for n in range(1, len(messages) + 1)]
    renderings = [tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    control = re.compile("|".join(map(re.escape, CONTROL)))
    try:
        rows = encode_chat(messages, tokenizer)
    except BadRow:
        return
    assert sum(row.turns for row in rows) <= len(turns)
    for row in rows:
        assert tokenizer.decode(row.ids) in renderings and len(row.targets) == len(row.ids)
        edges = np.flatnonzero(np.diff(row.targets.astype(int), prepend=0, append=0)).reshape(-1, 2)
        assert 1 <= len(edges) <= row.turns
        for first, last in edges.tolist():
            up_to = tokenizer.decode(row.ids[:last])
            behind = [text[len(up_to) :] for text in (renderings[i] for i in turns) if text.startswith(up_to)]
            assert any(not control.sub("", rest).strip() for rest in behind), up_to
            assert tokenizer.decode(row.ids[first:last]).strip()
