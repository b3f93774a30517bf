"""Upload of an export to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError

from ropewalk.errors import UserError


def push(directory: Path, repository: str, *, private: bool) -> str:
    """Upload a directory, the record of its making left out; returns the address.

    The login is that of ``hf auth login``; no token is read or written here.

    Raises:
        UserError: where the hub cannot be reached or refuses; the export stays and the command can be repeated.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=directory, commit_message=f"Upload {directory.name}")
    except (OSError, HTTPError, HFValidationError) as error:
        raise UserError(
            f"push_to_hub={repository} failed ({' '.join(str(error).split())[:300]}); {directory} is whole: log in "
            "with `hf auth login`, check the name and the network, and repeat the command"
        ) from error
    print(f"uploaded {directory} to {address}")
    return str(address)
