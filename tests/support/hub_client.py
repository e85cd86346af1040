"""A process of its own that runs snippets of Python and commands, one after the other, and tells what came out.

huggingface_hub reads HF_ENDPOINT and HF_HUB_OFFLINE when it is imported; torch takes seconds to import. So a process
is made for each environment, and kept for many snippets.
"""

import contextlib
import io
import json
import subprocess
import sys
import traceback
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    out: str
    err: str
    error: str | None  # "Type: message" of what was raised
    traceback: str | None


class HubClient:
    def __init__(self, environment: dict[str, str]):
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, code: str) -> Answer:
        """What the snippet prints or raises; names stay defined for the next one."""
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        return Answer(**json.loads(self.process.stdout.readline()))

    def value(self, code: str) -> str:
        """What the snippet prints, and an AssertionError with its traceback if it raises."""
        answer = self.run(code)
        assert answer.error is None, answer.traceback
        return answer.out.strip()

    def command(self, *arguments: str) -> tuple[int, Answer]:
        """Exit code and output of `retention-gates` with these arguments."""
        answer = self.run(f"from retention_gates.cli import main; code = main({list(arguments)!r})")
        assert answer.error is None, answer.traceback
        return int(self.value("print(code)")), answer

    def close(self) -> None:
        self.process.kill()  # what torch does at exit takes seconds
        self.process.wait()


def serve() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    names: dict[str, object] = {}
    for line in sys.stdin:
        out, err, error, trace = io.StringIO(), io.StringIO(), None, None
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                exec(json.loads(line), names)
            except Exception as raised:
                error, trace = f"{type(raised).__name__}: {raised}", traceback.format_exc()
        answer = {"out": out.getvalue(), "err": err.getvalue(), "error": error, "traceback": trace}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
