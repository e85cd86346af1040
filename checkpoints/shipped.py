"""The adapters that come with this repository: one folder each, beside this file."""

import json
from pathlib import Path

from retention_gates.gates.adapter.files import CONFIG_NAME, WEIGHTS_NAME

FOLDER = Path(__file__).resolve().parent


def shipped_adapters(folder: Path = FOLDER) -> dict[str, Path]:
    """The base model's name on the Hub -> the folder of the gates that were trained for it."""
    found = {}
    for config in sorted(folder.glob(f"*/{CONFIG_NAME}")):
        if (config.parent / WEIGHTS_NAME).is_file():
            base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
            found[base] = config.parent
    return found


def shipped_adapter(base_model: str | None = None, folder: Path = FOLDER) -> Path:
    """The folder of the adapter for a base model, or of the only one there is if none is named.

    Raises:
        ValueError: if none is here, as for another model, or where the package was installed without its weights.
    """
    found = shipped_adapters(folder)
    if base_model is None and len(found) == 1:
        return next(iter(found.values()))
    if base_model not in found:
        here = f"There are some for {', '.join(found)}" if found else f"{folder} has none: they are in the repository"
        raise ValueError(f"No gates for {base_model!r} come with retention-gates. {here}. Train them: see README.md.")
    return found[base_model]
