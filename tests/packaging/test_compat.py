"""Private names of other packages are there, and stand in compat.py alone. A failure names the one that is gone."""

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from retention_gates import compat

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("gates", "kernels", "trainers", "checkpoints", "recipes")
MEMBERS = [(place, name) for place, names in compat.PRIVATE_MEMBERS.items() for name in names]
# modules and attributes that begin with an underscore and are not our own
FOREIGN = re.compile(
    r"(?:from|import) (?:torch|transformers|peft|accelerate)[\w.]*\._\w+"
    r"|\b(?:torch|transformers|peft|accelerate)(?:\.\w+)*\._(?!_)\w+"
    r"|\b(?:module|model|config|base|layer)\._(?:attn_implementation|commit_hash|forward_\w*hooks|compiled\w+)"
)


@pytest.mark.parametrize("name", compat.PRIVATE)
def test_a_private_name_is_there(name):
    place, purpose = compat.PRIVATE[name]
    try:
        found = compat.find_private(place)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{place} is gone, which is needed for {purpose}: {error}")
    assert getattr(compat, name) is found


@pytest.mark.parametrize(("place", "name"), MEMBERS)
def test_a_private_member_is_there(place, name):
    instances = {"torch.nn:Module": torch.nn.Module, "transformers:PreTrainedConfig": LlamaConfig}
    owner = instances[place]() if place in instances else compat.find_private(place)
    assert hasattr(owner, name), f"{name} of {place} is gone"


def test_what_is_not_listed_has_no_name_here():
    with pytest.raises(AttributeError, match="no attribute 'tree_branches'"):
        compat.tree_branches  # noqa: B018


def test_private_names_stand_in_one_file():
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py") if "bench" not in path.parts]
    found = {
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in files
        for match in FOREIGN.finditer(path.read_text("utf-8"))
    }
    assert not {one for one in found if "upkeep" not in one}


def test_the_search_finds_some():
    assert FOREIGN.search("from torch.utils._pytree import tree_leaves") and FOREIGN.search(
        "x = torch._foreach_mul(y)"
    )
    assert FOREIGN.search("model._forward_hooks") and not FOREIGN.search("torch.utils.data.Dataset")
