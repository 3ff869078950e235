"""Object stores as remotes, through obstore: S3 and compatible stores, Google Cloud Storage, Azure.

obstore signs, retries and streams in Rust, without the GIL. This module adds what it leaves open: whether a store has
conditional creates (found by a probe, because some accept the condition and ignore it), whether a request whose answer
was lost succeeded (found by reading back), the order of keys (some list by folder), and readable errors.

obstore's runtime does not survive a fork: the child has no worker threads and would hang. So worker processes are
spawned, and a forked child gets an error at its first call.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.errors import DamageError, MissingObjectError, RemoteError
from kdcache.share.stores.base import Entry, check_key, check_prefix, holds, is_key
from kdcache.share.stores.store_client import (
    Place,
    explain,
    is_lost,
    is_whole,
    obstore,
    open_store,
    out_of_range,
)

if TYPE_CHECKING:
    from obstore.store import ObjectStore


BLOCK = 1 << 20  # bytes, at least, of one block of a read
PART = 8 << 20  # bytes of one part of a multipart upload, more for files that would need over MOST_PARTS
MOST_PARTS = 9000  # S3 ends at 10,000
PARTS_AT_ONCE = 3  # of one file on their way, while one more is read
IN_FLIGHT = 64 << 20  # bytes of all uploads together
PROBES = "probes"  # the folder of keys that are made to learn about a store
_CLOCK = f"{PROBES}/clock"  # one object, written again and again
_decides: dict[tuple[str, str, str], bool] = {}  # (scheme, endpoint, bucket) -> result of the probe in this process
_probing = threading.Lock()


class ObjectStoreRemote:
    """Objects under a prefix of one bucket; made by ``open_object_store``."""

    def __init__(self, store: ObjectStore, place: Place) -> None:
        self._store, self._place = store, place
        self._budget = ByteBudget(IN_FLIGHT)

    def __repr__(self) -> str:
        return f"ObjectStoreRemote({self.url!r})"

    @property
    def url(self) -> str:
        return self._place.url

    @property
    def where(self) -> str:
        return self._place.at

    @property
    def filesystem(self) -> str:
        return ""

    @property
    def conditional(self) -> bool:
        """True for Google and Azure by specification; an S3 store is probed once per process and bucket."""
        if self._place.scheme != "s3":
            return True
        known = (self._place.scheme, self._place.endpoint, self._place.bucket)
        with _probing:
            if known not in _decides:
                _decides[known] = create_holds(self._store, self._place)
            return _decides[known]

    def list(self, prefix: str) -> Iterator[Entry]:
        check_prefix(prefix)
        return self._listed(prefix)

    def head(self, key: str) -> Entry | None:
        try:
            metadata = obstore().head(self._store, check_key(key))
        except FileNotFoundError as error:
            self._need_bucket(error, "head", key)
            return None
        except Exception as error:
            raise explain(error, self._place, "head", key) from None
        return _entry(key, metadata)

    def read(self, key: str, *, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        check_key(key)
        if length == 0:
            if self.head(key) is None:
                raise self._missing(key)
            return iter(())
        return self._blocks(key, start, length)

    def read_bytes(self, key: str, limit: int) -> bytes:
        got = bytearray()
        for block in self.read(key):
            got += block
            if len(got) > limit:
                raise DamageError(f"'{key}' on {self.url} has more than the {limit} bytes it may have")
        return bytes(got)

    def write(self, key: str, source: Path | bytes) -> None:
        check_key(key)
        if isinstance(source, bytes):
            with self._budget.hold(len(source)):
                self._put(key, source, use_multipart=False)
            return
        try:
            size = source.stat().st_size
        except OSError as error:
            raise RemoteError(
                f"cannot send '{source}': {error.strerror}", "Check the cache: kdcache cache verify PATH"
            ) from None
        part = max(PART, -(-size // MOST_PARTS))
        at_once = max(1, min(PARTS_AT_ONCE, IN_FLIGHT // 2 // part - 1))
        with self._budget.hold(min(size, part * (at_once + 1))):
            self._put(key, source, use_multipart=size > PART, chunk_size=part, max_concurrency=at_once)

    def create(self, key: str, data: bytes) -> bool:
        check_key(key)
        if self.conditional:
            return self._create(key, data)
        there = holds(self, key, data)
        if there is None:
            self.write(key, data)
        return there is not False

    def delete(self, key: str) -> None:
        try:
            obstore().delete(self._store, check_key(key))
        except FileNotFoundError as error:
            self._need_bucket(error, "delete", key)
        except Exception as error:
            raise explain(error, self._place, "delete", key) from None

    def now(self) -> float:
        """The modification time of a probe object, in whole seconds. Needs write access."""
        self.write(_CLOCK, secrets.token_bytes(4))
        entry = self.head(_CLOCK)
        if entry is None:
            raise RemoteError(
                f"{self._place.at} does not show an object that was just written", "Ask for: kdcache remote check"
            )
        return entry.modified

    def compares_and_swaps(self) -> bool:
        return swap_holds(self._store, self._place)

    def remove_leftovers(self, age: float) -> int:  # noqa: ARG002 - of the protocol
        return 0

    def remove_empty_folders(self, prefix: str) -> None:
        pass

    def _listed(self, prefix: str) -> Iterator[Entry]:
        """Sorted, since some stores list folder by folder; keys that cannot be kdcache's are skipped."""
        folder = prefix.rpartition("/")[0] or None  # obstore matches whole parts of a path only
        try:
            entries = [
                _entry(item["path"], item)
                for chunk in obstore().list(self._store, folder, chunk_size=1000)
                for item in chunk
                if item["path"].startswith(prefix) and is_key(item["path"])
            ]
        except Exception as error:
            raise explain(error, self._place, "list") from None
        return iter(sorted(entries, key=lambda entry: entry.key))

    def _blocks(self, key: str, start: int, length: int | None) -> Iterator[bytes]:
        options: Any = {"range": {"offset": start}} if start else None
        if length is not None:
            options = {"range": (start, start + length)}
        try:
            yield from map(bytes, obstore().get(self._store, key, options=options).stream(min_chunk_size=BLOCK))
        except FileNotFoundError as error:
            self._need_bucket(error, "read", key)
            raise self._missing(key) from None
        except Exception as error:
            if is_whole(error):  # some stores answer a range that covers the object with status 200: obstore refuses
                yield from _cut(self._blocks(key, 0, None), start, length)
            elif not out_of_range(error):
                raise explain(error, self._place, "read", key) from None

    def _create(self, key: str, data: bytes) -> bool:
        """Whether this call created the object, judged by the bytes that are there afterwards.

        A 412 may answer this call's own request, repeated after its answer was lost; a 409 only says that another
        request was in progress.
        """
        for _ in range(4):
            failure: RemoteError | None = None
            try:
                self._raw_put(key, data, mode="create", use_multipart=False)
            except Exception as error:
                from obstore.exceptions import AlreadyExistsError, PreconditionError

                if not isinstance(error, AlreadyExistsError | PreconditionError):
                    failure = explain(error, self._place, "create", key)
                    if not is_lost(error):
                        raise failure from None
            else:
                return True
            there = holds(self, key, data)
            if there is not None:
                return there
            if failure:
                raise failure
        raise RemoteError(
            f"cannot create '{key}' on {self._place.at}: the store reports that it exists and does not return it",
            "Run the same command again; look at the store with: kdcache remote check",
        )

    def _put(self, key: str, source: Path | bytes, **options: Any) -> None:
        try:
            self._raw_put(key, source, **options)
        except Exception as error:
            raise explain(error, self._place, "write", key) from None

    def _raw_put(self, key: str, source: Path | bytes, **options: Any) -> None:
        obstore().put(self._store, key, source, **options)

    def _need_bucket(self, error: FileNotFoundError, method: str, key: str) -> None:
        made = explain(error, self._place, method, key)
        if "there is no bucket" in made.message:
            raise made from None

    def _missing(self, key: str) -> MissingObjectError:
        return MissingObjectError(f"there is no '{key}' on {self._place.at}")


def open_object_store(url: str, environment: Mapping[str, str] | None = None) -> ObjectStoreRemote:
    """The remote of a URL: s3://, gs:// or az://, then BUCKET[/PREFIX]. Sends no request yet.

    Credentials and endpoint come from the providers' usual variables in ``environment`` (None: this process). Raises
    RecipeError if they do not fit together.
    """
    return ObjectStoreRemote(*open_store(url, environment))


def _entry(key: str, metadata: Any) -> Entry:
    """In whole seconds: some stores list finer times than they give for a head."""
    return Entry(key, metadata["size"], float(int(metadata["last_modified"].timestamp())))


def _cut(blocks: Iterator[bytes], start: int, length: int | None) -> Iterator[bytes]:
    """``length`` bytes from ``start`` on."""
    at, end = 0, None if length is None else start + length
    for block in blocks:
        piece = block[max(start - at, 0) : None if end is None else max(end - at, 0)]
        at += len(block)
        if piece:
            yield piece
        if end is not None and at >= end:
            return


class ByteBudget:
    """Limits the bytes in flight to ``limit``; a larger request runs alone. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._taken = 0
        self._turn = threading.Lock()  # held while waiting, so that small requests cannot starve a large one
        self._freed = threading.Condition()

    @contextmanager
    def hold(self, count: int) -> Iterator[None]:
        """Wait for ``count`` bytes of the budget and hold them while the block runs."""
        with self._turn, self._freed:
            while self._taken and self._taken + count > self.limit:
                self._freed.wait()
            self._taken += count
        try:
            yield
        finally:
            with self._freed:
                self._taken -= count
                self._freed.notify_all()


_RACERS = 2  # some stores make writers wait for seconds; ``kdcache remote check`` uses eight


def create_holds(store: ObjectStore, place: Place) -> bool:
    """Whether of two simultaneous creates exactly one succeeds, and a later one fails. Raises RemoteError."""
    with _probe(store, "create") as key:

        def create(number: int) -> bool:
            return _put(store, place, key, b"%d" % number, "create")

        with ThreadPoolExecutor(_RACERS) as pool:
            won = sum(pool.map(create, range(_RACERS)))
        return won == 1 and not create(_RACERS)


def swap_holds(store: ObjectStore, place: Place) -> bool:
    """Whether a replacement succeeds with the current version tag only. Raises RemoteError."""
    with _probe(store, "swap") as key:
        try:
            first = obstore().put(store, key, b"first", use_multipart=False)["e_tag"]
        except Exception as error:
            raise explain(error, place, "write", key) from None
        if not first:
            return False
        return _put(store, place, key, b"second", {"e_tag": first}) and not _put(
            store, place, key, b"third", {"e_tag": first}
        )


@contextmanager
def _probe(store: ObjectStore, name: str) -> Iterator[str]:
    key = f"{PROBES}/{name}-{secrets.token_hex(8)}"
    try:
        yield key
    finally:
        with suppress(Exception):  # an earlier error matters more
            obstore().delete(store, key)


def _put(store: ObjectStore, place: Place, key: str, data: bytes, mode: Any) -> bool:
    """Whether the store accepted it; False if the condition failed."""
    from obstore.exceptions import AlreadyExistsError, NotSupportedError, PreconditionError

    try:
        obstore().put(store, key, data, mode=mode, use_multipart=False)
    except (AlreadyExistsError, PreconditionError, NotSupportedError):
        return False
    except Exception as error:
        raise explain(error, place, "create", key) from None
    return True
