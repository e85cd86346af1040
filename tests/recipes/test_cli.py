"""The command: help, exit codes, one clear line for a user's mistake, and nothing written."""

import importlib.util
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_adapter import Files, make_files

from retention_gates import __version__, cli
from retention_gates.kernels import dispatch

ROOT = Path(__file__).resolve().parents[2]
COMMAND = str(Path(sys.executable).parent / "retention-gates")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    return make_files(tmp_path_factory.mktemp("cli"))


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_of_each_command(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    assert f"usage: retention-gates {command}" in capsys.readouterr().out


def test_help_and_version(capsys):
    for option, text in (("--help", "inspect"), ("--version", f"retention-gates {__version__}\n")):
        with pytest.raises(SystemExit) as stopped:
            cli.main([option])
        assert stopped.value.code == 0
        assert text in capsys.readouterr().out


def test_the_log_of_the_kernels_is_shown_once(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dispatch, "_told", set())
    for copy in ("first", "second"):
        output = ["--output", str(tmp_path / copy)]
        assert cli.main(["calibrate", *files.arguments, "--rows", "1", "--length", "64", *output]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if " runs " in line]
    assert sorted(lines) == [
        "retention-gates: retention_attention runs naive (plain torch) on cpu",
        "retention-gates: retention_sum runs naive (plain torch) on cpu",
    ]


NOT_INTEGERS = [["generate", "--prompt", "a", "--memory-size", size] for size in ("1.5", "many", "nan", "1e2", "")]


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["generate", "--promt", "a"], *NOT_INTEGERS])
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("retention-gates: error: ") and line.endswith("--help shows what is allowed")
    if "--memory-size" in arguments:
        assert f"--memory-size: invalid int value: {arguments[-1]!r}" in line


HELP = [["--help"], ["--version"], ["trian"], *([command, "--help"] for command in cli.COMMANDS)]
HEAVY = {"torch", "transformers", "peft", "numpy", "datasets", "huggingface_hub", "yaml"}


def test_help_imports_nothing_heavy():
    """Seconds depend on the machine, so that what is imported is looked at."""
    script = "import contextlib, io, sys\nfrom retention_gates.cli import main\nfor arguments in {}:\n"
    script += "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
    script += "        with contextlib.redirect_stderr(io.StringIO()):\n            main(arguments)\n"
    script += "    print(arguments, sorted({} & sys.modules.keys()))"
    ran = subprocess.run([sys.executable, "-c", script.format(HELP, HEAVY)], capture_output=True, text=True)
    assert ran.stdout.splitlines() == [f"{arguments} []" for arguments in HELP], ran.stderr


@pytest.mark.parametrize("folder", [ROOT, ROOT / "kernels", Path("/")])
def test_the_package_runs_as_a_module_from_anywhere(folder):
    ran = subprocess.run(
        [sys.executable, "-m", "retention_gates", "--version"], cwd=folder, capture_output=True, text=True
    )
    assert ran.returncode == 0 and ran.stdout.startswith("retention-gates 0"), ran.stderr


MISTAKES = {
    "unknown policy": (["evaluate", "--policies", "retension"], "Did you mean 'retention'?"),
    "unknown budgets": (["evaluate", "--budgets", "even"], "'even' is unknown"),
    "unknown task": (["evaluate", "--tasks", "chess"], "unknown task 'chess'"),
    "no memory": (["evaluate", "--memory-size", "0", "--length", "40"], "contenders.memory_sizes=0 must be"),
    "memory too small": (["evaluate", "--memory-size", "4", "--length", "40"], "memory_size=4 must be at least 5"),
    "nothing evicted": (["evaluate", "--memory-size", "64", "--length", "40"], "no longer than the largest memory"),
    "start too late": (["evaluate", "--start", "40", "--length", "40"], "start=40 leaves nothing to score"),
    "not calibrated": (["evaluate", "--length", "200", "--policies", "retention", "--budgets", "calibrated"], "run `"),
    "too long": (["evaluate", "--length", "600", "--documents", "1"], "512 positions"),
    "too many": (["evaluate", "--documents", "9999", "--length", "200"], "9999 windows"),
    "too short": (["evaluate", "--length", "0", "--start", "0"], "text.length=0 must be"),
    "no batch": (["evaluate", "--batch-size", "0"], "run.batch_size=0 must be"),
    "unknown works": (["evaluate", "--test-works", "Hamlet"], "Hamlet"),
    "no such text": (["evaluate", "--text", "./nowhere.txt"], "nowhere.txt"),
    "no text": (["evaluate", "--text", "EMPTY", "--length", "200"], "is empty"),
    "a seed below 0": (["evaluate", "--seed", "-1", "--length", "200"], "run.seeds=-1 must be"),
    "no numbers": (["evaluate", "--device", "meta", "--length", "200"], "device='meta'"),
    "no such GGUF": (["evaluate", "--gguf-file", "no.gguf", "--length", "200"], "has no no.gguf"),
    "unknown device": (["evaluate", "--device", "toaster", "--length", "200"], "toaster"),
    "inspect: no memory": (["inspect", "--memory-size", "0"], "--memory-size 0 must be 1 or more"),
    "inspect: no text": (["inspect", "--text", "EMPTY"], "is empty"),
    "inspect: unknown device": (["inspect", "--device", "toaster"], "toaster"),
    "inspect: no such GGUF": (["inspect", "--gguf-file", "no.gguf"], "has no no.gguf"),
    "inspect: no text to show": (["inspect", "--length", "40", "--show", "BINARY"], "is not UTF-8 text"),
    "inspect: evicts nothing": (["inspect", "--length", "40"], "evicts none of 40 tokens"),
    "inspect: nothing to show": (["inspect", "--length", "40", "--show", "nowhere.txt"], "nowhere.txt"),
    "calibrate: no text": (["calibrate", "--text", "EMPTY"], "is empty"),
    "calibrate: unknown device": (["calibrate", "--device", "toaster", "--length", "64"], "toaster"),
    "calibrate: no such GGUF": (["calibrate", "--gguf-file", "no.gguf"], "has no no.gguf"),
    "calibrate: too long": (["calibrate", "--length", "600", "--rows", "1"], "512 positions"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_a_mistake_is_one_line_and_writes_nothing(files, mistake, tmp_path, tmp_path_factory, monkeypatch, capsys):
    (command, *arguments), message = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    before = snapshot(files.adapter)
    texts = {"EMPTY": b"", "BINARY": b"\xff\xfe\x00"}
    for name in texts.keys() & set(arguments):
        file = tmp_path_factory.mktemp("texts") / f"{name}.txt"
        file.write_bytes(texts[name])
        arguments[arguments.index(name)] = str(file)
    assert cli.main([command, *files.arguments, "--output", "out", *arguments]) == 2
    assert_one_line(capsys, message)
    assert snapshot(tmp_path) == {} and snapshot(files.adapter) == before


def assert_one_line(capsys, message: str) -> None:
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("retention-gates: error: ")]
    assert len(errors) == 1 and message in errors[0], printed.err
    assert "Traceback" not in printed.err and printed.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "nowhere"], "nowhere"),
        ([], "No model was given"),
        (["--model", "MODEL", "--policy", "retention"], "needs trained gates"),
        (["--adapter", "ADAPTER", "--prompt", " "], "The prompt is empty"),
        (["--adapter", "ADAPTER", "--chat"], "no chat template"),
        (["--adapter", "ADAPTER", "--memory-size", "4"], "memory_size=4 must be at least 5"),
        (["--adapter", "ADAPTER", "--memory-size", "0"], "--memory-size 0 must be 1 or more"),
        (["--adapter", "ADAPTER", "--device", "meta"], "device='meta'"),
        (["--adapter", "ADAPTER", "--gguf-file", "no.gguf"], "has no no.gguf"),
        (["--model", "./nowhere", "--policy", "random"], "There is no folder ./nowhere"),
        (["--model", ".", "--policy", "random"], "has no config.json"),
        (["--adapter", "ADAPTER", "--budgets", "calibrated"], "retention-gates calibrate"),
        (["--adapter", "ADAPTER", "--temperature", "nan"], "--temperature nan"),
        (["--adapter", "ADAPTER", "--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--adapter", "ADAPTER", "--policy", "fifo"], "'fifo' is unknown"),
        (["--model", "nowhere/at/all", "--policy", "random"], "nowhere"),
    ],
)
def test_mistakes_in_generate(files, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    places = {"MODEL": str(files.model), "ADAPTER": str(files.adapter)}
    given = [places.get(argument, argument) for argument in arguments]
    policy = [] if "--policy" in given or "--adapter" in given else ["--policy", "random"]
    assert cli.main(["generate", "--prompt", "the old ship", *given, *policy]) == 2
    assert_one_line(capsys, message)
    assert snapshot(tmp_path) == {}


DAMAGES = {
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{no"), "adapter_config.json is not JSON"),
    "a list": (lambda folder: (folder / "adapter_config.json").write_text("[1]"), "holds a list"),
    "a LoRA": (
        lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}'),
        "peft_type='LORA'",
    ),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
@pytest.mark.parametrize("command", ["generate", "evaluate", "calibrate", "inspect"])
def test_a_folder_that_is_no_adapter_of_ours(files, command, damage, tmp_path, capsys):
    change, message = DAMAGES[damage]
    broken = tmp_path / "adapter"
    shutil.copytree(files.adapter, broken)
    change(broken)
    before = snapshot(tmp_path)
    text = ["--text", str(files.texts), "--output", str(tmp_path / "out"), "--length", "200"]
    options = ["--prompt", "the old ship"] if command == "generate" else text
    for base in ([], ["--model", str(files.model)]):
        assert cli.main([command, "--adapter", str(broken), *base, *options]) == 2
        assert_one_line(capsys, message)
    assert snapshot(tmp_path) == before


def test_the_error_has_a_line_of_its_own_below_a_progress_bar(monkeypatch, capsys):
    recipe = importlib.import_module("retention_gates.recipes.generate")

    def stop_in_a_bar(options):
        from tqdm.auto import tqdm

        bar = tqdm(total=3)
        bar.update()
        raise ValueError("a mistake")

    monkeypatch.setattr(recipe, "main", stop_in_a_bar)
    assert cli.main(["generate", "--prompt", "a"]) == 2
    assert_one_line(capsys, "a mistake")


def test_a_truncated_adapter(files, tmp_path, capsys):
    broken = tmp_path / "adapter"
    shutil.copytree(files.adapter, broken)
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert cli.main(["generate", "--adapter", str(broken), "--prompt", "the old ship"]) == 2
    assert_one_line(capsys, "safetensors")


def test_an_output_folder_that_is_not_ours(files, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    for command in ("evaluate", "inspect", "calibrate"):
        before = snapshot(tmp_path)
        assert cli.main([command, *files.arguments, "--length", "200", "--output", str(tmp_path)]) == 2
        assert_one_line(capsys, "was not written by retention-gates")
        assert snapshot(tmp_path) == before
    assert cli.main(["inspect", *files.arguments, "--output", str(tmp_path / "thesis.txt")]) == 2
    assert_one_line(capsys, "is a file")


def test_without_matplotlib(files, tmp_path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    for module in ("evaluate", "inspect"):
        recipe = importlib.import_module("retention_gates.recipes.report.figures")
        monkeypatch.setattr(recipe, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
        assert cli.main([module, *files.arguments, "--output", str(tmp_path / "out")]) == 2
        assert_one_line(capsys, "pip install 'retention-gates[demo]'")
    assert snapshot(tmp_path) == {}


def test_ctrl_c(monkeypatch, capsys):
    recipe = importlib.import_module("retention_gates.recipes.generate")

    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "main", interrupt)
    assert cli.main(["generate", "--prompt", "a"]) == 130
    assert capsys.readouterr().err == "\nretention-gates: interrupted\n"


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    recipe = importlib.import_module("retention_gates.recipes.generate")

    def fail(options):
        raise AssertionError("an invariant")

    monkeypatch.setattr(recipe, "main", fail)
    with pytest.raises(AssertionError, match="an invariant"):
        cli.main(["generate", "--prompt", "a"])


def test_a_closed_pipe_is_no_error(files):
    call = f"{COMMAND} generate --adapter {files.adapter} --prompt 'the ship' --memory-size 8 | true"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", call], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr


def test_a_command_without_its_file_asks_for_that_alone(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train"])
    assert "required: CONFIG.yaml;" in capsys.readouterr().err


def test_the_shipped_adapter_by_its_word(monkeypatch):
    asked = []
    monkeypatch.setattr("retention_gates.recipes.calibrate.main", asked.append)
    assert cli.main(["calibrate", "--adapter", "shipped"]) == 0
    assert asked[0].adapter.endswith("smollm2_135m_instruct")
    assert cli.main(["calibrate", "--adapter", "shipped", "--model", "no/such"]) == 2
    assert cli.main(["calibrate", "--adapter", "shipped", "--model", str(ROOT)]) == 0  # a copy of the base, say
    assert asked[1].adapter == asked[0].adapter


def test_a_taken_port_is_seen_before_a_model_is_loaded(monkeypatch, capsys):
    loaded = []
    monkeypatch.setattr("retention_gates.recipes.serve.load_tokenizer", loaded.append)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", "--adapter", "shipped", "--port", port]) == 2
    assert f"--port {port}: nothing can listen there" in capsys.readouterr().err and not loaded
