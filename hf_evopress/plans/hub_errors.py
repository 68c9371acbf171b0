"""Clear one-line errors for failures of the Hub, with the way out; retries."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
ATTEMPTS = 5
LONGEST_WAIT = 60.0  # seconds; a server that asks for more is not waited for

_TOKEN = "log in with `hf auth login` or set HF_TOKEN"


def patiently(call: Callable[[], T]) -> T:
    """Return what `call` returns, repeated where the Hub limits the rate of requests (429).

    Waits as long as the answer's Retry-After says, else 1, 2, 4, 8 seconds. The client does this
    by itself for downloads only.
    """
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(ATTEMPTS - 1):
        try:
            return call()
        except HfHubHTTPError as error:
            response = getattr(error, "response", None)
            if response is None or response.status_code != 429:
                raise
            said = response.headers.get("Retry-After", "")
            seconds = float(said) if said.isdigit() else 2.0**attempt
            if seconds > LONGEST_WAIT:
                raise
            time.sleep(seconds)
    return call()


@contextmanager
def clear_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises about `repo_id` into OSErrors that name the way out."""
    from huggingface_hub.errors import EntryNotFoundError, HTTPError, OfflineModeIsEnabled

    try:
        yield
    except (HTTPError, OfflineModeIsEnabled, EntryNotFoundError) as error:
        raise _explained(error, repo_id, revision) from error
    except RuntimeError as error:
        # the client wraps whatever ends an upload in a bare RuntimeError
        if not isinstance(error.__cause__, (HTTPError, OSError)):
            raise
        cause = _explained(error.__cause__, repo_id, revision)
        raise type(cause)(f"{error} {cause}; nothing was committed, run it again") from error


def _explained(error: BaseException, repo_id: str, revision: str | None) -> OSError:
    from huggingface_hub import errors

    where = f"{repo_id}@{revision}" if revision else repo_id
    match error:
        case errors.LocalEntryNotFoundError() if isinstance(error.__cause__, errors.HTTPError):
            return _explained(error.__cause__, repo_id, revision)
        case errors.OfflineModeIsEnabled() | errors.LocalEntryNotFoundError():
            return ConnectionError(f"{where} is not in the cache and the Hub cannot be asked")
        case errors.RevisionNotFoundError():
            return FileNotFoundError(
                f"{repo_id} has no revision {revision!r}; give a branch, a tag or a commit"
            )
        case errors.GatedRepoError():
            return PermissionError(f"{repo_id} is gated: ask for access on its page, and {_TOKEN}")
        case errors.RepositoryNotFoundError():
            return FileNotFoundError(
                f"there is no {repo_id} on the Hub, or it is private: {_TOKEN}"
            )
        case errors.EntryNotFoundError():
            return FileNotFoundError(f"{where} lacks a file: {_first_line(error)}")
        case errors.HfHubHTTPError():
            return _by_status(error, where)
    return ConnectionError(f"the Hub did not answer about {where}: {_first_line(error)}")


def _by_status(error: BaseException, where: str) -> OSError:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    if status in (401, 403):
        return PermissionError(f"the Hub refuses this token for {where} ({status}): {_TOKEN}")
    if status in (409, 412):
        return OSError(f"{where} was changed by someone else meanwhile ({status}); run it again")
    if status == 429:
        wait = response.headers.get("Retry-After") if response is not None else None
        when = f"in {wait} seconds" if wait else "in some minutes"
        return OSError(f"the Hub limits the rate of requests (429) for {where}: try again {when}")
    return OSError(f"the Hub answered {status or 'with an error'} about {where}: {error}")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
