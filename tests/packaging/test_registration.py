"""PEFT knows the method in whatever order the packages are imported, and a plain import is quick."""

import subprocess
import sys
import threading
from importlib import import_module
from importlib.machinery import ModuleSpec

import pytest

from retention_gates import registration

KNOWS = "from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as known; print(known['RETENTION_GATE'].__name__)"
ORDERS = {
    "before PEFT": "import retention_gates; import peft",
    "after PEFT": "import peft; import retention_gates",
    "a part of PEFT": "import retention_gates; from peft.tuners.lora import LoraConfig",
    "looked for first": "import retention_gates, importlib.util; importlib.util.find_spec('peft'); import peft",
    "by a public name": "from retention_gates import RetentionGateConfig; import peft",
    "by a module": "import retention_gates.gates.adapter.config; import peft",
}


def run(script: str) -> str:
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@pytest.mark.parametrize("order", ORDERS)
def test_peft_knows_the_method(order):
    script = f"{ORDERS[order]}; {KNOWS}; import sys; print([f for f in sys.meta_path if 'retention' in str(f)])"
    assert run(script).splitlines() == ["RetentionGateModel", "[]"]


class AsksOthers:
    """A finder like that of import hooks which time or patch modules: it finds what the others find."""

    def __init__(self, guarded: bool):
        self.guarded, self.inside, self.asked = guarded, False, 0

    def find_spec(self, fullname, path, target=None):
        if fullname != "small_peft" or (self.guarded and self.inside):
            return None
        self.inside, self.asked = True, self.asked + 1
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        self.inside = False
        return spec


@pytest.fixture
def imported(monkeypatch, tmp_path):
    """Has a package stand for PEFT, and returns what is imported after it."""
    names: list[str] = []
    (tmp_path / "small_peft.py").write_text("ran = 1")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registration, "PEFT", "small_peft")
    monkeypatch.setattr(registration, "import_module", names.append)
    others = [finder for finder in sys.meta_path if not isinstance(finder, registration.AfterPeft)]
    monkeypatch.setattr(sys, "meta_path", others)
    yield names
    sys.modules.pop("small_peft", None)


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_another_finder_asks_all_others_too(imported, guarded, first):
    finders = [AsksOthers(guarded), registration.AfterPeft()]
    sys.meta_path[:0] = finders if first else finders[::-1]
    assert import_module("small_peft").ran == 1
    assert finders[0].asked and imported == [registration.METHOD] and finders[1] not in sys.meta_path


def test_a_search_in_one_thread_does_not_end_that_of_another(imported):
    ours, began, go_on = registration.AfterPeft(), threading.Event(), threading.Event()
    found: list[ModuleSpec | None] = []

    class Slow:
        def find_spec(self, fullname, path, target=None):
            if threading.current_thread() is searching:
                began.set()
                assert go_on.wait(30)

    sys.meta_path[:0] = [ours, Slow()]
    searching = threading.Thread(target=lambda: found.append(ours.find_spec("small_peft", None)))
    searching.start()
    assert began.wait(30)
    assert ours.find_spec("small_peft", None) is not None
    go_on.set()
    searching.join()
    assert found[0] is not None


def test_a_finder_that_fails_leaves_the_next_search_as_it_was(imported):
    class Fails:
        def find_spec(self, fullname, path, target=None):
            raise OSError("no such disk")

    ours = registration.AfterPeft()
    sys.meta_path[:0] = [failing := Fails()]
    with pytest.raises(OSError, match="no such disk"):
        ours.find_spec("small_peft", None)
    sys.meta_path.remove(failing)
    assert ours.find_spec("small_peft", None) is not None


def test_a_plain_import_imports_neither_torch_nor_peft():
    assert (
        run("import retention_gates, sys; print(sorted({'torch', 'peft', 'transformers'} & sys.modules.keys()))")
        == "[]"
    )


def test_public_names():
    import retention_gates

    assert set(retention_gates.__all__) == set(retention_gates._MODULES) <= set(dir(retention_gates))
    assert all(getattr(retention_gates, name).__name__ == name for name in retention_gates.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Gate'"):
        retention_gates.Gate  # noqa: B018
