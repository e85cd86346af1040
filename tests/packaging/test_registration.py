"""PEFT knows the method in whatever order the packages are imported, and a plain import is quick."""

import subprocess
import sys

import pytest

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
