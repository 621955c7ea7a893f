"""Uploads a Hugging Face folder to the hub: first whether that will be possible, then the folder in one commit.

The token is the one of `HF_TOKEN` or of `hf auth login`; it is never an argument, which other users could read. Files
that the hub has already are not sent again, so an upload that broke is repeated by the same command.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id


def check_access(name: str) -> None:
    """Raises ValueError, in one line, where `name` is no name of a repository, or the hub cannot be reached or does not
    know the token: before hours of work and not after them."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"--push: {error}") from None
    with _in_one_line():
        _hub().whoami()


def upload(folder: Path, name: str, *, private: bool) -> str:
    """Uploads the files of `folder` as the model repository `name`, made where it does not exist (`private` counts only
    then); returns its address. Raises ValueError in one line."""
    with _in_one_line():
        repository = _hub().create_repo(name, private=private, exist_ok=True)
        _hub().upload_folder(
            repo_id=repository.repo_id,
            folder_path=folder,
            commit_message=f"{folder.resolve().name}, exported by megatron_papo",
            ignore_patterns=[".cache/**", "*.tmp"],
        )
        return str(repository)


def _hub() -> HfApi:
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"))


@contextmanager
def _in_one_line() -> Iterator[None]:
    """What the hub's client raises, as a ValueError of one line that names the option."""
    try:
        yield
    except LocalTokenNotFoundError:
        raise ValueError("--push: no token for the hub: set HF_TOKEN, or run `hf auth login`") from None
    except OfflineModeIsEnabled:
        raise ValueError("--push: HF_HUB_OFFLINE is set, and the hub is needed") from None
    except Exception as error:  # the classes of whichever HTTP library the client uses
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"--push: the hub at {_hub().endpoint}: {reason}") from error
