"""Makes PEFT know retention gates as soon as both packages are imported, in whichever order.

PEFT, transformers and torch take seconds to import, which a command's --help or a data script need not wait for. So
`import retention_gates` does not import PEFT: it registers at once where PEFT is there already, and right after PEFT's
own import where it comes later.
"""

import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PEFT = "peft"
METHOD = "retention_gates.gates.adapter.model"  # whose import adds the method to PEFT's mappings


def register() -> None:
    """Registers the method now, or as soon as PEFT is imported."""
    if PEFT in sys.modules:
        import_module(METHOD)
    elif not any(isinstance(finder, AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterPeft())


class AfterPeft(MetaPathFinder):
    """Finds PEFT where the other finders do, and registers the method when it has been imported."""

    def __init__(self) -> None:
        self.asking = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # another finder that asks all others, too, would come back here for ever
        if fullname != PEFT or getattr(self.asking, "others", False):
            return None
        self.asking.others = True
        try:
            others = (finder for finder in [*sys.meta_path] if finder is not self and hasattr(finder, "find_spec"))
            spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        finally:
            self.asking.others = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            import_module(METHOD)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
