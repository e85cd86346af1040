"""Imports every module of the installed package and prints how many there are and where they lie.

Run as a script in the environment to be tested. Modules are found as files, since pkgutil does not descend into
`kernels` and `data`, which have no __init__.py.
"""

import importlib
from pathlib import Path

import retention_gates

# Subclasses of another package's classes; `serve` says what to install before it imports them.
NEED_EXTRAS = {"recipes.serving.connections": "uvicorn", "recipes.serving.server": "uvicorn"}
FOLDERS = ("gates", "trainers", "data", "kernels", "recipes", "checkpoints")


def module_names(package: Path, folder: str) -> list[str]:
    """Gives the dotted name of every module of `package` under `folder`; an __init__.py goes by its folder's name."""
    names = []
    for file in sorted((package / folder).glob("**/*.py")):
        parts = [package.name, *file.relative_to(package).with_suffix("").parts]
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def main() -> None:
    package = Path(retention_gates.__file__).parent
    found = {folder: module_names(package, folder) for folder in FOLDERS}
    if missing := [folder for folder, names in found.items() if not names]:
        raise SystemExit(f"{package} holds no module under {', '.join(missing)}")
    names = [package.name + ".cli", *(name for names in found.values() for name in names)]
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != NEED_EXTRAS.get(name.removeprefix(f"{package.name}.")):
                raise
    print(f"{len(names)} modules imported from {package}")


if __name__ == "__main__":
    main()
