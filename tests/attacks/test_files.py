"""Files that are not what they should be, under a manifest whose digests are right.

And things that are no files at all.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import resource
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from kdcache.cache import tables
from kdcache.cache.arrays import array_metadata, shard_bytes
from kdcache.cache.layout import STATE
from kdcache.cache.reader import open_cache
from kdcache.cache.tokens import Tokens
from kdcache.errors import DamageError
from kdcache.testing.caches import dump, made_plan, made_texts
from kdcache.testing.faults import edit_manifest
from tests.attacks.victim import BERT, assert_refused, pickled, put_file

IDS = "texts/part-00000.arrow"
TEXT = "text/part-00000.arrow"
OUTPUTS = f"{BERT}/outputs/part-00000.arrow"
TOKENS = f"{BERT}/tokens/part-00000.arrow"
BASIS = f"{BERT}/basis/layer-02.safetensors"
TOKENIZER = f"{BERT}/tokenizer/tokenizer.json"
SHARD = f"{BERT}/hidden/part-00000.zarr/layer-04/c/0/0"


def arrow(schema: pa.Schema, columns: list[pa.Array], batches: int = 1, **options: object) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for _ in range(batches):
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
    return sink.getvalue().to_pybytes()


def ids(rows: int = 4) -> pa.Array:
    return pa.array([bytes([row] * 16) for row in range(rows)], type=pa.binary(16))


def dictionary() -> bytes:
    column = ids().dictionary_encode()
    return arrow(pa.schema([pa.field("text_id", column.type, nullable=False)]), [column])


def extension() -> bytes:
    field = pa.field("text_id", pa.binary(16), nullable=False, metadata={"ARROW:extension:name": "arrow.uuid"})
    return arrow(pa.schema([field]), [ids()])


def nested(depth: int) -> bytes:
    kind: pa.DataType = pa.int8()
    for _ in range(depth):
        kind = pa.list_(kind)
    return arrow(pa.schema([pa.field("text_id", kind)]), [pa.nulls(4, kind)])


def tokens_with(victim: Path, offsets: list[int]) -> bytes:
    """The real token file with list offsets of one's own."""
    return patched(
        victim / TOKENS, np.array(open_cache(victim).tokens("bert", "part-00000").offsets, np.int32), offsets
    )


def text_with(victim: Path, offsets: list[int]) -> bytes:
    """The real text file with string offsets of one's own."""
    lengths = [len(text.encode()) for (text,) in open_cache(victim).texts("part-00000")]
    return patched(victim / TEXT, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), offsets)


def patched(path: Path, offsets: np.ndarray, others: list[int]) -> bytes:
    data = path.read_bytes()
    assert data.count(offsets.tobytes()) == 1
    return data.replace(offsets.tobytes(), np.array(others, offsets.dtype).tobytes())


def zeros(rows: int) -> pa.Array:
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), rows, [None, pa.py_buffer(bytes(16 * rows))])


def many_rows(data: bytes, rows: int) -> bytes:
    """The row count in the header of the batch of an ids file, changed in place."""
    old, new = struct.pack("<q", 4), struct.pack("<q", rows)
    return data.replace(old, new)


def unverified(data: bytes) -> bytes:
    """The schema in a message of a kind that Arrow does not know, and so does not verify, with two thousand million
    fields.
    """
    message = 16 + struct.unpack_from("<I", data, 16)[0]
    vtable = message - struct.unpack_from("<i", data, message)[0]
    kind, header = (message + struct.unpack_from("<H", data, vtable + 4 + 2 * slot)[0] for slot in (1, 2))
    schema = header + struct.unpack_from("<I", data, header)[0]
    place = schema + struct.unpack_from("<H", data, schema - struct.unpack_from("<i", data, schema)[0] + 6)[0]
    fields = place + struct.unpack_from("<I", data, place)[0]
    forged = bytearray(data)
    forged[kind] = 9
    forged[fields : fields + 4] = struct.pack("<I", 2**31 - 1)
    return bytes(forged)


def other_footer(data: bytes) -> bytes:
    """The footer of a file of other columns: a reader that begins there reads another table."""
    other = arrow(pa.schema([pa.field("label", pa.binary(16), nullable=False)]), [ids()])
    return data[: -10 - struct.unpack("<i", data[-10:-6])[0]] + other[-10 - struct.unpack("<i", other[-10:-6])[0] :]


def zip_bomb() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(IDS, bytes(50 << 20))
    return data.getvalue()


def spans(victim: Path, **changes: int) -> bytes:
    """The real token file with all starts, ends or roles set to something."""
    found = open_cache(victim).tokens("bert", "part-00000")
    arrays = {name: np.array(getattr(found, name)) for name in ("starts", "ends", "segments", "roles")}
    for name, value in changes.items():
        arrays[name][...] = value
    return tables.encode_tokens(Tokens(found.offsets, **arrays))


ARROW: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "a compressed bomb, zstd": (IDS, lambda _: arrow(tables.ids_schema(), [zeros(1 << 20)], compression="zstd")),
    "a compressed bomb, lz4": (IDS, lambda _: arrow(tables.ids_schema(), [zeros(1 << 20)], compression="lz4")),
    "another schema": (IDS, lambda _: arrow(pa.schema([pa.field("text_id", pa.string())]), [pa.array(["x"] * 4)])),
    "a column more": (
        IDS,
        lambda _: arrow(pa.schema([*tables.ids_schema(), pa.field("x", pa.binary(16))]), [ids(), ids()]),
    ),
    "a nullable column": (IDS, lambda _: arrow(pa.schema([pa.field("text_id", pa.binary(16))]), [ids()])),
    "a dictionary": (IDS, lambda _: dictionary()),
    "an extension type": (IDS, lambda _: extension()),
    "metadata": (IDS, lambda _: arrow(tables.ids_schema().with_metadata({"pandas": "x" * 10_000}), [ids()])),
    "a deep type": (IDS, lambda _: nested(50)),
    "a name of megabytes": (
        IDS,
        lambda _: arrow(pa.schema([pa.field("x" * 20_000, pa.binary(16), nullable=False)]), [ids()]),
    ),
    "more rows than there are": (IDS, lambda _: arrow(tables.ids_schema(), [ids(5)])),
    "rows without number": (IDS, lambda victim: many_rows((victim / IDS).read_bytes(), 2**62)),
    "a negative number of rows": (IDS, lambda victim: many_rows((victim / IDS).read_bytes(), -4)),
    "two batches": (IDS, lambda _: arrow(tables.ids_schema(), [ids(2)], batches=2)),
    "a message of no known kind": (IDS, lambda victim: unverified((victim / IDS).read_bytes())),
    "a footer that is not that of its file": (IDS, lambda victim: other_footer((victim / IDS).read_bytes())),
    "a text that is not UTF-8": (TEXT, lambda victim: (victim / TEXT).read_bytes().replace(b"train 1", b"train \xff")),
    "a stream in place of a file": (IDS, lambda victim: (victim / IDS).read_bytes()[8:]),
    "cut off in the header": (IDS, lambda victim: (victim / IDS).read_bytes()[:200] + b"ARROW1"),
    "list offsets beyond the values": (TOKENS, lambda victim: tokens_with(victim, [0, 2, 4, 8, 2**31 - 1])),
    "negative list offsets": (TOKENS, lambda victim: tokens_with(victim, [0, -5, 4, 8, 22])),
    "list offsets that fall": (TOKENS, lambda victim: tokens_with(victim, [0, 10, 2, 8, 22])),
    "list offsets that begin late": (TOKENS, lambda victim: tokens_with(victim, [2, 3, 4, 8, 22])),
    "a text with too many tokens": (TOKENS, lambda victim: too_long(victim)),
    "roles that are none": (TOKENS, lambda victim: spans(victim, roles=77)),
    "negative roles": (TOKENS, lambda victim: spans(victim, roles=-3)),
    "string offsets beyond the text": (TEXT, lambda victim: text_with(victim, [0, 1, 2, 3, 2**40])),
    "negative string offsets": (TEXT, lambda victim: text_with(victim, [0, -9, 2, 3, 4])),
    "logits of strings": (
        OUTPUTS,
        lambda _: arrow(pa.schema([pa.field("logits", pa.string())]), [pa.array(["x"] * 4)]),
    ),
}


def too_long(victim: Path) -> bytes:
    found = open_cache(victim).tokens("bert", "part-00000")
    offsets = np.array(found.offsets)
    offsets[1:-1] = offsets[-1]
    return tables.encode_tokens(Tokens(offsets, found.starts, found.ends, found.segments, found.roles))


@pytest.mark.parametrize("attack", ARROW)
def test_arrow_files(victim: Path, attack: str) -> None:
    name, make = ARROW[attack]
    put_file(victim, name, make(victim))
    assert_refused(victim)


@pytest.mark.parametrize("name", [IDS, TEXT])
def test_texts_and_ids_that_do_not_belong_together(victim: Path, name: str) -> None:
    """Well-formed, so a reader takes them; ``verify`` hashes."""
    from tests.cli.commands import kdcache

    put_file(victim, name, arrow(tables.ids_schema(), [ids()]) if name == IDS else text_with(victim, [0, 1, 2, 3, 4]))
    said = kdcache("cache", "verify", victim)
    assert said.code == 3 and "not the one of its id" in said.out


@pytest.mark.parametrize("name", [IDS, TEXT, OUTPUTS, TOKENS, BASIS])
@pytest.mark.parametrize("what", ["pickle", "gzip bomb", "zip bomb", "nothing"])
def test_other_formats_are_not_tried(victim: Path, name: str, what: str) -> None:
    proof = victim.parent.parent / "proof"
    data = {
        "pickle": pickled(proof),
        "gzip bomb": gzip.compress(bytes(50 << 20)),
        "zip bomb": zip_bomb(),
        "nothing": b"",
    }[what]
    put_file(victim, name, data[: 60 << 10])
    assert_refused(victim)
    assert not proof.exists()


def header(document: object, body: bytes = b"") -> bytes:
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    return struct.pack("<Q", len(data)) + data + body


def tensors(**changes: object) -> dict[str, object]:
    """The header of a basis of 3 x 6, with changes."""
    wanted: dict[str, object] = {
        "components": {"dtype": "F32", "shape": [3, 6], "data_offsets": [0, 72]},
        "total_variance": {"dtype": "F64", "shape": [1], "data_offsets": [72, 80]},
        "target_variance": {"dtype": "F64", "shape": [1], "data_offsets": [80, 88]},
    }
    return {**wanted, **changes}


SAFETENSORS: dict[str, bytes] = {
    "a header without end": struct.pack("<Q", 2**62) + b"{}",
    "a header of megabytes": header({f"tensor {number}": {} for number in range(2500)}),
    "a header that nests": header(b"[" * 60_000),
    "tensors that overlap": header(
        tensors(components={"dtype": "F32", "shape": [3, 6], "data_offsets": [16, 88]}), bytes(88)
    ),
    "offsets beyond the file": header(
        tensors(components={"dtype": "F32", "shape": [3, 6], "data_offsets": [0, 2**50]}), bytes(88)
    ),
    "negative offsets": header(
        tensors(components={"dtype": "F32", "shape": [3, 6], "data_offsets": [-72, 0]}), bytes(88)
    ),
    "a shape without end": header(
        tensors(components={"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 72]}), bytes(88)
    ),
    "a negative shape": header(
        tensors(components={"dtype": "F32", "shape": [-3, -6], "data_offsets": [0, 72]}), bytes(88)
    ),
    "another dtype": header(tensors(components={"dtype": "F16", "shape": [3, 6], "data_offsets": [0, 36]}), bytes(88)),
    "a tensor more": header(tensors(code={"dtype": "U8", "shape": [0], "data_offsets": [88, 88]}), bytes(88)),
    "metadata": header(tensors(__metadata__={"run": "me"}), bytes(88)),
    "bytes behind the tensors": header(tensors(), bytes(4000)),
    "a variance that is none": header(tensors(), bytes(72) + struct.pack("<dd", float("nan"), 1.0)),
    "a negative variance": header(tensors(), bytes(72) + struct.pack("<dd", -1.0, 1.0)),
    "a text of its own in a message": header(
        tensors(components={"dtype": "F32", "shape": [3, 6], "data_offsets": "x" * 5000}), bytes(88)
    ),
    "a list of tensors": header([tensors()]),
}


@pytest.mark.parametrize("attack", SAFETENSORS)
def test_safetensors_files(victim: Path, attack: str) -> None:
    put_file(victim, BASIS, SAFETENSORS[attack])
    assert_refused(victim)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (f"{BERT}/hidden/part-00000.zarr/layer-04/zarr.json", lambda text: text.replace('"crc32c"', '"pickle"')),
        (
            f"{BERT}/hidden/part-00000.zarr/layer-04/zarr.json",
            lambda text: text.replace('"shape":[22,6]', '"shape":[1099511627776,6]'),
        ),
        (
            f"{BERT}/hidden/part-00000.zarr/layer-04/zarr.json",
            lambda text: text.replace('"chunk_shape":[22,6]', '"chunk_shape":[1,1]'),
        ),
        (
            f"{BERT}/hidden/part-00000.zarr/zarr.json",
            lambda text: text.replace('"attributes":{}', '"attributes":{"x":1}'),
        ),
    ],
    ids=["another codec", "another shape", "another chunk", "attributes"],
)
def test_zarr_metadata_that_says_something_else(victim: Path, name: str, change: Callable[[str], str]) -> None:
    text = (victim / name).read_text()
    assert change(text) != text, text
    put_file(victim, name, change(text).encode())
    assert_refused(victim, by_info=True)


@pytest.mark.parametrize("attack", ["index outside", "index of overlapping chunks", "wrong crc", "NaN shard"])
def test_shards(victim: Path, attack: str) -> None:
    import google_crc32c

    data = bytearray((victim / SHARD).read_bytes())
    entry = {"index outside": (2**40, 340), "index of overlapping chunks": (8, 340)}.get(attack)
    if entry:
        data[-20:-4] = struct.pack("<QQ", *entry)
        data[-4:] = struct.pack("<I", google_crc32c.value(bytes(data[-20:-4])))
    elif attack == "wrong crc":
        data[3] ^= 1
    else:
        data[:] = b"\xff" * len(data)
    put_file(victim, SHARD, bytes(data))
    assert_refused(victim)


def test_an_array_of_half_a_terabyte_that_takes_no_room_on_the_disk(victim: Path) -> None:
    """Everything fits together, so the size is found out where the array is made."""
    rows, width, layer = 2**21, 2**16, f"{BERT}/hidden/part-00000.zarr/layer-04"

    def change(document: dict[str, Any]) -> None:
        teacher = document["teachers"]["bert"]
        teacher |= {
            "width": width,
            "max_length": 2**20,
            "layers": {"4": {"projection": "none", "dim": width, "dtype": "float32"}},
        }
        teacher["tokens"]["part-00000"] = rows
        document["files"] = {name: file for name, file in document["files"].items() if "layer-02" not in name}
        metadata = array_metadata((rows, width), "float32")
        (victim / f"{layer}/zarr.json").write_bytes(metadata)
        document["files"][f"{layer}/zarr.json"] = {
            "bytes": len(metadata),
            "sha256": hashlib.sha256(metadata).hexdigest(),
        }
        document["files"][SHARD]["bytes"] = shard_bytes((rows, width), 4)

    edit_manifest(victim, change, resign=True)
    os.truncate(victim / SHARD, shard_bytes((rows, width), 4))
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 38, hard))  # some systems give out a terabyte that nobody has
    try:
        with pytest.raises(DamageError, match=r"layer-04/c/0/0' needs \d+ bytes of memory"):
            open_cache(victim).hidden("bert", "part-00000", 4)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("name", [IDS, TEXT, BASIS])
def test_a_dump_that_goes_on_with_forged_files_refuses_them_by_name(victim: Path, name: str) -> None:
    put_file(victim, name, b"neither of the two")
    if name == TEXT:
        (victim / IDS).unlink()
    with pytest.raises(DamageError, match=Path(name).name):
        dump(victim, made_plan(6, 2, ("bert",)), repair=name == TEXT)


def test_a_tokenizer_is_text_and_is_not_run(victim: Path) -> None:
    put_file(victim, TOKENIZER, b"\xff\xfe\x00pickle")
    assert_refused(victim)
    put_file(victim, TOKENIZER, b"[" * 5_000_000)  # nobody parses it: a student brings its own
    assert open_cache(victim).tokenizer_json("bert").startswith("[[[")


def device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # another /dev/zero
    except PermissionError:
        path.symlink_to("/dev/zero")


def listening(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a device": device,
    "a socket": listening,
    "a directory": lambda path: path.mkdir(),
    "a link": lambda path: path.symlink_to("/etc/passwd"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("what", NO_FILES)
@pytest.mark.parametrize("name", [IDS, SHARD])
def test_what_is_no_file_is_not_opened(victim: Path, what: str, name: str) -> None:
    (victim / name).unlink()
    NO_FILES[what](victim / name)
    assert_refused(victim)


def test_a_directory_that_is_a_link(victim: Path) -> None:
    elsewhere = victim.parent.parent / "elsewhere"
    (victim / "teachers").rename(elsewhere)
    (victim / "teachers").symlink_to(elsewhere)
    assert_refused(victim)


@pytest.mark.parametrize("name", [STATE, "teachers", "texts", "data"])
def test_nothing_is_written_or_removed_behind_a_link(victim: Path, name: str) -> None:
    """A cache that is to grow: its directories must be its own."""
    outside = victim.parent.parent / "outside"
    if (victim / name).exists():
        (victim / name).rename(outside)
    else:
        outside.mkdir()
    (outside / "precious.json").write_text("{}")
    (victim / name).symlink_to(outside)
    before = {path: path.stat().st_mtime_ns for path in outside.rglob("*")}
    with pytest.raises(DamageError, match="is a symbolic link"):
        dump(victim, made_plan(6, 3, ("bert", "roberta")))
    assert {path: path.stat().st_mtime_ns for path in outside.rglob("*")} == before


def test_a_hard_link_to_a_file_outside_is_never_written_through(victim: Path) -> None:
    outside = victim.parent.parent / "outside.arrow"
    outside.write_bytes(b"precious")
    for name in (IDS, OUTPUTS, "README.md"):
        (victim / name).unlink()
        os.link(outside, victim / name)
    assert_refused(victim)
    plan = made_plan(4, 2, ("bert",))
    dump(victim, plan, repair=True)
    assert outside.read_bytes() == b"precious"
    assert open_cache(victim).outputs("bert", "part-00000").logits.shape == (len(made_texts(4)), 2)


def test_a_student_does_not_align_with_spans_that_all_overlap() -> None:
    """A token file of a few megabytes would make pairs without number."""
    from kdcache.loading.alignment import align

    def covering(count: int, end: int) -> Tokens:
        whole = np.zeros(count, np.int32)
        return Tokens(np.array([0, count]), whole, whole + end, whole.astype(np.int8), whole.astype(np.int8))

    with pytest.raises(DamageError, match="no tokenizer gives such spans"):
        align(covering(500, 10), covering(200_000, 2**31 - 2))
