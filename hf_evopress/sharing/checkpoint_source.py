"""A checkpoint folder, here or on the Hub, read file by file or by ranges of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..plans.hub_errors import clear_errors, patiently
from ..plans.repo import is_repo_id
from ..store.header import read_local
from .hub import check_paths


class LocalSource:
    """A folder of this machine."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        files = (path for path in self.folder.iterdir() if path.is_file())
        self.sizes = {path.name: path.stat().st_size for path in files}

    def file(self, name: str) -> Path:
        """Return where a whole file is."""
        return self.folder / name

    def read(self, name: str, start: int, end: int) -> bytes:
        """Return some bytes of a file."""
        return read_local(str(self.folder / name), start, end)


class HubSource:
    """A repository on the Hub, at the commit that its branch has now."""

    def __init__(
        self, repo_id: str, *, revision: str | None = None, token: str | None = None
    ) -> None:
        from huggingface_hub import HfApi

        self.repo_id, self.token = repo_id, token
        with clear_errors(repo_id, revision):
            api = HfApi(token=token)
            self.commit = patiently(lambda: api.model_info(repo_id, revision=revision)).sha
            tree = patiently(lambda: list(api.list_repo_tree(repo_id, revision=self.commit)))
        files: dict[str, Any] = {f.path: f for f in tree if hasattr(f, "blob_id")}
        check_paths(files)
        self.sizes = {name: int(f.size) for name, f in files.items()}

    def file(self, name: str) -> Path:
        """Return where a whole file is, after downloading it."""
        from huggingface_hub import hf_hub_download

        with clear_errors(self.repo_id, self.commit):
            path = hf_hub_download(self.repo_id, name, revision=self.commit, token=self.token)
        return Path(path)

    def read(self, name: str, start: int, end: int) -> bytes:
        """Return some bytes of a file; they alone are downloaded."""
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        headers = {**build_hf_headers(token=self.token), "Range": f"bytes={start}-{end - 1}"}
        url = hf_hub_url(self.repo_id, name, revision=self.commit)

        def get() -> Any:
            response = get_session().get(url, headers=headers, follow_redirects=True)
            hf_raise_for_status(response)
            return response

        with clear_errors(self.repo_id, self.commit):
            response = patiently(get)
        if response.status_code != 206:
            raise OSError(f"{url} was sent whole: the server gives no ranges of bytes; pull it")
        return bytes(response.content)


def open_source(
    source: str | Path, *, revision: str | None = None, token: str | None = None
) -> LocalSource | HubSource:
    """Return the checkpoint that `source` names: a folder, or a repository on the Hub."""
    if Path(source).is_dir():
        return LocalSource(source)
    if not is_repo_id(source):
        raise FileNotFoundError(f"no folder {source}, and no repository is named so")
    return HubSource(str(source), revision=revision, token=token)
