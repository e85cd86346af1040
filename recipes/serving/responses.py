"""The JSON of answers, in the two forms of the OpenAI API: chat completions and completions."""

import json
import time
import uuid
from typing import Any

from retention_gates.recipes.serving.chat import Ended, Refused


class Form:
    """Builds the objects of one answer."""

    def __init__(self, model: str, *, is_chat: bool):
        self.is_chat = is_chat
        self.head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, ended: Ended) -> dict[str, Any]:
        content = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": ended.reason}
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {**self.head, "object": kind, "choices": [choice], "usage": usage(ended)}

    def piece(self, text: str | None, reason: str | None = None, *, is_first: bool = False) -> dict[str, Any]:
        """One event of a stream; text None where there is no more."""
        if self.is_chat:
            delta = ({"role": "assistant"} if is_first else {}) | ({} if text is None else {"content": text})
            content: dict[str, Any] = {"delta": delta}
        else:
            content = {"text": text or ""}
        return self._event([{"index": 0, **content, "logprobs": None, "finish_reason": reason}])

    def last(self, ended: Ended) -> dict[str, Any]:
        """The event with the usage, after all others."""
        return self._event([]) | {"usage": usage(ended)}

    def _event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices}


def usage(ended: Ended) -> dict[str, int]:
    return {
        "prompt_tokens": ended.prompt_tokens,
        "completion_tokens": ended.completion_tokens,
        "total_tokens": ended.prompt_tokens + ended.completion_tokens,
    }


def error_object(error: Refused) -> dict[str, Any]:
    kind = "invalid_request_error" if 400 <= error.status < 500 and error.status != 429 else "server_error"
    if error.status == 429:
        kind = "rate_limit_error"
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def event(data: dict[str, Any] | str) -> str:
    """One server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n"
