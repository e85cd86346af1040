"""All that a score depends on, as the key under which it is stored."""

from dataclasses import asdict
from typing import Any

from torch import nn

from retention_gates.gates.adapter.model import find_gated_model
from retention_gates.gates.policies import find_policy
from retention_gates.recipes.comparison import fingerprints
from retention_gates.recipes.comparison.result_store import Unit
from retention_gates.recipes.loading.provenance import PACKAGES, machine_and_versions
from retention_gates.trainers.evaluation.contenders import MEASURED, Contender


class Units:
    """Keys of what one model's contenders score on this machine."""

    def __init__(self, model: nn.Module):
        machine = machine_and_versions(model)
        self.digests = fingerprints.of_model(model)
        self.setup = {name: machine[name] for name in (*PACKAGES, "dtype")}
        # how many threads there are changes no more than rounding
        self.setup |= {"device": machine["device"].split(",")[0], "code": fingerprints.of_code()}
        self.setup |= {"base": self.digests.base}
        self.protected = find_gated_model(model).active_config.protected_tokens

    def of(self, contender: Contender | None, **what: Any) -> Unit:
        """The key of `what` under a contender; the full cache and policies without gates don't depend on the gates."""
        unit = self.setup | what
        if contender is None:
            return unit
        if find_policy(contender.policy).needs_gates or contender.budgets not in ("uniform", MEASURED):
            unit["gates"] = self.digests.gates
        return unit | {"contender": asdict(contender), "protected": self.protected}
