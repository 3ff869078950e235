"""What an object store does with a condition on a write, found by trying: some take the header and ignore it without a word."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from kdcache.share.store_access import obstore
from kdcache.share.store_errors import Place, explain

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PROBES = "probes"  # the folder of keys that are made to learn about a store
_RACERS = 2  # more tell more, and some stores let racers wait for seconds; ``kdcache remote check`` has eight


def create_holds(store: ObjectStore, place: Place) -> bool:
    """Two writers create one object at once: exactly one may win, and one that comes later may not. Raises RemoteError."""
    with _probe(store, "create") as key:

        def create(number: int) -> bool:
            return _put(store, place, key, b"%d" % number, "create")

        with ThreadPoolExecutor(_RACERS) as pool:
            won = sum(pool.map(create, range(_RACERS)))
        return won == 1 and not create(_RACERS)


def swap_holds(store: ObjectStore, place: Place) -> bool:
    """An object is replaced by who names its version, and not by who names an older one. Raises RemoteError."""
    with _probe(store, "swap") as key:
        try:
            first = obstore().put(store, key, b"first", use_multipart=False)["e_tag"]
        except Exception as error:
            raise explain(error, place, "write", key) from None
        if not first:
            return False
        return _put(store, place, key, b"second", {"e_tag": first}) and not _put(store, place, key, b"third", {"e_tag": first})


@contextmanager
def _probe(store: ObjectStore, name: str) -> Iterator[str]:
    key = f"{PROBES}/{name}-{secrets.token_hex(8)}"
    try:
        yield key
    finally:
        with suppress(Exception):  # what went wrong before is what counts
            obstore().delete(store, key)


def _put(store: ObjectStore, place: Place, key: str, data: bytes, mode: Any) -> bool:
    """Whether the store took it; False where it named the condition."""
    from obstore.exceptions import AlreadyExistsError, NotSupportedError, PreconditionError

    try:
        obstore().put(store, key, data, mode=mode, use_multipart=False)
    except (AlreadyExistsError, PreconditionError, NotSupportedError):
        return False
    except Exception as error:
        raise explain(error, place, "create", key) from None
    return True
