"""What is written is read back bit for bit: ragged parts, all dtypes and projections, pairs, no texts at all."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kdcache
from kdcache.cache.ids import id_array, id_list, text_id
from kdcache.cache.reader import Cache, open_cache
from kdcache.cache.spec import Settings, TaskSpec, needs_tokens
from kdcache.codecs.base import LayerSpec
from kdcache.errors import MismatchError
from kdcache.testing.caches import (
    Plan,
    dump,
    made_basis,
    made_hidden,
    made_outputs,
    made_plan,
    made_teacher,
    made_tokens,
    tokenizer_json,
)  # fmt: skip

WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
LAYERS = st.dictionaries(
    st.integers(0, 4),
    st.builds(
        lambda projection, dim, dtype: LayerSpec(projection, 6 if projection == "none" else dim, dtype),
        st.sampled_from(["none", "pca", "random"]), st.integers(1, 6), st.sampled_from(["float32", "float16", "int8"]),
    ),
    max_size=3,
)  # fmt: skip


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    columns = draw(st.integers(1, 2))
    texts = st.lists(st.tuples(*[WORDS] * columns), max_size=9, unique=True)
    made = [{text_id(text): text for text in draw(texts)} for _ in range(2)]
    teachers = (
        made_teacher("a", draw(LAYERS), pooled=draw(st.sampled_from([None, 3]))),
        made_teacher("B", draw(LAYERS)),
    )
    task = TaskSpec(("premise", "hypothesis")[:columns], ("no", "yes"))
    return Plan(
        made[0],
        made[1],
        teachers,
        task,
        Settings(draw(st.integers(-3, 3)), draw(st.integers(1, 5))),
        draw(st.booleans()),
    )


@given(plan=plans())
@settings(max_examples=40)
def test_what_is_written_is_read(memory: str | None, plan: Plan) -> None:
    path = Path(tempfile.mkdtemp(dir=memory)) / "cache"
    try:
        manifest = dump(path, plan)
        cache = open_cache(path)
        assert cache.identity == manifest.identity
        assert cache.teachers == {spec.name: spec for spec in plan.teachers}
        check_texts(cache, plan)
        for spec in plan.teachers:
            check_teacher(cache, plan, spec.name)
    finally:
        shutil.rmtree(path.parent)


def check_texts(cache: Cache, plan: Plan) -> None:
    texts = plan.test | plan.train
    by_scope: dict[str, set[bytes]] = {"full": set(), "logits": set()}
    for part in cache.parts:
        ids = id_list(cache.text_ids(part.name))
        assert len(ids) == part.texts <= plan.settings.part_size
        by_scope[part.scope] |= set(ids)
        if plan.store_text:
            assert cache.texts(part.name) == [texts[one] for one in ids]
    assert by_scope == {"full": set(plan.train), "logits": plan.test.keys() - plan.train.keys()}
    parts, rows = cache.locate(id_array(texts))
    for one, part, row in zip(texts, parts, rows, strict=True):
        assert bytes(cache.text_ids(cache.parts[part].name)[row]) == one


def check_teacher(cache: Cache, plan: Plan, name: str) -> None:
    spec = cache.teachers[name]
    texts = plan.test | plan.train
    for part in cache.parts:
        ids = cache.text_ids(part.name)
        wanted, found = made_outputs(spec, ids), cache.outputs(name, part.name)
        assert np.array_equal(found.logits, wanted.logits)
        assert found.pooled is None if wanted.pooled is None else np.array_equal(found.pooled, wanted.pooled)
        columns = [texts[one] for one in id_list(ids)]
        if part.scope == "full" and needs_tokens(spec.layers):
            for field in ("offsets", "starts", "ends", "segments", "roles"):
                assert np.array_equal(
                    getattr(cache.tokens(name, part.name), field), getattr(made_tokens(columns), field)
                )
        else:
            with pytest.raises(MismatchError, match="no tokens"):
                cache.tokens(name, part.name)
        if part.scope == "logits":
            continue
        for layer in spec.layers:
            block, made = cache.hidden(name, part.name, layer), made_hidden(spec, layer, columns)
            assert block.values.dtype == made.values.dtype
            assert np.array_equal(block.values, made.values)
            assert (block.scales is None) == (made.scales is None)
            assert made.scales is None or np.array_equal(block.scales, made.scales)
    for layer in spec.layers:
        basis, made_one = cache.basis(name, layer), made_basis(spec, layer)
        assert (basis.total_variance, basis.target_variance) == (made_one.total_variance, made_one.target_variance)
        assert (basis.components is None) == (made_one.components is None)
        assert made_one.components is None or np.array_equal(basis.components, made_one.components)
    assert cache.tokenizer_json(name) == tokenizer_json(name)


def test_examples_and_their_labels(pristine: Path, plan: Plan) -> None:
    cache = kdcache.open_cache(pristine)
    table = cache.examples("train")
    assert id_list(table.text_ids) == list(plan.train)
    assert table.labels.tolist() == [-1, 0, 1, -1, 0, 1, -1, 0, 1, -1]
    assert table.groups is None
    assert set(cache.splits) == {"train", "test"}


def test_absent_things_are_named_with_what_there_is(pristine: Path) -> None:
    cache = open_cache(pristine)
    with pytest.raises(MismatchError, match="no teacher 'electra'; it has: bert, roberta"):
        cache.outputs("electra", "part-00000")
    with pytest.raises(MismatchError, match="no layer of teacher 'bert' 3; it has: 2, 4"):
        cache.hidden("bert", "part-00000", 3)
    with pytest.raises(MismatchError, match="no split 'dev'; it has: test, train"):
        cache.examples("dev")
    assert cache.locate(np.zeros((2, 16), np.uint8))[0].tolist() == [-1, -1]


@pytest.mark.parametrize("kept", [0, 1 << 18])
def test_a_text_that_was_test_and_becomes_train_is_found_in_its_full_part(
    kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcache.cache.places._KEPT", kept)
    plan = made_plan(4, 3, ["bert"])
    dump(tmp_path / "c", plan)
    moved = dict(list(plan.test.items())[:1])
    dump(tmp_path / "c", Plan(plan.train | moved, plan.test, plan.teachers))
    cache = open_cache(tmp_path / "c")
    assert [(part.scope, part.texts) for part in cache.parts] == [("full", 4), ("logits", 3), ("full", 1)]
    for _ in range(2):
        parts, rows = cache.locate(id_array(moved))
        assert (parts.tolist(), rows.tolist()) == ([2], [0])


def test_a_cache_without_texts_says_so(tmp_path: Path, plan: Plan) -> None:
    dump(tmp_path / "c", Plan(plan.train, plan.test, plan.teachers, store_text=False))
    cache = open_cache(tmp_path / "c")
    assert not cache.has_text
    with pytest.raises(MismatchError, match="without its texts"):
        cache.texts("part-00000")
