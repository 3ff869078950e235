"""A cache without kdcache: zarr, pyarrow, safetensors and json read everything in it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import zarr
from safetensors.numpy import load_file

from kdcache.testing.caches import LAYERS, Plan, made_hidden, made_outputs, made_tokens

BERT = "teachers/bert"


def arrow(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def test_every_file_is_listed_with_its_digest(pristine: Path) -> None:
    files = json.loads((pristine / "manifest.json").read_text())["files"]
    for path, entry in files.items():
        data = (pristine / path).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])


def test_texts_and_examples_join_by_id(pristine: Path, plan: Plan) -> None:
    document = json.loads((pristine / "manifest.json").read_text())
    texts = {}
    for part in document["parts"]:
        ids = arrow(pristine / f"texts/{part['name']}.arrow")["text_id"].to_pylist()
        texts |= dict(zip(ids, arrow(pristine / f"text/{part['name']}.arrow")["sentence"].to_pylist(), strict=True))
    assert texts == {one: columns[0] for one, columns in (plan.train | plan.test).items()}
    train = arrow(pristine / document["splits"]["train"]["file"])
    assert [texts[one] for one in train["text_id"].to_pylist()] == [columns[0] for columns in plan.train.values()]
    assert train["label"].to_pylist() == [None, 0, 1] * 3 + [None]
    assert train["group"].null_count == 10


def test_outputs_and_tokens(pristine: Path, plan: Plan) -> None:
    ids = [plan.train[one] for one in arrow(pristine / "texts/part-00001.arrow")["text_id"].to_pylist()]
    spec = plan.teachers[0]
    outputs = arrow(pristine / BERT / "outputs/part-00001.arrow")
    assert outputs.schema.field("logits").type == pa.list_(pa.field("item", pa.float32(), nullable=False), 2)
    raw = np.frombuffer(b"".join(arrow(pristine / "texts/part-00001.arrow")["text_id"].to_pylist()), np.uint8).reshape(
        -1, 16
    )
    assert np.array_equal(outputs["logits"].to_pylist(), made_outputs(spec, raw).logits)
    assert np.array_equal(outputs["pooled"].to_pylist(), made_outputs(spec, raw).pooled)
    tokens = arrow(pristine / BERT / "tokens/part-00001.arrow")["tokens"].to_pylist()
    made = made_tokens(ids)
    assert [len(one) for one in tokens] == made.lengths.tolist()
    flat = [token for one in tokens for token in one]
    assert [token["start"] for token in flat] == made.starts.tolist()
    assert [token["role"] for token in flat] == made.roles.tolist()


def test_hidden_states(pristine: Path, plan: Plan) -> None:
    texts = [plan.train[one] for one in arrow(pristine / "texts/part-00002.arrow")["text_id"].to_pylist()]
    group = zarr.open(str(pristine / BERT / "hidden/part-00002.zarr"), mode="r")
    int8, plain = made_hidden(plan.teachers[0], 2, texts), made_hidden(plan.teachers[0], 4, texts)
    assert np.array_equal(group["layer-02"][...], int8.values)
    assert np.array_equal(group["layer-02-scale"][...], int8.scales)
    assert np.array_equal(group["layer-04"][...], plain.values)
    assert sorted(group.array_keys()) == ["layer-02", "layer-02-scale", "layer-04"]


def test_basis(pristine: Path) -> None:
    basis = load_file(pristine / BERT / "basis/layer-02.safetensors")
    assert basis["components"].shape == (LAYERS[2].dim, 6)
    assert (basis["total_variance"], basis["target_variance"]) == (2.0, 1.5)
