"""The targets of the fuzzing program: for each kind of file a victim, changes of it, and a function that reads it.

A target gets a random generator and returns the changed files and a function that reads them. The function may return,
or raise a ``KdcacheError`` with an allowed exit code. Anything else is a finding. An attacker can write
manifest and files, so digests and checksums are computed again after a change.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.cache import layout
from kdcache.cache.canonical import NotCanonicalError, canonical_json, digest_of, parse_json
from kdcache.cache.digests import CheckedFile, CheckedFiles
from kdcache.cache.reader import Cache, open_cache
from kdcache.cache.selection import SELECTION
from kdcache.cache.tables import encode_tokens
from kdcache.cache.tokens import Tokens
from kdcache.cache.verify import verify
from kdcache.errors import DamageError
from kdcache.files import use_disk
from kdcache.share import keys as share_layout
from kdcache.share.gc import collect
from kdcache.share.intents import LeaseTiming
from kdcache.share.listing import find_caches, names, status
from kdcache.share.local_store import LocalStore
from kdcache.share.pull import fetch_manifest, pull
from kdcache.share.push import push
from kdcache.share.reading_through import read_through
from kdcache.share.ref_document import MAX_BYTES as MOST_OF_A_REF
from kdcache.share.refs import all_histories, history, resolve, tombstone
from kdcache.testing.caches import CODED, LAYERS, PER_TEXT, Plan, dump, made_teacher, made_texts, read_everything
from kdcache.testing.faults import Died, counting_disk, dying_disk
from kdcache.testing.memory_remote import MemoryRemote
from kdcache.testing.mutations import (
    EXTREMES,
    json_bytes,
    mutate_arrow,
    mutate_bytes,
    mutate_json,
    mutate_numbers,
    mutate_safetensors,
    mutate_shard,
)  # fmt: skip

if TYPE_CHECKING:
    from kdcache.files import FileDigest
    from kdcache.share.stores.base import Entry

REFUSED = (3, 4)  # damaged, or another cache
UNREACHED = (1, 3, 4)  # or a remote with wrong responses


@dataclass(frozen=True)
class Attempt:
    """A case. ``files``: the changed files by name; ``read``: reads the victim; ``allowed``: exit codes."""

    files: Mapping[str, bytes]
    read: Callable[[], object]
    allowed: tuple[int, ...] = REFUSED


Target = Callable[[random.Random], Attempt]

PLAN = Plan(made_texts(6, "train"), made_texts(2, "test"), (made_teacher(layers={0: CODED, **PER_TEXT, **LAYERS}),))
TEACHER = "bert"


def arrow(place: Path) -> Target:
    """Every Arrow file of a cache, read as a student reads it."""
    cache = _victim(place)
    return _file_target(cache, lambda path: path.endswith(".arrow"), mutate_arrow)


def zarr(place: Path) -> Target:
    """Shards. Their size and the bytes of their metadata follow from the manifest."""
    return _file_target(_victim(place), lambda path: "/c/" in path, lambda rng, data, _: mutate_shard(rng, data))


def safetensors(place: Path) -> Target:
    """Bases and codebooks."""
    return _file_target(_victim(place), lambda path: path.endswith(".safetensors"), mutate_safetensors)


def tokenizer(place: Path) -> Target:
    """Tokenizers."""
    return _file_target(_victim(place), lambda path: path.endswith("tokenizer.json"), mutate_bytes)


def manifest(place: Path) -> Target:
    """The manifest, with identity and checksum computed again; then all files that it lists."""
    root = _victim(place).path
    document = parse_json((root / layout.MANIFEST).read_bytes())

    def target(rng: random.Random) -> Attempt:
        data = json_bytes(rng, signed(mutate_json(rng, document)))

        def read() -> None:
            (root / layout.MANIFEST).write_bytes(data)
            find_caches([root])
            touch(_read_all(open_cache(root)))

        return Attempt({layout.MANIFEST: data}, read)

    return target


def cache(place: Path) -> Target:
    """Any file of a cache whose manifest has its new digest, read by ``verify`` and by a reader."""
    root = _victim(place).path
    original = (root / layout.MANIFEST).read_bytes()
    document = parse_json(original)
    files = {path: (root / path).read_bytes() for path in document["files"]}

    def target(rng: random.Random) -> Attempt:
        path = rng.choice(list(files))
        data, fast = _mutated(rng, path, files), rng.random() < 0.7
        changed = {**document, "files": {**document["files"], path: {"bytes": len(data), "sha256": _sha256(data)}}}

        def read() -> None:
            (root / path).write_bytes(data)
            (root / layout.MANIFEST).write_bytes(canonical_json(signed(changed)))
            try:
                touch(_read_all(open_cache(root)) if fast else verify(root))
            finally:
                (root / path).write_bytes(files[path])
                (root / layout.MANIFEST).write_bytes(original)

        return Attempt({path: data}, read)

    return target


def selection(place: Path) -> Target:
    """``.selection.json`` beside a whole manifest."""
    root = _victim(place).path
    kept: list[Any] = ["all", {TEACHER: [2, 4]}, {TEACHER: []}, {}]
    documents = [
        {
            "format": "kdcache-selection",
            "version": 1,
            "teachers": teachers,
            "text": text,
            "complete": complete,
            "origin": "mine@1",
        }
        for teachers in kept
        for text, complete in (("yes", "yes"), ("no", "no"))
    ]

    def target(rng: random.Random) -> Attempt:
        data, fast = json_bytes(rng, mutate_json(rng, rng.choice(documents))), rng.random() < 0.7

        def read() -> None:
            (root / SELECTION).write_bytes(data)
            find_caches([root])
            touch(_read_all(open_cache(root)) if fast else verify(root))

        return Attempt({SELECTION: data}, read)

    return target


def journal(place: Path) -> Target:
    """Commit records of a dump that died, with new checksums; the dump continues with them."""
    dead, root = place / "dead", place / "cache"
    disk = counting_disk()
    with use_disk(disk):
        dump(place / "whole", PLAN)
    with use_disk(dying_disk(len(disk.steps) * 9 // 10)), contextlib.suppress(Died):
        dump(dead, PLAN)
    begun = {path.relative_to(dead): path.read_bytes() for path in dead.rglob("*") if path.is_file()}
    records = [path for path in begun if path.parts[0] == layout.STATE and path.suffix == ".json"]

    def target(rng: random.Random) -> Attempt:
        path = rng.choice(records)
        record = mutate_json(rng, _parsed(begun[path]))
        data = json_bytes(rng, _with_checksum(record))
        name = (
            path if rng.random() < 0.9 else path.with_name(rng.choice(("part-00009.json", "layer-99.json", "x.json")))
        )

        def read() -> None:
            shutil.rmtree(root, ignore_errors=True)
            for one, body in {**begun, name: data}.items():
                (root / one).parent.mkdir(parents=True, exist_ok=True)
                (root / one).write_bytes(body)
            dump(root, PLAN)
            verify(root)

        return Attempt({str(name): data}, read)

    return target


def refs(place: Path) -> Target:
    """Refs and manifests of a remote, with new checksums, under right and wrong keys."""
    root, remote = _remote(place)
    before = dict(remote.objects)
    keys = [key for key in before if not key.startswith(share_layout.FILES)]

    def target(rng: random.Random) -> Attempt:
        key = rng.choice(keys)
        data = _forged_object(rng, key, before[key][0])
        changed = {**before, _forged_key(rng, key): (data, remote.now())}
        if key.startswith(share_layout.MANIFESTS) and rng.random() < 0.8:
            changed |= _refs_to(before, key, data)

        def read() -> None:
            remote.objects = dict(changed)
            _use(remote, root, place, rng.randrange(8))

        return Attempt({key: data}, read, UNREACHED)

    return target


class LyingRemote(MemoryRemote):
    """A store with some wrong responses: entries missing, doubled, renamed, resized; bodies cut, extended, changed."""

    rng: random.Random | None = None
    rate = 0.0

    def list(self, prefix: str) -> Iterator[Entry]:
        entries = list(super().list(prefix))
        if self._lies() and self.rng is not None:
            entries = [self._entry(self.rng, entry) for entry in entries]
            for _ in range(self.rng.randrange(3)):
                if entries:
                    entries.insert(self.rng.randrange(len(entries)), self._entry(self.rng, self.rng.choice(entries)))
            if self.rng.random() < 0.3:
                self.rng.shuffle(entries)
            if self.rng.random() < 0.3:
                del entries[self.rng.randrange(len(entries) + 1) :]
        return iter(entries)

    def head(self, key: str) -> Entry | None:
        entry = super().head(key)
        if self._lies() and self.rng is not None:
            return self._entry(self.rng, entry) if entry and self.rng.random() < 0.7 else None
        return entry

    def read(self, key: str, *, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        data = b"".join(super().read(key, start=start, length=length))
        if self._lies() and self.rng is not None:
            data = mutate_bytes(self.rng, data)
            cuts = sorted(self.rng.randrange(len(data) + 1) for _ in range(self.rng.randrange(4)))
            return iter([data[first:last] for first, last in zip([0, *cuts], [*cuts, len(data)], strict=True)])
        return iter([data] if data else [])

    def read_bytes(self, key: str, limit: int) -> bytes:
        data = super().read_bytes(key, limit)
        return mutate_bytes(self.rng, data)[:limit] if self._lies() and self.rng is not None else data

    def _lies(self) -> bool:
        return self.rng is not None and self.rng.random() < self.rate

    @staticmethod
    def _entry(rng: random.Random, entry: Entry) -> Entry:
        what = rng.randrange(6)
        if what == 0:
            return replace(entry, size=rng.choice(EXTREMES))
        if what == 1:
            return replace(entry, key=_forged_key(rng, entry.key))
        if what == 2:
            return replace(entry, modified=float(rng.choice((0, -1, 2**40, 1e300, float("nan"), float("inf")))))
        return entry


def listing(place: Path) -> Target:
    """Responses of a store. No checksum is computed again: a pull must give the cache that was pushed."""
    root, remote = _remote(place, LyingRemote())
    before = dict(remote.objects)

    def target(rng: random.Random) -> Attempt:
        seed, rate, what = rng.random(), rng.choice((0.02, 0.1, 0.5, 1.0)), rng.randrange(8)

        def read() -> None:
            remote.objects = dict(before)
            remote.rng, remote.rate = random.Random(seed), rate
            _use(remote, root, place, what)

        return Attempt({"seed": repr(seed).encode()}, read, UNREACHED)

    return target


def student(place: Path) -> Target:
    """Stored tokens and alignments of a student, with a new digest in their first line."""
    from kdcache.loading.alignment import load_arrays, save_arrays

    path = place / "kept.bin"
    arrays: dict[str, np.ndarray] = {
        "first": np.arange(9),
        "src": np.arange(8, dtype=np.int32),
        "weight": np.ones(8, np.float32),
    }
    save_arrays(path, arrays)
    original = path.read_bytes()
    head, _, body = original.partition(b"\n")

    def target(rng: random.Random) -> Attempt:
        changed = mutate_bytes(rng, body) if rng.random() < 0.5 else body
        document = {**_parsed(head), "sha256": _sha256(changed)}
        data = json_bytes(rng, mutate_json(rng, document)).replace(b"\n", b"") + b"\n" + changed

        def read() -> None:
            path.write_bytes(data if rng.random() < 0.8 else mutate_bytes(rng, original))
            touch(load_arrays(path, {"first", "src", "weight"}))

        return Attempt({path.name: data}, read)

    return target


def tokens(place: Path) -> Target:
    """Token files with arbitrary values, read, and aligned with the tokens of a student."""
    from kdcache.loading.alignment import align

    cache = _victim(place)
    held = _HeldFiles(cache.path, cache.manifest.contents.files)
    cache._files = held
    part = cache.parts[0].name
    original = cache.tokens(TEACHER, part)

    def target(rng: random.Random) -> Attempt:
        columns = {
            name: mutate_numbers(rng, getattr(original, name)) for name in ("starts", "ends", "segments", "roles")
        }
        total = len(original.starts)
        cuts = sorted(rng.randrange(total + 1) for _ in range(len(original) - 1))
        offsets = np.array([0, *cuts, total]) if rng.random() < 0.3 else original.offsets
        data = encode_tokens(Tokens(offsets, **columns))

        def read() -> None:
            held.changed = {layout.tokens_file(TEACHER, part): data}
            found = cache.tokens(TEACHER, part)
            aligned = align(original, found)
            assert aligned.first is not None and aligned.src is not None and aligned.weight is not None
            lengths = found.lengths[np.repeat(np.arange(len(original)), original.lengths)]
            assert aligned.first[0] == 0 and aligned.first[-1] == len(aligned.src) == len(aligned.weight)
            assert (aligned.src >= 0).all() and (aligned.src < np.repeat(lengths, np.diff(aligned.first))).all()
            assert np.isfinite(aligned.weight).all()

        return Attempt({layout.tokens_file(TEACHER, part): data}, read)

    return target


KINDS: dict[str, Callable[[Path], Target]] = {
    "arrow": arrow, "tokens": tokens, "zarr": zarr, "safetensors": safetensors, "tokenizer": tokenizer,
    "manifest": manifest, "cache": cache,
    "selection": selection, "journal": journal, "refs": refs, "listing": listing, "student": student,
}  # fmt: skip


def touch(value: object) -> None:
    """Read every byte of a result, so that a view of invalid memory is detected."""
    if isinstance(value, np.ndarray):
        value.tobytes()
    elif isinstance(value, Mapping):
        for item in value.values():
            touch(item)
    elif isinstance(value, list | tuple):
        for item in value:
            touch(item)
    elif is_dataclass(value):
        touch(vars(value))


def signed(document: Any) -> Any:
    """A manifest with its identity and checksum computed again; unchanged if it has no canonical form."""
    if not isinstance(document, dict):
        return document
    rest = {key: value for key, value in document.items() if key not in ("identity", "checksum")}
    try:
        rest["identity"] = digest_of({key: value for key, value in rest.items() if key != "provenance"})
        return rest | {"checksum": digest_of(rest)}
    except NotCanonicalError:
        return document


class _HeldFiles(CheckedFiles):
    """Files of a cache in memory, some of them changed."""

    def __init__(self, root: Path, files: Mapping[str, FileDigest]) -> None:
        super().__init__(root, files)
        self.changed: Mapping[str, bytes] = {}
        self._originals = {path: (root / path).read_bytes() for path in files}

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[CheckedFile]:
        yield _HeldFile(path, self.changed[path] if path in self.changed else self._originals[path])


class _HeldFile(CheckedFile):
    """The bytes of one of them."""

    def __init__(self, path: str, data: bytes) -> None:
        super().__init__(path, -1, len(data))
        self._data = memoryview(data)

    def readinto(self, view: memoryview) -> None:
        if len(view) > self._left:
            raise DamageError(f"'{self._path}' ends too early")
        start = len(self._data) - self._left
        view[:] = self._data[start : start + len(view)]
        self._left -= len(view)

    def read_rest(self) -> bytes:
        rest = bytes(self._data[len(self._data) - self._left :])
        self._left = 0
        return rest


def _victim(place: Path) -> Cache:
    dump(place / "cache", PLAN)
    return open_cache(place / "cache")


def _file_target(
    victim: Cache, takes: Callable[[str], bool], mutate: Callable[[random.Random, bytes, list[bytes]], bytes]
) -> Target:
    """Decode one file at a time in memory, as if its size and digest matched the manifest."""
    held = _HeldFiles(victim.path, victim.manifest.contents.files)
    victim._files = held
    reads = {path: read for path, read in _reads(victim) if takes(path)}
    originals = {path: (victim.path / path).read_bytes() for path in reads}
    others = list(originals.values())

    def target(rng: random.Random) -> Attempt:
        path = rng.choice(list(reads))
        data = mutate(rng, originals[path], others)

        def read() -> None:
            held.changed = {path: data}
            touch(reads[path]())

        return Attempt({path: data}, read)

    return target


def _reads(cache: Cache) -> Iterator[tuple[str, Callable[[], object]]]:
    """The function that reads each file."""
    spec = cache.teachers[TEACHER]
    for split, info in cache.manifest.contents.splits.items():
        yield info.file, lambda split=split: cache.examples(split)  # type: ignore[misc]
    yield layout.tokenizer_file(TEACHER), lambda: cache.tokenizer_json(TEACHER)
    for layer in spec.layers:
        yield layout.basis_file(TEACHER, layer), lambda layer=layer: cache.basis(TEACHER, layer)  # type: ignore[misc]
    for part in (part.name for part in cache.parts):
        yield layout.ids_file(part), lambda part=part: cache.text_ids(part)  # type: ignore[misc]
        yield layout.text_file(part), lambda part=part: cache.texts(part)  # type: ignore[misc]
        yield layout.outputs_file(TEACHER, part), lambda part=part: cache.outputs(TEACHER, part)  # type: ignore[misc]
        if part in cache.manifest.contents.tokens[TEACHER]:
            yield layout.tokens_file(TEACHER, part), lambda part=part: cache.tokens(TEACHER, part)  # type: ignore[misc]
            for layer, one in spec.layers.items():
                for path in layout.layer_files(TEACHER, part, layer, one, cache.row_count(TEACHER, part, layer)):
                    yield path, lambda part=part, layer=layer: cache.hidden(TEACHER, part, layer)  # type: ignore[misc]


def _read_all(cache: Cache) -> object:
    read_everything(cache)
    return [cache.locate(cache.examples(split).text_ids) for split in cache.splits]


def _mutated(rng: random.Random, path: str, files: Mapping[str, bytes]) -> bytes:
    others = [data for one, data in files.items() if one.rpartition(".")[2] == path.rpartition(".")[2]]
    if path.endswith(".arrow"):
        return mutate_arrow(rng, files[path], others)
    if path.endswith(".safetensors"):
        return mutate_safetensors(rng, files[path], others)
    if path.endswith("zarr.json"):
        return json_bytes(rng, mutate_json(rng, _parsed(files[path])))
    return mutate_shard(rng, files[path]) if "/c/" in path else mutate_bytes(rng, files[path], others)


def _parsed(data: bytes) -> Any:
    return parse_json(data)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _with_checksum(document: Any) -> Any:
    if not isinstance(document, dict):
        return document
    rest = {key: value for key, value in document.items() if key != "checksum"}
    try:
        return rest | {"checksum": digest_of(rest)}
    except NotCanonicalError:
        return document


def _remote(place: Path, remote: MemoryRemote | None = None) -> tuple[Path, Any]:
    """A remote with two versions of a name and a tombstone, and the cache of the newest version."""
    remote = remote or MemoryRemote()
    root = place / "cache"
    small = Plan(PLAN.train, PLAN.test, ())
    dump(place / "first", small)
    push(remote, place / "first", "mine", tag="old")
    dump(root, PLAN)
    push(remote, root, "mine")
    push(remote, place / "first", "other")
    tombstone(remote, "other", (1,))
    return root, remote


def _forged_object(rng: random.Random, key: str, data: bytes) -> bytes:
    document = mutate_json(rng, _parsed(data))
    document = signed(document) if key.startswith(share_layout.MANIFESTS) else _with_checksum(document)
    return json_bytes(rng, document)[: 1 << 20]


def _forged_key(rng: random.Random, key: str) -> str:
    """Mostly the key itself; else that of another version, of another name, or an invalid one."""
    if rng.random() < 0.7:
        return key
    made = (
        "refs/mine/3.json",
        "refs/mine/999999999.json",
        "refs/new/1.json",
        "refs/mine/3-" + "0" * 16 + ".json",
        "refs/x",
        "files/aa",
    )
    return rng.choice(made)


def _refs_to(objects: Mapping[str, tuple[bytes, float]], key: str, data: bytes) -> dict[str, tuple[bytes, float]]:
    """The forged manifest under its digest, with the refs of the old manifest changed to it."""
    old, new = share_layout.parse_manifest_key(key), _sha256(data)
    made = {share_layout.manifest_key(new): (data, 0.0)}
    for one, (body, at) in objects.items():
        if share_layout.parse_ref_key(one) and len(body) < MOST_OF_A_REF and old is not None and old.encode() in body:
            document = {**_parsed(body), "manifest": new}
            try:
                document["identity"] = parse_json(data)["identity"]
            except (NotCanonicalError, KeyError, TypeError):
                continue
            made[one] = (canonical_json(_with_checksum(document)), at)
    return made


def _use(remote: MemoryRemote, root: Path, place: Path, what: int) -> None:
    """One of the usual commands on a remote; every byte of a pulled cache must match its manifest."""
    timing = LeaseTiming(background=False, patience=0.0, sleep=lambda _: None)
    target = place / "pulled"
    if what == 0:
        names(remote)
        history(remote, "mine")
        all_histories(remote)
    elif what == 1:
        fetch_manifest(remote, resolve(remote, "mine@1"))
        resolve(remote, "mine@old")
    elif what == 2:
        status(remote, root)
    elif what == 3:
        collect(remote, grace=0.0, timing=timing, workers=1)
    elif what == 4:
        push(remote, root, "mine", timing=timing, workers=1)
    elif what == 5:
        shutil.rmtree(place / "store", ignore_errors=True)
        with read_through(remote, resolve(remote, "mine"), store=LocalStore(place / "store"), workers=1) as cache:
            touch(_read_all(cache))
    else:
        shutil.rmtree(target, ignore_errors=True)
        pull(remote, "mine", target, workers=1)
        damages = verify(target)
        if isinstance(remote, LyingRemote) and damages:
            raise AssertionError(f"a damaged cache was pulled: {damages[0]}")
