"""A process of its own that runs snippets of Python and commands, one after the other, and tells what came out.

huggingface_hub reads HF_ENDPOINT and HF_HUB_OFFLINE when it is imported; torch takes seconds to import. So a process
is made for each environment, and kept for many snippets.
"""

import contextlib
import io
import json
import shlex
import shutil
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

PRIVATE_MOUNTS = ("unshare", "-rm")  # what is mounted there nobody else sees


@dataclass(frozen=True)
class Answer:
    out: str
    err: str
    error: str | None  # "Type: message" of what was raised
    traceback: str | None


class HubClient:
    """Args: small_disk: an empty folder that has 300 KiB of space for this process, if the system allows that."""

    def __init__(self, environment: dict[str, str], small_disk: Path | None = None):
        command = [sys.executable, "-P", __file__]
        self.has_small_disk = small_disk is not None and _may_mount()
        if self.has_small_disk:
            mount = f"mount -t tmpfs -o size=300k none {shlex.quote(str(small_disk))}"
            command = [*PRIVATE_MOUNTS, "sh", "-c", f"{mount} && exec {shlex.join(command)}"]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

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


def _may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*PRIVATE_MOUNTS, "true"], capture_output=True).returncode == 0


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
