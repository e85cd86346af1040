"""Adapters of the Hub: download one as a folder, upload a folder as one commit."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, RepositoryNotFoundError

from retention_gates.checkpoints.card import CARD_NAME
from retention_gates.gates.adapter.config import RetentionGateConfig
from retention_gates.gates.adapter.files import CONFIG_NAME, WEIGHTS_NAME, find_file

NAME = r"[\w.-]+/[\w.-]+"


def download_adapter(name: str, *, token: str | None = None) -> Path:
    """The folder of an adapter: `name` itself if it is one, else one in the Hub's cache, all files of one commit.

    Args:
        name: folder, user/adapter or user/adapter@revision, where revision is a branch, a tag or a commit.

    Raises:
        ValueError: if there is no adapter of retention gates, saying what was found and what to do.
    """
    if Path(name).is_dir():
        return Path(name)
    repository, revision = split_revision(name)
    config = find_file(repository, CONFIG_NAME, revision=revision, token=token)
    # before the weights: those of another method may be large
    RetentionGateConfig.check_kwargs(**RetentionGateConfig.from_json_file(str(config)))
    commit = config.parent.name
    return find_file(repository, WEIGHTS_NAME, revision=commit, token=token).parent


def split_revision(name: str) -> tuple[str, str | None]:
    """user/adapter@revision -> (user/adapter, revision); without a revision, (name, None)."""
    repository, at, revision = name.partition("@")
    if at and not (repository and revision):
        raise ValueError(f"{name!r} must be a folder, user/adapter, or user/adapter@revision.")
    return repository, revision or None


def push_adapter(
    folder: Path,
    repository: str,
    card: str,
    *,
    base_model: str | None = None,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Upload retention gates",
) -> CommitInfo:
    """Uploads config, weights and card of an adapter as one commit, and makes the repository if there is none.

    Args:
        folder: an adapter; it is checked as if it were loaded, and nothing else that lies in it is uploaded.
        repository: user/adapter.
        card: the text of README.md.
        base_model: replaces the base model's name in the uploaded config, for an adapter that was trained on a folder.
        revision: a branch, which is made if there is none.

    Raises:
        ValueError: for what is no adapter, a wrong name, a missing token, or a public repository where a private one
            was asked for.
    """
    if not re.fullmatch(NAME, repository):
        raise ValueError(f"{repository!r} is no name of a repository: it should read user/adapter.")
    RetentionGateConfig.from_pretrained(str(folder))
    config = uploaded_config(folder, base_model)
    operations = [
        CommitOperationAdd(CONFIG_NAME, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()),
        CommitOperationAdd(WEIGHTS_NAME, str(folder / WEIGHTS_NAME)),
        CommitOperationAdd(CARD_NAME, card.encode()),
    ]
    api = HfApi(token=token)
    try:
        _make_repository(api, repository, private)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        return api.create_commit(repository, operations, commit_message=message, revision=revision)
    except HFValidationError as error:
        raise ValueError(f"{repository!r} is no name of a repository: {error}") from error
    except LocalTokenNotFoundError as error:
        raise ValueError(_no_token(repository)) from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise ValueError(_no_token(repository)) from error
        raise ValueError(f"The Hub did not take {repository}: {error}") from error


def uploaded_config(folder: Path, base_model: str | None) -> dict[str, Any]:
    """The adapter's config as others should get it, with a base model that they can load.

    Raises:
        ValueError: if the base model is a folder of this machine, or a name that differs from the one asked for.
    """
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    recorded = config.get("base_model_name_or_path")
    name = base_model or recorded or ""
    if not re.fullmatch(NAME, name) or Path(name).is_dir():
        raise ValueError(
            f"The adapter's base model is {name!r}, which others cannot load: say what it is called on the Hub, with "
            "--base-model user/model."
        )
    return config | {"base_model_name_or_path": name}


def _make_repository(api: HfApi, repository: str, private: bool) -> None:
    try:
        is_private = api.repo_info(repository).private
    except RepositoryNotFoundError:
        api.create_repo(repository, private=private, exist_ok=True)
        return
    if private and not is_private:
        raise ValueError(
            f"{repository} exists and is public: make it private in its settings on the Hub, or name another one."
        )


def _no_token(repository: str) -> str:
    return (
        f"The Hub ({constants.ENDPOINT}) does not let you write to {repository}: log in with hf auth login, set "
        "HF_TOKEN, or give --token, with a token that may write there."
    )
