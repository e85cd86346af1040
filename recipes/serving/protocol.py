"""The fields that a request's JSON may have: all are checked, and none that was asked for is silently left out."""

import secrets
from dataclasses import dataclass
from typing import Any

from retention_gates.recipes.serving.chat import Refused
from retention_gates.recipes.serving.sampling import Sampling

MOST_STOPS, LONGEST_STOP = 4, 100  # strings, characters
ROLES = ("system", "developer", "user", "assistant")
# Fields that change nothing at these values; any other value asks for what there is not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
UNUSED = {"user", "metadata", "safety_identifier", "prompt_cache_key"}  # notes of the client's own
SETTINGS = {"model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options"}


@dataclass(frozen=True)
class Wish:
    """One request. Either messages or prompt is given."""

    sampling: Sampling
    is_streamed: bool
    wants_usage: bool  # in the stream
    messages: list[dict[str, str]] | None = None
    prompt: str | list[int] | None = None
    has_own_length: bool = True  # whether the request said max_tokens itself
    is_chat: bool = False

    @property
    def where(self) -> str:
        """The field that has the text."""
        return "prompt" if self.messages is None else "messages"

    @property
    def characters(self) -> int:
        """Of the text, or tokens if it is given as such."""
        return len(self.prompt or ()) + sum(len(message["content"]) for message in self.messages or ())


def bad(param: str | None, message: str) -> Refused:
    return Refused(400, message, code="invalid_value", param=param)


def read_wish(body: Any, *, is_chat: bool, model: str, most_tokens: int) -> Wish:
    """The wish in a request's JSON.

    Args:
        most_tokens: of an answer; also what is taken if the request does not say.

    Raises:
        Refused: 400, or 404 for another model, naming the field, its value and what is allowed.
    """
    if not isinstance(body, dict):
        raise bad(None, f"The body must be a JSON object, not {type(body).__name__}.")
    own = {"messages", "max_completion_tokens"} if is_chat else {"prompt"}
    for name, value in body.items():
        if name in NEUTRAL and value is not None and not any(_same(value, allowed) for allowed in NEUTRAL[name]):
            raise bad(name, f"{name}={_short(value)} is not supported: leave it out.")
        if name not in SETTINGS | UNUSED | NEUTRAL.keys() | own:
            raise bad(name, f"{name} is no field that this server knows.")
    given = {name: value for name, value in body.items() if value is not None}
    check_model(given.get("model", model), model)
    options = given.get("stream_options", {})
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
        raise bad("stream_options", 'stream_options may be {"include_usage": true} or false.')
    if _flag(options, "include_obfuscation"):
        raise bad("stream_options", "include_obfuscation=true is not supported: events are as long as their text.")
    length = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
    sampling = Sampling(
        max_tokens=_number(given, length, 1, most_tokens, default=most_tokens, whole=True),
        temperature=_number(given, "temperature", 0, 2, default=1.0),
        top_p=_number(given, "top_p", 0, 1, default=1.0),
        seed=_number(given, "seed", -(2**63), 2**63 - 1, default=secrets.randbits(63), whole=True) % 2**63,
        stop=_stops(given.get("stop", ())),
    )
    return Wish(
        sampling,
        _flag(given, "stream"),
        _flag(options, "include_usage"),
        messages=_messages(given.get("messages")) if is_chat else None,
        prompt=None if is_chat else _prompt(given.get("prompt")),
        has_own_length=length in given,
        is_chat=is_chat,
    )


def check_model(asked: Any, model: str) -> None:
    """Raises Refused, 404, for another model than the one that is served."""
    if asked != model:
        raise Refused(
            404, f"There is no model {_short(asked)}, only {model!r}.", code="model_not_found", param="model"
        )


def _messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise bad("messages", "messages must be a list of at least one message.")
    result = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise bad(where, f"{where} must be an object with a role among {', '.join(ROLES)}.")
        unknown = {name for name, value in message.items() if value is not None} - {"role", "content"}
        if unknown:
            raise bad(where, f"{where} has {', '.join(sorted(unknown))}, which this server does not know.")
        role = "system" if message["role"] == "developer" else message["role"]
        result.append({"role": role, "content": _content(message.get("content"), where)})
    return result


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    is_text = isinstance(content, list) and all(
        isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text" for part in content
    )
    if not is_text or not all(isinstance(part["text"], str) for part in content):
        raise bad(where, f'{where}.content must be a string or a list of {{"type": "text", "text": ...}}.')
    return "".join(part["text"] for part in content)


def _prompt(prompt: Any) -> str | list[int]:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
        return prompt
    raise bad("prompt", "prompt must be a text or a list of token ids, one of them and not empty.")


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop
    is_text = isinstance(stops, list | tuple) and all(isinstance(one, str) and one for one in stops)
    if not is_text or len(stops) > MOST_STOPS or any(len(one) > LONGEST_STOP for one in stops):
        raise bad("stop", f"stop must be up to {MOST_STOPS} strings of 1 to {LONGEST_STOP} characters.")
    return tuple(stops)


def _number(given: dict, name: str, least: Any, most: Any, *, default: Any, whole: bool = False) -> Any:
    value = given.get(name, default)
    is_number = type(value) is int if whole else type(value) in (int, float)
    if not is_number or not least <= value <= most:  # NaN too
        kind = "an integer" if whole else "a number"
        raise bad(name, f"{name}={_short(value)} must be {kind} from {least} to {most}.")
    if name == "top_p" and value == 0:
        raise bad(name, "top_p=0 leaves no token: temperature=0 takes the likeliest.")
    return value


def _flag(given: dict, name: str) -> bool:
    value = given.get(name, False)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise bad(name, f"{name}={_short(value)} must be true or false.")


def _same(value: Any, allowed: Any) -> bool:
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
