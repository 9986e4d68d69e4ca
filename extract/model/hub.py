"""The Hugging Face hub: asked with short timeouts, and every way it can fail turned into one sentence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ...cache.storage.hub import is_network
from ...errors import TcsaeError

# Read by huggingface_hub when it is first imported: without a network nothing should wait for minutes.
os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "10")
os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "20")


@contextmanager
def hub_failures(kind: str, repo: str, failure: type[TcsaeError]) -> Iterator[None]:
    """Turn what huggingface_hub and datasets raise about ``repo`` (a ``kind``: "model" or "dataset") into
    ``failure``.
    """
    try:
        yield
    except TcsaeError:
        raise
    except Exception as problem:
        sentence = hub_sentence(kind, repo, problem)
        if sentence is None:
            raise
        raise failure(sentence) from problem


def hub_sentence(kind: str, repo: str, problem: BaseException) -> str | None:
    """What ``problem`` means for the user; None when it is not about reaching or entering the hub."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"
    chain = list(_chain(problem))
    if any(isinstance(e, errors.GatedRepoError) for e in chain):
        return (
            f"{kind} {repo} is gated and your token does not open it: accept its licence at {page}, "
            "then log in with `hf auth login` or set HF_TOKEN"
        )
    if any(isinstance(e, errors.RevisionNotFoundError) for e in chain):
        return f"{kind} {repo} exists on the hub but not in that revision: see {page} for its branches and tags"
    if any(isinstance(e, errors.RepositoryNotFoundError | errors.HFValidationError) for e in chain):
        return (
            f"there is no {kind} '{repo}': no such folder or file here, and the hub does not show it "
            f"(if it is private, log in with `hf auth login` or set HF_TOKEN)"
        )
    if any(is_network(e) for e in chain):
        return (
            f"the hub cannot be reached and {kind} {repo} is not complete in the local cache: "
            f"check the network, or pass a folder on this machine instead"
        )
    if any(isinstance(e, errors.HfHubHTTPError) for e in chain):
        return f"the hub refused {kind} {repo}: {first_line(problem)}"
    return None


def _chain(problem: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while problem is not None and id(problem) not in seen:
        seen.add(id(problem))
        yield problem
        problem = problem.__cause__ or problem.__context__


def first_line(problem: BaseException) -> str:
    """The first line of a library's complaint, for quoting inside one sentence."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return lines[0] if lines else type(problem).__name__
