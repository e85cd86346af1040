"""Where the files of an adapter are: in a folder, or on the Hub and then in its cache."""

import errno
import os
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
FILES_SHOWN = 8


def find_file(source: str | os.PathLike, name: str, **hub: Any) -> Path:
    """The file `name` of a folder, or of a repository on the Hub, downloaded to the cache if it is not there yet.

    Args:
        source: a folder, or a name on the Hub such as user/adapter.
        hub: arguments of `hf_hub_download`, such as revision, token, subfolder and cache_dir.

    Raises:
        ValueError: if it is not there or cannot be read, saying what was found and what to do.
    """
    folder = Path(source, hub.get("subfolder") or "")
    if not Path(source).is_dir():
        return _download(str(source), name, **hub)
    if not (folder / name).is_file():
        found = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        raise ValueError(f"{folder} has no {name} ({_listing(found)}): save or download it again.")
    return folder / name


def _download(repository: str, name: str, **hub: Any) -> Path:
    at = f" at revision {hub['revision']!r}" if hub.get("revision") else ""
    try:
        return Path(hf_hub_download(repository, name, **hub))
    except HFValidationError as error:
        raise ValueError(f"{repository!r} is no folder, and no name on the Hub such as user/adapter.") from error
    except GatedRepoError as error:
        raise ValueError(
            f"{repository} is gated: accept its terms on its page on the Hub, then log in with hf auth login or set "
            "HF_TOKEN to a token of that account."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"There is no folder {repository}, and the Hub ({constants.ENDPOINT}) shows no repository of that name. "
            "If it is private, log in with hf auth login or set HF_TOKEN to a token that may read it."
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(
            f"{repository} has no revision {hub.get('revision')!r}: name a branch, a tag or a commit of it."
        ) from error
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{name} of {repository}{at} is not in the cache, and the Hub ({constants.ENDPOINT}) cannot be asked "
            f"({_reason(error)}). Try again with a connection."
        ) from error
    except EntryNotFoundError as error:
        found = sorted(HfApi(token=hub.get("token")).list_repo_files(repository, revision=hub.get("revision")))
        hint = ""
        if name in (CONFIG_NAME, WEIGHTS_NAME):
            hint = ": it holds no adapter of retention gates. If it is the authors', run retention-gates convert"
        raise ValueError(f"{repository}{at} has no {name} ({_listing(found)}){hint}.") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ValueError(
                f"The disk is full: {name} of {repository} could not be downloaded to "
                f"{hub.get('cache_dir') or constants.HF_HUB_CACHE}. Make room there, or set HF_HOME to a folder on "
                "another disk."
            ) from error
        if isinstance(error, HfHubHTTPError):
            raise ValueError(f"The Hub refused to give {name} of {repository}{at}: {error}") from error
        raise


def _reason(error: BaseException) -> str:
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    cause = error.__cause__ or error.__context__ or error
    return f"{type(cause).__name__}: {cause}".splitlines()[0]


def _listing(found: list[str]) -> str:
    if not found:
        return "it is empty"
    more = f" and {len(found) - FILES_SHOWN} more" if len(found) > FILES_SHOWN else ""
    return "found: " + ", ".join(found[:FILES_SHOWN]) + more
