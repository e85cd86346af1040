"""The releases of torch, transformers and PEFT that this package was tested with."""

import warnings
from collections.abc import Sequence
from importlib.metadata import version

from packaging.version import Version

# package -> its oldest and its newest tested minor release; pyproject.toml has the same ranges
TESTED = {
    "torch": ("2.11", "2.13"),
    "transformers": ("5.17", "5.24"),
    "peft": ("0.21", "0.21"),
}


def check_versions() -> None:
    """Warns if an installed version is newer than the tested ones, or between releases (dev, alpha, rc).

    Raises:
        ValueError: if one is older, since it lacks what this package needs.
    """
    older, untested = [], []
    for package, (oldest, newest) in TESTED.items():
        installed = Version(version(package))
        minor = installed.release[:2]
        if minor < Version(oldest).release:
            older.append(package)
        elif minor > Version(newest).release or installed.is_prerelease:
            untested.append(package)
    if older:
        raise ValueError(f"retention-gates does not run with {_installed(older)}. {_install(older)}")
    if untested:
        warnings.warn(
            f"retention-gates was not tested with {_installed(untested)}. If an error or a result surprises you: "
            + _install(untested),
            stacklevel=3,  # who imports the package
        )


def requirement(package: str) -> str:
    """Returns the tested releases in pip's form: "peft>=0.21,<0.22"."""
    oldest, newest = TESTED[package]
    major, minor = Version(newest).release
    return f"{package}>={oldest},<{major}.{minor + 1}"


def _installed(packages: Sequence[str]) -> str:
    tested = {name: " to ".join(dict.fromkeys(TESTED[name])) for name in packages}
    return ", ".join(f"{name} {version(name)} (releases of {tested[name]} are tested)" for name in packages)


def _install(packages: Sequence[str]) -> str:
    return "Install tested releases: pip install " + " ".join(f"'{requirement(name)}'" for name in packages)
