"""Opens the remote at a URL or at KDCACHE_REMOTE; checks the URL before any request is sent."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from kdcache.errors import RecipeError
from kdcache.share.stores.store_client import redact

if TYPE_CHECKING:
    from kdcache.share.stores.base import Remote

VARIABLE = "KDCACHE_REMOTE"
KINDS = "a directory, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX"
_STORES = ("s3", "gs", "az")
_OTHER_NAMES = {"s3a": "s3", "gcs": "gs", "azure": "az", "abfs": "az", "abfss": "az", "adl": "az"}
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_PREFIX = re.compile(r"[A-Za-z0-9._=+-]+(/[A-Za-z0-9._=+-]+)*")


def default_remote() -> Remote:
    """The team's remote, named by KDCACHE_REMOTE. Raises RecipeError if the variable is unset or invalid."""
    url = os.environ.get(VARIABLE, "").strip()
    if not url:
        raise RecipeError(f"{VARIABLE} is not set", f"Name the team's remote: export {VARIABLE}=URL with {KINDS}.")
    return open_remote(url)


def open_remote(url: str) -> Remote:
    """The remote at a directory path, file://, s3://, gs:// or az:// URL.

    Raises RecipeError if the URL is invalid, or the directory does not exist.
    """
    scheme, separator, rest = url.strip().partition("://")
    if not separator:
        return _directory(url.strip())
    scheme = scheme.lower()
    if scheme == "file":
        return _directory(_file_path(url))
    if scheme in _OTHER_NAMES:
        raise RecipeError(f"'{redact(url)}' names no remote", f"Write it as {_OTHER_NAMES[scheme]}://BUCKET/PREFIX.")
    if scheme not in _STORES:
        raise RecipeError(f"'{redact(url)}' names no remote: '{scheme}' is not known", f"A remote is {KINDS}.")
    _check_store(url, scheme, rest)
    from kdcache.share.stores.object_store import open_object_store

    return open_object_store(f"{scheme}://{rest.strip('/')}")


def _check_store(url: str, scheme: str, rest: str) -> None:
    shown = redact(url)
    if "@" in rest or "?" in rest or "#" in rest:
        raise RecipeError(
            f"'{shown}' holds more than a bucket and a prefix",
            "Credentials and endpoints belong into variables: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
            "AWS_ENDPOINT_URL and their like.",
        )
    bucket, _, prefix = rest.strip("/").partition("/")
    if not bucket or rest.startswith("/"):
        raise RecipeError(f"'{shown}' names no bucket", f"Write it as {scheme}://BUCKET/PREFIX.")
    if not _BUCKET.fullmatch(bucket):
        raise RecipeError(f"'{bucket}' in '{shown}' is no name of a bucket", f"Write it as {scheme}://BUCKET/PREFIX.")
    if prefix and (not _PREFIX.fullmatch(prefix) or {".", ".."} & set(prefix.split("/"))):
        raise RecipeError(
            f"'{prefix}' in '{shown}' is no prefix",
            "Use letters, digits, '.', '_' and '-', with single slashes between them.",
        )


def _file_path(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path or parts.query or parts.fragment:
        raise RecipeError(
            f"'{redact(url)}' names no directory of this machine",
            "Write it as file:///path/to/directory, or as the path alone.",
        )
    return unquote(parts.path)


def _directory(name: str) -> Remote:
    if not name or "\0" in name:
        raise RecipeError(f"{name!r} names no remote", f"A remote is {KINDS}.")
    path = Path(name).expanduser()
    if not path.exists():
        raise RecipeError(
            f"there is no directory '{path}'",
            f"For a new remote, make it once: mkdir -p '{path}'. If it is on a shared disk, mount that disk first.",
        )
    if not path.is_dir():
        raise RecipeError(f"'{path}' is a file, and a remote is a directory", f"A remote is {KINDS}.")
    from kdcache.share.stores.directory import DirectoryRemote

    return DirectoryRemote(path)
