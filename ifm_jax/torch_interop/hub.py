"""The Hugging Face hub: uploads an exported folder, and fetches one for `hf://USER/REPO`.

huggingface_hub is imported only when one of these is called.
"""

import importlib
import os
import pathlib
import re
from typing import Any

from ifm_jax.errors import RunError, UsageError

PREFIX = "hf://"
# The files of a folder that timm reads; see `timm_folder`.
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_REPO = re.compile(r"[\w.-]+/[\w.-]+")


def check_repo(repo: str, given: str) -> None:
    """Checks the name of a repository on the hub.

    Args:
      repo: name to check.
      given: the argument as given, for the error.

    Raises:
      UsageError: if it is not USER/REPO.
    """
    if not _REPO.fullmatch(repo):
        raise UsageError(f"{given}: expected USER/REPO, such as {PREFIX}me/resnet50-ifm or --push=me/resnet50-ifm")


def fetch(name: str) -> pathlib.Path:
    """Returns a local folder with the weights and the config of a repository on the hub.

    huggingface_hub downloads the files into its cache, or finds them there.

    Args:
      name: `hf://USER/REPO`, or `hf://USER/REPO@REVISION` for a branch, tag or commit.

    Raises:
      UsageError: if the name is another, huggingface_hub is missing, or the repository has no such files.
      RunError: if the hub cannot be reached.
    """
    repo, _, revision = name.removeprefix(PREFIX).partition("@")
    check_repo(repo, name)
    hub = _import_hub()
    try:
        folder = hub.snapshot_download(repo, revision=revision or None, allow_patterns=[WEIGHTS, CONFIG])
    except Exception as error:  # the library and those below it raise errors of many kinds
        raise RunError(
            f"{name} could not be fetched ({_first_line(error)}): expected a public repository, or `hf auth login` for "
            "a private one"
        ) from None
    folder = pathlib.Path(folder)
    if not (folder / WEIGHTS).is_file():
        raise UsageError(f"{name} has no {WEIGHTS}: expected a repository that `to-torch --for=timm` or timm has made")
    return folder


def push(folder: str | os.PathLike[str], repo: str, *, private: bool = False) -> str:
    """Uploads an exported folder and creates the repository if there is none; returns the address of the commit.

    Args:
      folder: folder that `timm_folder.write` has made; only its three files are uploaded.
      repo: `USER/REPO`.
      private: create the repository as a private one; an existing one keeps its visibility.

    Raises:
      UsageError: if the name is another, or huggingface_hub is missing.
      RunError: if the hub rejects the upload or cannot be reached; the folder is intact.
    """
    check_repo(repo, f"--push={repo}")
    api = _import_hub().HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=os.fspath(folder),
            allow_patterns=[WEIGHTS, CONFIG, CARD],
            commit_message="Weights exported by ifm_jax",
        )
    except Exception as error:  # likewise
        raise RunError(
            f"--push={repo} failed ({_first_line(error)}); {folder} is complete: run `hf auth login`, then the same "
            "command with --overwrite"
        ) from None
    return str(done)


def require() -> None:
    """Raises a `UsageError` if huggingface_hub is not installed."""
    _import_hub()


def _import_hub() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise UsageError("the hub requires huggingface_hub: pip install huggingface_hub") from None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
