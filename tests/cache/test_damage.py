"""Every kind of damage to every kind of file.

Verify names it, the reader refuses it, repair brings the same cache back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kdcache.cache.reader import open_cache
from kdcache.cache.verify import verify
from kdcache.errors import DamageError
from kdcache.files import write_file
from kdcache.testing.caches import Plan, dump, read_everything
from kdcache.testing.faults import delete, edit_manifest, empty, flip_bit, swap, truncate

Copy = Callable[[Path], Path]
BERT = "teachers/bert"
FILES = [
    "texts/part-00000.arrow",
    "texts/part-00004.arrow",
    "text/part-00001.arrow",
    f"{BERT}/outputs/part-00002.arrow",
    f"{BERT}/outputs/part-00003.arrow",
    f"{BERT}/tokens/part-00000.arrow",
    f"{BERT}/hidden/part-00000.zarr/zarr.json",
    f"{BERT}/hidden/part-00000.zarr/layer-02/zarr.json",
    f"{BERT}/hidden/part-00001.zarr/layer-02/c/0/0",
    f"{BERT}/hidden/part-00001.zarr/layer-02-scale/c/0",
    f"{BERT}/hidden/part-00002.zarr/layer-04/c/0/0",
    f"{BERT}/basis/layer-02.safetensors",
    f"{BERT}/tokenizer/tokenizer.json",
]
DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": flip_bit,
    "truncated": truncate,
    "deleted": delete,
    "emptied": empty,
}


def files_of(path: Path) -> list[str]:
    return FILES + [info.file for info in open_cache(path).manifest.contents.splits.values()]


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found_by_verify_and_by_readers_and_repaired(
    pristine: Path, plan: Plan, copy_of: Copy, kind: str
) -> None:
    identity = open_cache(pristine).identity
    path = copy_of(pristine)
    for file in files_of(path):
        whole = (path / file).read_bytes()
        DAMAGES[kind](path / file)
        assert [damage.file for damage in verify(path)] == [file]
        with pytest.raises(DamageError, match=file.replace(".", r"\.")) as caught:
            read_everything(open_cache(path))
        assert caught.value.exit_code == 3
        assert "--repair" in caught.value.hint
        assert dump(path, plan, repair=True).identity == identity
        assert (path / file).read_bytes() == whole
        assert verify(path) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (f"{BERT}/outputs/part-00000.arrow", f"{BERT}/outputs/part-00001.arrow"),
        (f"{BERT}/hidden/part-00000.zarr/layer-02/c/0/0", f"{BERT}/hidden/part-00001.zarr/layer-02/c/0/0"),
        (f"{BERT}/outputs/part-00000.arrow", "teachers/roberta/outputs/part-00000.arrow"),
        ("texts/part-00000.arrow", "texts/part-00001.arrow"),
    ],
)
def test_two_valid_files_swapped(pristine: Path, plan: Plan, copy_of: Copy, one: str, other: str) -> None:
    path = copy_of(pristine)
    swap(path / one, path / other)
    assert [damage.file for damage in verify(path)] == sorted([one, other])
    with pytest.raises(DamageError, match=r"sha256 differs|bytes, the manifest says"):
        read_everything(open_cache(path))
    assert dump(path, plan, repair=True).identity == open_cache(pristine).identity


def test_a_file_that_is_damaged_after_its_first_read_is_found(pristine: Path, copy_of: Copy) -> None:
    path = copy_of(pristine)
    cache = open_cache(path)
    cache.outputs("bert", "part-00000")
    cache.hidden("bert", "part-00000", 4)
    flip_bit(path / BERT / "hidden/part-00000.zarr/layer-04/c/0/0")
    write_file(path / BERT / "outputs/part-00000.arrow", (path / BERT / "outputs/part-00001.arrow").read_bytes())
    with pytest.raises(DamageError, match="layer-04"):
        cache.hidden("bert", "part-00000", 4)
    with pytest.raises(DamageError, match="outputs"):
        cache.outputs("bert", "part-00000")


def test_links_are_refused(pristine: Path, copy_of: Copy, tmp_path: Path) -> None:
    path = copy_of(pristine)
    file, directory = path / "texts/part-00000.arrow", path / "teachers/roberta"
    file.rename(tmp_path / "elsewhere.arrow")
    file.symlink_to(tmp_path / "elsewhere.arrow")
    directory.rename(tmp_path / "roberta")
    directory.symlink_to(tmp_path / "roberta")
    found = {damage.file: damage.reason for damage in verify(path)}
    assert "is a symbolic link" in found["texts/part-00000.arrow"]
    assert "is a symbolic link" in found["teachers/roberta/outputs/part-00000.arrow"]
    with pytest.raises(DamageError, match="is a symbolic link"):
        open_cache(path).text_ids("part-00000")


def test_several_damages_are_all_named_and_repaired(pristine: Path, plan: Plan, copy_of: Copy) -> None:
    path = copy_of(pristine)
    damaged = [
        *FILES[:4],
        FILES[8],
        f"{BERT}/hidden/part-00000.zarr/layer-02/c/0/0",
        "teachers/roberta/basis/layer-04.safetensors",
    ]
    for file in damaged:
        flip_bit(path / file)
    assert [damage.file for damage in verify(path)] == sorted(damaged)
    assert dump(path, plan, repair=True).identity == open_cache(pristine).identity
    assert verify(path) == []


def test_texts_that_do_not_come_back_are_not_made_up(pristine: Path, plan: Plan, copy_of: Copy) -> None:
    path = copy_of(pristine)
    for directory in ("texts", "text"):
        delete(path / directory / "part-00000.arrow")
    lost = bytes(open_cache(pristine).text_ids("part-00000")[0])
    fewer = Plan({one: text for one, text in plan.train.items() if one != lost}, plan.test, plan.teachers)
    with pytest.raises(DamageError, match="do not restore it"):
        dump(path, fewer, repair=True)
    assert dump(path, plan, repair=True).identity == open_cache(pristine).identity


def test_what_a_text_says_must_be_what_its_id_says(pristine: Path, copy_of: Copy) -> None:
    path = copy_of(pristine)
    swap(path / "text/part-00000.arrow", path / "text/part-00001.arrow")

    def exchange(document: dict) -> None:
        files = document["files"]
        one, other = "text/part-00000.arrow", "text/part-00001.arrow"
        files[one], files[other] = files[other], files[one]

    edit_manifest(path, exchange, resign=True)
    assert [damage.reason.split("' ")[1] for damage in verify(path)] == [
        "has a text in row 0 that is not the one of its id"
    ] * 2


def test_bytes_are_counted_while_verifying(pristine: Path) -> None:
    counted: list[int] = []
    assert verify(pristine, on_bytes=counted.append) == []
    assert sum(counted) == sum(digest.size for digest in open_cache(pristine).manifest.contents.files.values())


def test_many_threads_digest_a_file_once(pristine: Path, copy_of: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdcache.cache.digests import CheckedFiles

    compared: list[str] = []
    compare = CheckedFiles._compare
    monkeypatch.setattr(
        CheckedFiles, "_compare", lambda self, path, *rest: (compared.append(path), compare(self, path, *rest))[1]
    )
    cache = open_cache(copy_of(pristine))
    threads = [
        threading.Thread(target=lambda: [read_everything(cache), cache.locate(cache.text_ids("part-00000"))])
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compared) == len(set(compared)) == len(cache.manifest.contents.files)
