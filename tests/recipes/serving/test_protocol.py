"""Fields of a request that are refused, and those that are taken."""

import pytest

from retention_gates.recipes.serving.chat import Refused
from retention_gates.recipes.serving.protocol import read_wish
from retention_gates.recipes.serving.sampling import Sampling


@pytest.mark.parametrize(
    "body, param",
    [
        ([], None),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages[0]"),
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 101}, "max_tokens"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"what": 1}}, "stream_options"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"top_k": 5}, "top_k"),
        ({"model": "another"}, "model"),
    ],
)
def test_wishes_that_are_refused_name_their_field(body, param):
    message = {"messages": [{"role": "user", "content": "the sea"}]}
    if isinstance(body, dict):
        body = message | body
    with pytest.raises(Refused) as refused:
        read_wish(body, is_chat=True, model="tiny", most_tokens=100)
    assert refused.value.param == param and refused.value.status == (404 if param == "model" else 400)


def test_wishes_that_are_taken():
    body = {"prompt": ["the sea"], "n": 1, "logprobs": None, "user": "u", "frequency_penalty": 0.0, "seed": -1}
    wish = read_wish(body | {"stop": "x", "stream": True}, is_chat=False, model="tiny", most_tokens=100)
    assert wish.prompt == "the sea" and wish.sampling == Sampling(100, 1.0, 1.0, 2**63 - 1, ("x",))
    assert wish.is_streamed and not wish.wants_usage and not wish.has_own_length
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "sea"}]
    body = {"messages": [{"role": "developer", "content": "x"}, {"role": "user", "content": parts}]}
    wish = read_wish(body | {"max_completion_tokens": 7}, is_chat=True, model="tiny", most_tokens=100)
    assert wish.messages == [{"role": "system", "content": "x"}, {"role": "user", "content": "the sea"}]
    assert wish.sampling.max_tokens == 7 and wish.has_own_length
