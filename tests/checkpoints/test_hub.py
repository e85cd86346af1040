"""Adapters by name, with the real huggingface_hub against a small Hub on the loopback interface."""

import dataclasses
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml
from hub_client import HubClient
from hub_server import TOKEN, HubServer
from safetensors.torch import load_file
from tiny_run import make_model

PROMPT = "king"  # after which the tiny model does not stop at once
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SETUP = f"""
import os, torch, warnings
from pathlib import Path
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from retention_gates import RetentionGateConfig
from retention_gates.checkpoints.hub import download_adapter
from retention_gates.gates.adapter import files
from retention_gates.recipes.loading.models import load_base, load_tokenizer
from safetensors.torch import load_file
warnings.simplefilter("ignore", FutureWarning)
files.WAITS = (0.01, 0.02, 0.04)

def train(folder, base="org/tiny", seed=1, width=16):
    model = get_peft_model(load_base(base), RetentionGateConfig(gate_width=width))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder, save_embedding_layers=False)

def same(model, folder):
    stored = load_file(Path(folder) / "{WEIGHTS}")
    mine = {{k.replace(".default", ""): v for k, v in model.state_dict().items() if ".retention_gate." in k}}
    return mine.keys() == stored.keys() and all(torch.equal(mine[k], stored[k]) for k in stored)
"""


@pytest.fixture(scope="module")
def hub():
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def client(hub, files):
    hub.add("org/tiny", make_model(files / "model"))
    (files / "disk").mkdir()
    client = HubClient(hub.environment(files / "home"), small_disk=files / "disk")
    client.value(SETUP + f"train({str(files / 'one')!r}); train({str(files / 'two')!r}, seed=2)")
    hub.add("user/adapter", files / "one")
    hub.add("user/adapter", files / "two", branch="v2")
    yield client
    client.close()


def test_push_uploads_the_adapter_and_a_card(hub, client, files):
    adapter = str(files / "one")
    code, answer = client.command("push", adapter, "user/new")
    assert code == 2 and "log in with hf auth login, set HF_TOKEN, or give --token" in answer.err
    assert "user/new" not in hub.repositories
    code, answer = client.command("push", adapter, "user/new", "--token", TOKEN, "--licence", "mit", "--private")
    assert code == 0 and f"uploaded: {hub.endpoint}/user/new/commit/" in answer.out
    repository = hub.repositories["user/new"]
    uploaded = repository.commits[repository.branches["main"]]
    assert set(uploaded) == {".gitattributes", CONFIG, WEIGHTS, "README.md"} and repository.private
    assert uploaded[WEIGHTS] == (files / "one" / WEIGHTS).read_bytes()
    assert json.loads(uploaded[CONFIG]) == json.loads((files / "one" / CONFIG).read_text())
    _, head, card = uploaded["README.md"].decode().split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["library_name"] == "peft" and metadata["base_model"] == "org/tiny"
    assert metadata["license"] == "mit" and "retention-gates" in metadata["tags"]
    commit = hub.repositories["org/tiny"].branches["main"]
    assert f"org/tiny, revision `{commit}`" in card  # the base model's, which the adapter has noted
    assert f'from_pretrained("org/tiny", revision="{commit}")' in card
    assert 'PeftModel.from_pretrained(base, "user/new")' in card and "arXiv 2512.03324" in card
    assert "## Training" not in card and "## Evaluation" not in card  # nothing is known of them

    commits = len(repository.commits)
    assert client.command("push", adapter, "user/new", "--token", TOKEN, "--revision", "v1")[0] == 0
    assert len(repository.commits) == commits + 1 and repository.branches["v1"] != repository.branches["main"]


def test_push_refuses(hub, client, files):
    adapter, before = str(files / "one"), dict(hub.repositories["user/adapter"].branches)
    local = files / "local"
    shutil.copytree(files / "one", local)
    config = json.loads((local / CONFIG).read_text())
    (local / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "/models/tiny"}))
    broken = files / "broken"
    shutil.copytree(files / "one", broken)
    (broken / WEIGHTS).write_bytes((broken / WEIGHTS).read_bytes()[:-1])
    for arguments, message in [
        ([adapter, "user/adapter", "--private"], "user/adapter exists and is public"),
        ([adapter, "adapter"], "'adapter' is no name of a repository"),
        ([adapter, "user/adapter", "--token", "hf_wrong"], "does not let you write to user/adapter"),
        ([str(local), "user/adapter"], "base model is '/models/tiny', which others cannot load"),
        ([str(broken), "user/adapter"], "is not a whole safetensors file"),
        ([str(files / "nowhere"), "user/adapter"], "There is no folder"),
        ([adapter, "user/adapter", "--evaluation", str(files)], "has no results.jsonl"),
    ]:
        token = [] if "--token" in arguments else ["--token", TOKEN]
        code, answer = client.command("push", *arguments, *token)
        assert code == 2 and message in answer.err, answer.err
    assert hub.repositories["user/adapter"].branches == before
    code, _ = client.command("push", str(local), "user/local", "--base-model", "org/tiny", "--token", TOKEN)
    repository = hub.repositories["user/local"]
    pushed = json.loads(repository.commits[repository.branches["main"]][CONFIG])
    assert code == 0 and pushed["base_model_name_or_path"] == "org/tiny"


def test_peft_loads_by_name_and_revision(client, files):
    for options, folder in (("", "one"), (', revision="v2"', "two")):
        client.value('base = AutoModelForCausalLM.from_pretrained("org/tiny")')
        client.value(f'model = PeftModel.from_pretrained(base, "user/adapter"{options})')
        assert client.value(f"print(same(model, {str(files / folder)!r}))") == "True"
    client.value('model.load_adapter("user/adapter", "first")')  # main, beside v2
    assert client.value("print(sorted(model.peft_config))") == "['default', 'first']"


def test_generate_by_name_says_what_it_says_with_the_folder(client, files):
    texts = []
    for adapter in ("user/adapter", str(files / "one"), "user/adapter@v2", str(files / "two")):
        code, answer = client.command(
            "generate", "--adapter", adapter, PROMPT, "--memory-size", "8", "--max-new-tokens", "20", "--strict-base"
        )
        assert code == 0, answer.err
        texts.append(answer.out)
    assert texts[0] == texts[1] != texts[2] == texts[3]


def test_what_the_hub_does_not_give(hub, client, files):
    hub.add("user/private", files / "one", private=True)
    hub.add("user/gated", files / "one", gated=True)
    hub.add("user/lora", {CONFIG: b'{"peft_type": "LORA", "r": 8}', WEIGHTS: b"0" * 1000})
    hub.add("user/model", {"config.json": b"{}", "model.safetensors": b"0", "README.md": b""})
    hub.add("user/half", {CONFIG: (files / "one" / CONFIG).read_bytes(), "adapter_model.bin": b"0"})
    for name, message in {
        "user/nothing": "shows no repository of that name. If it is private, log in",
        "user/private": "shows no repository of that name. If it is private, log in",
        "user/gated": "user/gated is gated: accept its terms",
        "user/adapter@v9": "user/adapter has no revision 'v9'",
        "user/model": "user/model has no adapter_config.json (found: README.md, config.json, model.safetensors)",
        "user/half": f"has no {WEIGHTS} (found: {CONFIG}, adapter_model.bin)",
        "user/lora": "peft_type='LORA', where retention gates have",
        "a/b/c": "'a/b/c' is no folder, and no name on the Hub",
        "../nowhere": "'../nowhere' is no folder, and no name on the Hub",
        "user/adapter@": "must be a folder, user/adapter, or user/adapter@revision",
    }.items():
        code, answer = client.command("generate", "--adapter", name, PROMPT)
        assert code == 2 and message in answer.err, (name, answer.err)
        assert answer.err.count("\n") == 1 and answer.out == ""
    assert not any(len(hub.objects[r.path.rpartition("/")[2]]) == 1000 for r in hub.downloads())  # the LoRA's weights
    for name in ("user/private", "user/gated"):
        found = client.value(f'os.environ["HF_TOKEN"] = {TOKEN!r}; print(download_adapter("{name}"))')
        client.value('del os.environ["HF_TOKEN"]')
        assert Path(found, WEIGHTS).read_bytes() == (files / "one" / WEIGHTS).read_bytes()
    assert hub.downloads() and not any(request.has_token for request in hub.downloads())  # another host


def test_an_adapter_of_the_hub_that_names_a_folder_as_its_base(hub, client, files):
    config = json.loads((files / "one" / CONFIG).read_text()) | {"base_model_name_or_path": str(files / "model")}
    hub.add("user/sly", {CONFIG: json.dumps(config).encode(), WEIGHTS: (files / "one" / WEIGHTS).read_bytes()})
    code, answer = client.command("generate", "--adapter", "user/sly", PROMPT)
    assert code == 2 and "names a folder" in answer.err and "--model" in answer.err


def test_a_base_that_brings_code_is_refused(hub, client, files, tmp_path):
    code = f"open({str(tmp_path / 'canary')!r}, 'w')\n"
    maps = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model", "AutoTokenizer": ["custom.T", None]}
    custom = json.dumps({"model_type": "custom", "auto_map": maps}).encode()
    tokenizer = json.dumps({"tokenizer_class": "T", "auto_map": maps}).encode()
    hub.add("org/code", {"config.json": custom, "tokenizer_config.json": tokenizer, "custom.py": code.encode()})
    config = json.loads((files / "one" / CONFIG).read_text()) | {
        "base_model_name_or_path": "org/code",
        "revision": None,
    }
    hub.add("user/code", {CONFIG: json.dumps(config).encode(), WEIGHTS: (files / "one" / WEIGHTS).read_bytes()})
    for arguments in (["--adapter", "user/code"], ["--model", "org/code", "--policy", "random"]):
        code, answer = client.command("generate", *arguments, PROMPT)
        assert code == 2 and "trust_remote_code" in answer.err
    answer = client.run('load_base("org/code")')
    assert answer.error.startswith("ValueError") and "trust_remote_code" in answer.error
    assert not (tmp_path / "canary").exists()


def test_evaluate_by_name_and_revision(client, files, tmp_path):
    (tmp_path / "text.txt").write_text("the old ship sings over the new sea " * 40)
    arguments = ["--text", str(tmp_path / "text.txt"), "--documents", "2", "--length", "60", "--memory-size", "8"]
    client.value("from retention_gates.recipes.report import html_page; html_page.page = lambda header, models: ''")
    results = []
    for adapter in ("user/adapter@v2", str(files / "two")):
        output = tmp_path / f"out{len(results)}"
        code, answer = client.command("evaluate", "--adapter", adapter, *arguments, "--output", str(output))
        assert code == 0, answer.err
        lines = list(map(json.loads, (output / "results.jsonl").read_text().splitlines()))
        assert [line["adapter"] for line in lines if line["kind"] == "model"] == [adapter]
        results.append([line for line in lines if line["kind"] == "record"])
    assert results[0] == results[1] and len(results[0]) > 2


def test_convert_reads_from_the_hub(hub, client, files):
    """One of ours in the authors' form, uploaded as they do, and back: an adapter that loads by its folder."""
    theirs, back = str(files / "theirs"), str(files / "back")
    arguments = ["--memory-size", "64", "--drop-protected-tokens"]
    code, answer = client.command("convert", "--to", "trimkv", "user/adapter@v2", theirs, *arguments)
    assert code == 0, answer.err
    hub.add("authors/gates", Path(theirs), branch="first")
    code, answer = client.command("convert", "authors/gates@first", back)
    assert code == 0, answer.err
    one, other = (Path(folder, WEIGHTS) for folder in (files / "two", back))
    client.value(f"model = PeftModel.from_pretrained(load_base('org/tiny'), {back!r})")
    assert client.value(f"print(same(model, {back!r}))") == "True"
    assert load_file(one).keys() == load_file(other).keys()
    assert all(torch.equal(load_file(one)[key], load_file(other)[key]) for key in load_file(one))
    code, answer = client.command("convert", "user/adapter", str(files / "none"))
    assert code == 2 and "user/adapter has no config.json (found: README.md, adapter_config.json" in answer.err


def test_a_broken_transfer_goes_on_where_it_broke(hub, client, files):
    """The client writes to the disk in pieces of 10 MB, so that less than that is fetched again."""
    client.value(f"train({str(files / 'large')!r}, width=46_000)")
    hub.add("user/large", files / "large")
    size = (files / "large" / WEIGHTS).stat().st_size
    assert size > 24e6
    hub.break_after, before = size // 2, len(hub.downloads())
    found = client.value('print(download_adapter("user/large"))')
    first, second = [request for request in hub.downloads()[before:] if request.sent]
    start = int(second.range.removeprefix("bytes=").removesuffix("-"))
    assert first.sent == size // 2 and 10e6 < start <= first.sent and second.sent == size - start
    assert Path(found, WEIGHTS).read_bytes() == (files / "large" / WEIGHTS).read_bytes()


def test_a_transfer_that_fails_leaves_no_half_file(hub, client, files):
    hub.add("user/failing", files / "two")
    hub.out_of_order = True
    code, answer = client.command("generate", "--adapter", "user/failing", PROMPT)
    assert code == 2 and "The Hub refused to give" in answer.err and "500" in answer.err
    blobs = files / "home" / "hub" / "models--user--failing"
    assert [path.name for path in blobs.rglob(WEIGHTS)] == [] and list(blobs.rglob("*.incomplete")) == []
    hub.out_of_order = False
    found = client.value('print(download_adapter("user/failing"))')
    assert Path(found, WEIGHTS).read_bytes() == (files / "two" / WEIGHTS).read_bytes()


def test_the_cache_is_enough_when_the_hub_is_away(hub, client, files):
    arguments = ("generate", "--adapter", "user/adapter", PROMPT, "--memory-size", "8", "--max-new-tokens", "20")
    code, online = client.command(*arguments)
    assert code == 0
    cached = client.value('print(download_adapter("user/adapter"))')
    hub.stop()
    try:
        assert client.value('print(download_adapter("user/adapter"))') == cached
        offline = HubClient(hub.environment(files / "home", HF_HUB_OFFLINE="1"))
        code, told = offline.command(*arguments)
        assert code == 0 and told.out == online.out
        code, unknown = offline.command("generate", "--adapter", "user/other", PROMPT)
        assert code == 2 and "HF_HUB_OFFLINE is set" in unknown.err
        offline.value(SETUP)
        code = 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("org/tiny"), "user/adapter")'
        assert offline.value(f"print(same({code}, {str(files / 'one')!r}))") == "True"
        offline.close()
    finally:
        hub.start()


def test_no_hub_and_no_cache(hub, client):
    """Said at once, with the name; huggingface_hub alone asks again for half a minute."""
    client.value('download_adapter("user/adapter")')
    hub.stop()
    try:
        began = time.monotonic()
        code, answer = client.command("generate", "--adapter", "nosuch/folder", PROMPT)
        base = client.run('load_base("nosuch/model")').error
        tokenizer = client.run('load_tokenizer("nosuch/model")').error
        seconds = time.monotonic() - began
    finally:
        hub.start()
    assert code == 2 and "There is no folder nosuch/folder, adapter_config.json of that name is not in" in answer.err
    assert "the Hub (http://127.0.0.1" in answer.err and "ConnectError" in answer.err
    assert base == tokenizer and base.startswith(
        "ValueError: There is no folder nosuch/model, config.json of that name"
    )
    assert seconds < 20


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_busy_hub_is_asked_again(hub, client, files, method, times):
    name = f"user/busy-{method}-{times}"
    hub.add(name, files / "one")
    hub.busy, before = {method: times}, len(hub.requests)
    found = client.value(f"print(download_adapter({name!r}))")
    assert Path(found, WEIGHTS).read_bytes() == (files / "one" / WEIGHTS).read_bytes()
    assert hub.busy == {method: 0} and len(hub.requests) - before < 12 + 2 * times


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_hub_that_stays_busy_is_left(hub, client, files, method):
    hub.add(f"user/closed-{method}", files / "one")
    hub.busy = {method: 1000}
    code, answer = client.command("generate", "--adapter", f"user/closed-{method}", PROMPT)
    asked, hub.busy = 1000 - hub.busy[method], {}
    assert code == 2 and f"The Hub refused to give {CONFIG} of user/closed-{method}" in answer.err
    assert "503" in answer.err and asked == 4


def test_a_base_of_a_busy_hub(hub, client, files):
    """transformers asks for the files: each is busy once."""
    hub.add("org/busy", files / "model")
    for code in ('load_tokenizer("org/busy")', 'load_base("org/busy")'):
        hub.busy = {"GET": 2}
        client.value(code)
        assert hub.busy == {"GET": 0}


REFUSALS = {"deleted": {}, "private": {"private": True}, "gated": {"gated": True}}


@pytest.mark.parametrize("how", REFUSALS)
def test_what_the_hub_gives_no_more_comes_from_the_cache_with_a_word(hub, client, files, how):
    name = f"user/revoked-{how}"
    commit = hub.add(name, files / "one")
    found = client.value(f"print(download_adapter({name!r}))")
    assert client.run(f"download_adapter({name!r})").err == ""
    repository = hub.repositories.pop(name)
    if REFUSALS[how]:
        hub.repositories[name] = dataclasses.replace(repository, **REFUSALS[how])
    answer = client.run(f"print(download_adapter({name!r}))")
    assert answer.out.strip() == found
    assert f"does not give {name} any more (HTTP 401)" in answer.err and found in answer.err
    code, told = client.command("generate", "--adapter", name, PROMPT, "--memory-size", "8", "--max-new-tokens", "2")
    assert code == 0 and told.err.count("any more") == 1
    assert client.run(f'download_adapter("{name}@{commit}")').err == ""  # a commit does not change
    strict = client.run(f"warnings.simplefilter('error', UserWarning); download_adapter({name!r})")
    client.value("warnings.simplefilter('default', UserWarning)")
    assert strict.error.startswith("UserWarning: The Hub")


def test_a_busy_hub_is_no_refusal(hub, client, files):
    """What is in the cache is used, and nobody is alarmed."""
    found = client.value('print(download_adapter("user/adapter"))')
    hub.busy = {"HEAD": 4}
    answer = client.run('print(download_adapter("user/adapter"))')
    hub.busy = {}
    assert answer.out.strip() == found and answer.err == ""


def test_a_full_disk(hub, client, files):
    """A file system of 300 KiB, so that the kernel itself says it is full."""
    if not client.has_small_disk:
        pytest.skip("unshare may not make a mount namespace here")
    client.value(f"train({str(files / 'big')!r}, width=2000)")
    assert (files / "big" / WEIGHTS).stat().st_size > 1e6
    hub.add("user/big", files / "big")
    disk = str(files / "disk")
    answer = client.run(f'RetentionGateConfig.from_pretrained("user/big", cache_dir={disk!r})')
    assert answer.error.startswith(f"ValueError: The disk is full: {WEIGHTS} of user/big could not be downloaded")
    left = client.value(
        f"print([p.name for p in Path({disk!r}).rglob('*') if p.is_file() and p.stat().st_size > 5000])"
    )
    assert left == "[]"
