"""An obstore client for a URL.

Credentials and endpoint from the usual variables, time-outs, retries; never used after a fork.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from kdcache.errors import RecipeError, RemoteError
from kdcache.share.stores.redaction import redact
from kdcache.share.stores.store_errors import Place

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
SCHEMES = tuple(_ENDPOINTS)
_RETRIES: Any = {  # about ten seconds in all where nothing answers: each wait is drawn from the last one and its double
    "max_retries": 10,
    "backoff": {"init_backoff": timedelta(milliseconds=300), "max_backoff": timedelta(seconds=10), "base": 2},
    "retry_timeout": timedelta(minutes=3),
}
_runtime: list[int] = []  # the process in which obstore's threads run


def open_store(url: str, environment: Mapping[str, str] | None = None) -> tuple[ObjectStore, Place]:
    """A client for s3://, gs:// or az://, then BUCKET[/PREFIX].

    RecipeError where variables and URL do not fit together.
    """
    obstore()
    from obstore.store import AzureStore, GCSStore, S3Store

    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.strip("/").partition("/")
    settings = os.environ if environment is None else environment
    endpoint = next((settings[name] for name in _ENDPOINTS[scheme] if settings.get(name)), "")
    shown = redact(f"{scheme}://{bucket}{'/' if prefix else ''}{prefix}", {})
    place = Place(scheme, bucket, shown, endpoint=redact(endpoint, settings), environment=environment)
    kind: Any = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[scheme]
    given = {"config": {name.lower(): value for name, value in environment.items()}} if environment is not None else {}
    try:
        return kind(
            bucket, prefix=prefix or None, client_options=_client(endpoint), retry_config=_RETRIES, **given
        ), place
    except Exception as error:
        message = redact(str(error).split("\n", 1)[0], settings)
        raise RecipeError(
            f"cannot open {place.at}: {message}", "Check the variables that name the account, its key and the endpoint."
        ) from None


def obstore() -> Any:
    """The library, in the process that first asked for it.

    RemoteError in a fork of that process, where its calls would hang.
    """
    if _runtime and _runtime[0] != os.getpid():
        raise RemoteError(
            "an object store was opened before this process was forked, and none works in it",
            "Start worker processes with the method 'spawn', and open the remote in them.",
        )
    _runtime[:] = [os.getpid()]
    import obstore as library

    return library


def _client(endpoint: str) -> Any:
    """A stalled connection ends after two minutes, a living one after an hour.

    A part over a slow line takes its time.
    """
    return {
        "allow_http": endpoint.startswith("http://"),
        "connect_timeout": timedelta(seconds=5),
        "read_timeout": timedelta(minutes=2),
        "timeout": timedelta(hours=1),
    }
