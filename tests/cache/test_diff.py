"""What differs between two caches, said by topic."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kdcache.cache.diff import diff
from kdcache.cache.reader import open_cache
from kdcache.cache.spec import Settings
from kdcache.codecs.base import LayerSpec
from kdcache.share.push import push
from kdcache.share.stores.directory import DirectoryRemote
from kdcache.testing.caches import Plan, dump, made_plan, made_teacher, made_texts
from tests.cli.commands import kdcache

BASE = made_plan(8, 3, ("bert",))


def compared(tmp_path: Path, one: Plan, other: Plan) -> tuple[dict[str, object], list[str]]:
    for name, plan in (("a", one), ("b", other)):
        dump(tmp_path / name, plan)
    found = diff(open_cache(tmp_path / "a"), open_cache(tmp_path / "b"))
    return dict(found.facts), found.lines()


def test_equal_caches(tmp_path: Path) -> None:
    facts, lines = compared(tmp_path, BASE, BASE)
    assert not any(facts[key] for key in ("settings", "texts", "splits", "teachers"))
    assert len(lines) == 1 and "shared" in lines[0]


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (made_plan(10, 3, ("bert",)), ["texts: - 0  + 2  in both 11", "split train: + 2 rows"]),
        (replace(BASE, train=made_texts(8, "train")), []),
        (made_plan(8, 3, ("bert", "roberta")), ["teacher roberta: + only in the second"]),
        (replace(BASE, settings=Settings(9, 4)), ["seed: - 3  + 9", "with other values under the same name"]),
        (replace(BASE, store_text=False), ["text: - stored  + absent"]),
        (
            replace(
                BASE,
                teachers=(made_teacher("bert", {2: LayerSpec("pca", 2, "int8"), 3: LayerSpec("none", 6, "float32")}),),
            ),
            ["layers: - 4", "layers: + 3", "layer 2: dim: - 3  + 2"],
        ),
        (replace(BASE, teachers=(made_teacher("bert", max_length=8),)), ["teacher bert: max_length: - 16  + 8"]),
    ],
)
def test_what_differs_is_named(tmp_path: Path, other: Plan, expected: list[str]) -> None:
    _, lines = compared(tmp_path, BASE, other)
    for line in expected:
        assert any(line in found for found in lines), lines


def test_labels_and_rows_are_counted_as_rows(tmp_path: Path) -> None:
    from kdcache.cache.ids import id_array
    from kdcache.cache.writer import open_writer

    for name in ("a", "b"):
        dump(tmp_path / name, BASE)
    with open_writer(tmp_path / "b", BASE.task, BASE.settings) as writer:
        before = open_cache(tmp_path / "b").examples("train")
        labels = before.labels.copy()
        labels[:2] = 1 - labels[:2].clip(0)
        ids = [row.tobytes() for row in before.text_ids]
        writer.write_examples("train", id_array([*ids, ids[0]]), np.append(labels, labels[0]), None)
        writer.publish({})
    found = diff(open_cache(tmp_path / "a"), open_cache(tmp_path / "b"))
    assert found.facts["splits"] == {"train": {"only_first": 0, "only_second": 1, "other_label": 2, "other_group": 0}}
    assert found.facts["texts"] == {}


def test_rows_are_compared_by_class_and_group(tmp_path: Path) -> None:
    """The numbers of the classes depend on their order, which may differ."""
    from kdcache.cache.writer import open_writer

    turned = replace(BASE, task=replace(BASE.task, label_names=tuple(reversed(BASE.task.label_names))))
    for name, plan, groups in (("a", BASE, "x"), ("b", BASE, "y"), ("c", turned, "x")):
        dump(tmp_path / name, plan)
        with open_writer(tmp_path / name, plan.task, plan.settings) as writer:
            rows = open_cache(tmp_path / name).examples("train")
            labels = np.arange(len(rows)) % 2
            labels = 1 - labels if plan is turned else labels
            writer.write_examples("train", rows.text_ids, labels, [groups] * len(rows))
            writer.publish({})
    a, b, c = (diff(open_cache(tmp_path / "a"), open_cache(tmp_path / name)).facts["splits"] for name in "abc")
    assert a == {}
    assert b["train"] == {"only_first": 0, "only_second": 0, "other_label": 0, "other_group": 8}
    assert not any(c["train"].values())


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dump(tmp_path / "a", BASE)
    dump(tmp_path / "b", made_plan(9, 3, ("bert",)))
    (tmp_path / "remote").mkdir()
    monkeypatch.setenv("KDCACHE_REMOTE", str(tmp_path / "remote"))
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    push(DirectoryRemote(tmp_path / "remote"), tmp_path / "b", "mine")
    assert kdcache("cache", "diff", tmp_path / "b", "mine").code == 0
    said = kdcache("cache", "diff", tmp_path / "a", "mine", "--json")
    assert said.code == 3 and said.document["texts"]["only_second"] == 1
    kept = next((tmp_path / "home/store/caches").iterdir())
    fetched = {path.relative_to(kept).parts[0] for path in kept.rglob("*.arrow")}
    assert fetched == {"texts", "data"}
    said = kdcache("cache", "diff", tmp_path / "a", tmp_path / "b")
    assert said.code == 3 and "split train: + 1 rows" in said.out


def test_texts_with_hidden_states_are_counted(tmp_path: Path) -> None:
    """The same texts, more of them with hidden states."""
    plan = made_plan()
    some, every = tmp_path / "some", tmp_path / "every"
    dump(some, plan)
    dump(every, replace(plan, train={**plan.train, **plan.test}))
    found = diff(open_cache(some), open_cache(every))
    assert found.facts["texts"] == {"only_first": 0, "only_second": 0, "in_both": 15, "with_hidden": [10, 15]}
    assert "texts with hidden states: - 10  + 15" in found.lines()
