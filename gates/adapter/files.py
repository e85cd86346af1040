"""Where the files of an adapter are: in a folder, or on the Hub and then in its cache."""

import errno
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
FILES_SHOWN = 8
WAITS = (1.0, 2.0, 4.0)  # seconds before a busy Hub is asked again
BUSY = (408, 429, 500, 502, 503, 504)
REFUSED = (401, 403, 404, 410, 451)
Result = TypeVar("Result")


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


def retried(ask: Callable[[], Result]) -> Result:
    """Returns what `ask` does, which is called again where the Hub was busy (HTTP 503 and the like) or not reached.

    huggingface_hub does so by itself for a file's metadata, and not for the file. A Hub that is not reached is asked
    once more, a busy one as often as there are WAITS.
    """
    for count, wait in enumerate(WAITS):
        try:
            return ask()
        except (OSError, HTTPError) as error:
            if not (_is_busy(error) or (count == 0 and _is_unreached(error))):
                raise
        time.sleep(wait)
    return ask()


def _download(repository: str, name: str, **hub: Any) -> Path:
    at = f" at revision {hub['revision']!r}" if hub.get("revision") else ""
    try:
        if not _has_newest(repository, name, hub):
            hub = hub | {"local_files_only": True}
        return Path(retried(lambda: hf_hub_download(repository, name, **hub)))
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
        raise ValueError(_out_of_reach(repository, name, at, error)) from error
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
    except HTTPError as error:
        raise ValueError(_out_of_reach(repository, name, at, error)) from error


def _has_newest(repository: str, name: str, hub: dict[str, Any]) -> bool:
    """Whether the Hub gives the file or says why not; False: only the cache does, which is said if the Hub refuses.

    huggingface_hub takes what is in the cache without a word, and where nothing is, asks for half a minute.
    """
    revision, folder = hub.get("revision"), hub.get("subfolder") or None
    if constants.HF_HUB_OFFLINE or hub.get("local_files_only") or hub.get("force_download"):
        return True
    path = name if folder is None else f"{folder}/{name}"
    cached = try_to_load_from_cache(repository, path, cache_dir=hub.get("cache_dir"), revision=revision)
    if isinstance(cached, str) and re.fullmatch("[0-9a-f]{40}", revision or ""):
        return True  # a commit does not change
    try:
        url = hf_hub_url(repository, name, subfolder=folder, revision=revision)
        retried(lambda: get_hf_file_metadata(url, token=hub.get("token")))
    except (EntryNotFoundError, RevisionNotFoundError):
        raise
    except HTTPError as error:
        if not isinstance(cached, str):
            raise
        status = _status(error)
        if status in REFUSED:
            warnings.warn(
                f"The Hub ({constants.ENDPOINT}) does not give {repository} any more (HTTP {status}): it was deleted, "
                f"made private or gated. The copy in the cache is used, {Path(cached).parent}; log in with hf auth "
                "login if you may read it, or delete the copy if it must not be used.",
                stacklevel=2,
            )
        return False
    return True


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status that the Hub answered with."""
    answers = (getattr(each, "response", None) for each in _causes(error) if isinstance(each, HfHubHTTPError))
    return next((answer.status_code for answer in answers if answer is not None), None)


def _is_busy(error: BaseException) -> bool:
    """Whether the Hub may answer in a moment; not where huggingface_hub has asked again and again."""
    return _status(error) in BUSY and not any(isinstance(each, LocalEntryNotFoundError) for each in _causes(error))


def _is_unreached(error: BaseException) -> bool:
    return isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError)


def _out_of_reach(repository: str, name: str, at: str, error: BaseException) -> str:
    return (
        f"There is no folder {repository}, {name} of that name{at} is not in the cache, and the Hub "
        f"({constants.ENDPOINT}) cannot be asked ({_reason(error)}). Name a folder, or try again with a connection."
    )


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
