"""Uploads a converted folder to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .original import ConversionError


def check_repository(repository: str) -> None:
    """Raises `ConversionError` for what an upload would fail of after a conversion that may take an hour.

    Args:
        repository: as USER/NAME.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConversionError(f"--push-to-hub {repository}: {error}") from error
    if "/" not in repository:
        raise ConversionError(f"--push-to-hub {repository}: name the user or organization too, as USER/{repository}")
    try:
        HfApi().whoami()
    except Exception as error:  # the type depends on the release: of the network, of the server, of a missing token
        raise ConversionError(
            f"--push-to-hub {repository}: the Hub cannot tell who you are ({_reason(error)}): run `hf auth login`, and be online"
        ) from error


def push(folder: Path, repository: str, private: bool) -> str:
    """Uploads everything in the folder in one commit, to a repository that is made where there is none.

    Args:
        folder: a converted checkpoint.
        repository: as USER/NAME.
        private: whether a repository that is made is private.

    Returns:
        The address of the commit, whose last part is what `revision` and `code_revision` pin.

    Raises:
        ConversionError: the Hub refuses or cannot be reached. The folder stays.
    """
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Convert to transformers with m3-convert"
        )
    except Exception as error:  # as above
        raise ConversionError(
            f"{folder} is written, but {repository} did not take it ({_reason(error)}). To try again: "
            f"hf upload {repository} {folder}"
        ) from error
    return str(commit.commit_url)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
