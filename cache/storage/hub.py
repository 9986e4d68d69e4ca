"""Uploading a folder to the Hugging Face hub, with every way it can fail turned into one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from ...errors import TcsaeError
from ...system.untrusted_files import reason, shown

_NETWORK_PACKAGES = ("httpx", "httpcore", "requests", "urllib3", "aiohttp")
_LOG_IN = "run `hf auth login`, or set HF_TOKEN"


def upload(
    folder: Path,
    repository: str,
    kind: Literal["model", "dataset"],
    *,
    inside: str = "",
    ignore: tuple[str, ...] = (),
    private: bool = False,
    failure: type[TcsaeError],
) -> str:
    """Upload a folder; the repository is made if it is not there, files that are there already are not sent again.

    Args:
        folder: what is uploaded, whole.
        repository: ``OWNER/NAME``.
        kind: of the repository.
        inside: where to in the repository; by default its top.
        ignore: patterns of files that stay here.
        private: whether a repository that is made now can be seen by its owner alone.
        failure: the class of what is raised.

    Returns:
        The address of the repository's page.

    """
    from huggingface_hub import HfApi

    api = HfApi()
    with upload_failures(folder, repository, failure):
        page = api.create_repo(repository, repo_type=kind, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            repo_type=kind,
            folder_path=str(folder),
            path_in_repo=inside or None,
            ignore_patterns=list(ignore) or None,
        )
    return str(page)


@contextmanager
def upload_failures(what: object, repository: str, failure: type[TcsaeError]) -> Iterator[None]:
    """Turn what huggingface_hub raises while ``what`` is uploaded into ``failure``."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError:
        raise failure(f"{shown(repository)} is no name of a hub repository: write OWNER/NAME") from None
    except errors.LocalTokenNotFoundError:
        raise failure(f"no Hugging Face token is here to upload to {repository}: {_LOG_IN}") from None
    except Exception as problem:
        sentence = _sentence(problem, repository)
        if sentence is None:
            raise
        raise failure(f"{what} is complete here and not on the hub: {sentence}") from problem


def _sentence(problem: Exception, repository: str) -> str | None:
    from huggingface_hub import errors

    status = getattr(getattr(problem, "response", None), "status_code", None)
    owner = repository.split("/")[0]
    if status == 401:
        return f"it knows no token that may write to {repository}; {_LOG_IN}"
    if status == 403:
        return f"your token may not write to {repository}; use one with write access to {owner}, or name another owner"
    if status == 404:
        return f"it shows no {repository} (its owner does not exist, or your token may not see it); check the name"
    if isinstance(problem, errors.HfHubHTTPError):
        return f"it refused {repository} ({reason(problem)}); try again, or look at the repository's page"
    if is_network(problem):
        return f"it cannot be reached ({reason(problem)}); check the network (and HF_HUB_OFFLINE), then try again"
    if isinstance(problem, ValueError | OSError):  # an invalid card, a file that vanished
        return f"{repository} was not written ({reason(problem)}); mend that, then try again"
    return None


def is_network(problem: BaseException) -> bool:
    """Whether huggingface_hub, or what it is made of, says that the hub is out of reach."""
    from huggingface_hub import errors

    offline = (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)
    package = type(problem).__module__.split(".")[0].rstrip("0123456789")
    return isinstance(problem, offline) or (
        package in _NETWORK_PACKAGES and not isinstance(problem, errors.HfHubHTTPError)
    )
