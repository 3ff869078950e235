"""A dump with out-of-fold teachers: the logits of train texts, whatever runs the teachers, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache import files
from kdcache.cache.card import folds_lines
from kdcache.cache.ids import id_list
from kdcache.cache.manifest import read_manifest
from kdcache.cache.reader import Cache, open_cache
from kdcache.cache.verify import verify
from kdcache.data.encoding import load_tokenizer
from kdcache.data.task import load_task
from kdcache.dump.audit import AuditReport, audit
from kdcache.dump.dry_run import estimate_dump
from kdcache.dump.engines.cluster import dump_on_shared_disk
from kdcache.dump.engines.local import LocalEngine
from kdcache.dump.extend import Wanted, extend_cache
from kdcache.dump.plan import plan_storage
from kdcache.dump.stage import prepare_dump
from kdcache.errors import MismatchError
from kdcache.loading.choice import TargetChoice
from kdcache.loading.live import LiveBatches
from kdcache.loading.order import BatchSettings
from kdcache.progress import SilentProgress
from kdcache.recipe import load_recipe
from kdcache.teachers.bundle import load_teacher, read_bundle
from kdcache.teachers.cofinetune import cofinetune
from kdcache.teachers.folds import FoldLogits, fold_directory, folds_of_cache, read_folds
from kdcache.testing.faults import UnsyncedDisk
from kdcache.testing.tiny import make_model, reviews, write_reviews
from tests.dump.conftest import Workbench
from tests.dump.test_stage import digests

WITHOUT = "dump.out_of_fold=false"


@pytest.fixture(autouse=True)
def _fast_disk() -> Iterator[None]:
    with files.use_disk(UnsyncedDisk()):
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """Two teachers of one block with three folds; 24 train, 8 validation and 8 transfer texts. Not to be changed."""
    place = tmp_path_factory.mktemp("folds")
    rows = reviews(40, seed=3)
    write_reviews(place / "train.tsv", rows[:24])
    write_reviews(place / "dev.tsv", rows[24:32])
    write_reviews(place / "more.tsv", [*rows[32:], rows[0]], labelled=False)  # one of them is a train text
    models = {"bert": make_model(place / "bert", "bert", depth=1, seed=1)}
    models["roberta"] = make_model(place / "roberta", "roberta", depth=1, seed=2)
    teachers = "".join(f'[[teachers]]\nname = "{name}"\nmodel = "{path}"\n' for name, path in models.items())
    (place / "recipe.toml").write_text(f"""\
name = "folds"
[data]
train = "train.tsv"
validation = "dev.tsv"
transfer = ["more.tsv"]
text = ["sentence"]
label = "label"
max_length = 32
{teachers}
[cofinetune]
epochs = 1
batch_size = 8
learning_rate = 5e-3
folds = 3
[dump]
layers = [1]
dim = 4
part_size = 8
sample_texts = 16
""")
    bench = Workbench(place / "recipe.toml", place / "teachers", place / "cache")
    with files.use_disk(UnsyncedDisk()):
        cofinetune(bench.recipe(), bench.teachers, place / "work", progress=SilentProgress())
        bench.dump()
        bench.dump(WITHOUT, cache=place / "without")
    return bench


@pytest.fixture
def bench(made: Workbench, tmp_path: Path) -> Workbench:
    """The same with a cache, and teachers, that the test may change."""
    shutil.copytree(made.teachers, tmp_path / "teachers")
    shutil.copytree(made.cache, tmp_path / "cache")
    return replace(made, teachers=tmp_path / "teachers", cache=tmp_path / "cache")


def _without(made: Workbench) -> Path:
    return made.cache.parent / "without"


def _logits(cache: Cache, name: str) -> dict[bytes, np.ndarray]:
    return {
        one: logits
        for part in cache.parts
        for one, logits in zip(id_list(cache.text_ids(part.name)), cache.outputs(name, part.name).logits, strict=True)
    }


def _folds(bench: Workbench, name: str) -> FoldLogits:
    found = read_folds(bench.teachers, name)
    assert found is not None
    return found


def test_train_texts_alone_get_the_logits_of_the_bundle_without_them(made: Workbench) -> None:
    cache, plain = open_cache(made.cache), open_cache(_without(made))
    train = {bytes(one) for one in load_task(made.recipe().data).splits["train"].text_ids}
    for name in ("bert", "roberta"):
        ours, theirs, folds = _logits(cache, name), _logits(plain, name), _folds(made, name)
        assert len(ours) == 40 and len(train) == 24
        for one, logits in ours.items():
            (place,) = folds.places(np.frombuffer(one, np.uint8)[None])
            assert (place >= 0) == (one in train)
            expected = folds.logits[place] if one in train else theirs[one]
            np.testing.assert_array_equal(logits, expected)
            assert (one not in train) == np.allclose(logits, theirs[one], atol=1e-4)
    ours_on_disk, theirs_on_disk = digests(made.cache), digests(_without(made))
    apart = {path for path in theirs_on_disk if ours_on_disk[path] != theirs_on_disk[path]} - {"README.md"}
    assert "manifest.json" in apart  # hidden states, bases and spans are those of the teacher itself
    assert all("/outputs/" in path for path in apart - {"manifest.json"})
    assert verify(made.cache) == []


def test_a_bundle_that_answers_a_constant_answers_its_own_fold_alone(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever runs the teachers: one process, shards, or workers."""
    found = _folds(bench, "bert")
    constant = replace(found, logits=np.repeat(found.folds[:, None] + 100.0, 2, axis=1).astype(np.float32))
    monkeypatch.setattr("kdcache.dump.specs.choose_folds", lambda *_, **__: constant)
    monkeypatch.setattr("kdcache.dump.engines.worker.folds_of_cache", lambda *_: constant)
    only = bench.only("bert")
    place = bench.cache.parent
    only.dump(cache=place / "local")
    for index in range(2):
        only.shard(index, 2, cache=place / "shards")
    job = prepare_dump(only.recipe(), only.teachers, place / "workers", progress=SilentProgress())
    dump_on_shared_disk(job, LocalEngine())
    fold_of = dict(zip(id_list(found.text_ids), found.folds.tolist(), strict=True))
    for kind in ("local", "shards", "workers"):
        for one, logits in _logits(open_cache(place / kind), "bert").items():
            if one in fold_of:
                assert logits.tolist() == [100.0 + fold_of[one]] * 2, kind
            else:
                assert (np.abs(logits) < 50).all(), kind


def test_every_engine_writes_the_same_cache(made: Workbench, tmp_path: Path) -> None:
    for index in range(2):
        made.shard(index, 2, cache=tmp_path / "shards")
    job = prepare_dump(made.recipe(), made.teachers, tmp_path / "workers", progress=SilentProgress())
    dump_on_shared_disk(job, LocalEngine())
    identities = [read_manifest(cache).identity for cache in (made.cache, tmp_path / "shards", tmp_path / "workers")]
    assert len(set(identities)) == 1


def test_the_manifest_names_the_folds_and_the_page_says_so(made: Workbench) -> None:
    manifest = read_manifest(made.cache)
    document = json.loads((made.cache / "manifest.json").read_bytes())
    for name, spec in manifest.contents.teachers.items():
        record = read_bundle(made.teachers).training["folds"]["teachers"][name]
        assert spec.folds == _folds(made, name).spec
        assert document["teachers"][name]["folds"] == {key: record[key] for key in ("weights", "logits", "texts")}
        assert len(set(record["weights"])) == 3
        stored = manifest.provenance["teachers"][name]["train_rows"]
        assert float(stored["out_of_fold"]["nll"]) == pytest.approx(record["scores"]["out_of_fold"]["loss"], rel=1e-4)
    lines = folds_lines({"teachers": document["teachers"], "provenance": manifest.provenance})
    assert len(lines) == 2
    assert "bert: the logits of 24 train texts come from 3 bundles that did not see them." in lines[0]
    assert all(line in (made.cache / "README.md").read_text() for line in lines)
    plain = read_manifest(_without(made))
    assert plain.identity != manifest.identity
    assert "folds" not in json.loads((_without(made) / "manifest.json").read_bytes())["teachers"]["bert"]


def test_teachers_without_folds_make_the_cache_of_before(made: Workbench, tmp_path: Path) -> None:
    """``out_of_fold = false`` stores what teachers store that never had folds, to the byte of the identity."""
    shutil.copytree(made.teachers, tmp_path / "teachers", ignore=shutil.ignore_patterns("_folds"))
    record = json.loads((tmp_path / "teachers" / "teachers.json").read_text())
    del record["training"]["folds"]
    (tmp_path / "teachers" / "teachers.json").write_text(json.dumps(record))
    never = replace(made, teachers=tmp_path / "teachers", cache=tmp_path / "cache")
    with pytest.raises(MismatchError, match=r"'bert' are asked for, and .* has no folds"):
        never.dump()
    plain = load_recipe(made.recipe_file)
    plain = plain.model_copy(update={"cofinetune": plain.cofinetune.model_copy(update={"folds": None})})
    job = prepare_dump(plain, never.teachers, never.cache, progress=SilentProgress())
    assert [teacher.out_of_fold for teacher in job.teachers] == [None, None]
    assert never.dump(WITHOUT).identity == read_manifest(_without(made)).identity


def test_a_cache_with_folds_is_not_continued_without_and_the_other_way_round(made: Workbench, bench: Workbench) -> None:
    with pytest.raises(
        MismatchError, match=r"of teacher 'bert' from 3 folds \([0-9a-f]{12}\); now they come from the t"
    ):
        bench.dump(WITHOUT)
    with pytest.raises(MismatchError, match="from the teacher itself; now they come from 3 folds") as caught:
        made.dump(cache=_without(made))
    assert "dump.out_of_fold = false" in caught.value.hint
    assert bench.dump().runs == ()


def _audit(bench: Workbench) -> AuditReport:
    return audit(open_cache(bench.cache), bench.teachers, rows=40, progress=SilentProgress())


def test_the_audit_runs_the_bundles_of_the_folds(made: Workbench) -> None:
    report = _audit(made)
    assert report.findings == []
    for teacher in report.teachers:
        assert teacher.worst["folds"] == 0.0
        assert teacher.worst["logits"] <= 1
    plain = audit(open_cache(_without(made)), made.teachers, rows=40, progress=SilentProgress())
    assert plain.findings == [] and "folds" not in plain.teachers[0].worst


def test_the_audit_finds_logits_of_a_bundle_that_saw_the_text(
    made: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folds = read_folds

    def exchanged(*arguments: Any) -> FoldLogits:
        found = folds(*arguments)
        assert found is not None
        return replace(found, logits=found.logits[::-1])

    monkeypatch.setattr("kdcache.teachers.folds.read_folds", exchanged)
    wrong = replace(made.only("bert"), cache=tmp_path / "cache")
    wrong.dump()
    monkeypatch.undo()
    assert verify(wrong.cache) == []
    (finding,) = _audit(wrong).findings
    assert finding.component == "logits"


def test_the_audit_finds_a_bundle_that_was_trained_on_its_fold(bench: Workbench) -> None:
    path = fold_directory(bench.teachers, 1) / "teachers.json"
    record = json.loads(path.read_text())
    record["training"]["identity"]["data.train"] = read_bundle(bench.teachers).training["identity"]["data.train"]
    path.write_text(json.dumps(record))
    findings = _audit(bench).findings
    assert {(finding.teacher, finding.component) for finding in findings} == {("bert", "folds"), ("roberta", "folds")}
    assert "fold 2 was not trained on exactly the rows outside" in findings[0].message


def test_the_audit_finds_other_folds(bench: Workbench, tmp_path: Path) -> None:
    cofinetune(
        bench.recipe("cofinetune.folds=2"),
        tmp_path / "others",
        tmp_path / "work",
        progress=SilentProgress(),
    )
    found = {
        finding.component: finding.message for finding in _audit(replace(bench, teachers=tmp_path / "others")).findings
    }
    assert "the teachers have 2 folds" in found["folds"]
    assert "weights" not in found
    with pytest.raises(MismatchError, match="the cache has logits of teacher 'bert' from 3 folds"):
        folds_of_cache(tmp_path / "others", "bert", open_cache(bench.cache).teachers["bert"].folds)


def test_a_cache_grows_by_its_own_rule(made: Workbench, bench: Workbench, tmp_path: Path) -> None:
    """New rows, and a new teacher: train texts as before, new texts from the teacher itself."""
    plain = Path(shutil.copytree(_without(made), tmp_path / "plain"))
    new = reviews(46, seed=3)[40:]
    write_reviews(tmp_path / "new.tsv", new, labelled=False)
    more = [str(made.recipe_file.parent / "more.tsv"), str(tmp_path / "new.tsv")]
    recipe = bench.recipe(f"data.transfer={json.dumps(more)}")
    both = dict.fromkeys(("bert", "roberta"), bench.teachers)
    for cache in (bench.cache, plain):
        report = extend_cache(cache, Wanted(both, recipe=recipe), progress=SilentProgress())
        assert report.new_texts == 6
    ours, theirs = (_logits(open_cache(cache), "bert") for cache in (bench.cache, plain))
    differing = {one for one in ours if not np.array_equal(ours[one], theirs[one])}
    assert differing == set(id_list(_folds(bench, "bert").text_ids))
    alone = made.only("bert")
    alone.dump(cache=tmp_path / "grown")
    extend_cache(tmp_path / "grown", Wanted({"roberta": made.teachers}), progress=SilentProgress())
    grown = open_cache(tmp_path / "grown")
    assert grown.teachers["roberta"].folds == _folds(made, "roberta").spec
    assert "train_rows" in grown.manifest.provenance["teachers"]["roberta"]
    assert all(
        np.array_equal(logits, _logits(grown, "roberta")[one])
        for one, logits in _logits(open_cache(made.cache), "roberta").items()
        if one in id_list(_folds(made, "roberta").text_ids)
    )
    shutil.rmtree(bench.teachers / "_folds")
    record = read_bundle(bench.teachers).training
    assert "folds" in record
    with pytest.raises(Exception, match="_folds/1"):
        extend_cache(bench.cache, Wanted(both, layers=(0,)), progress=SilentProgress())


def test_live_teachers_answer_as_the_cache(made: Workbench) -> None:
    cache = open_cache(made.cache)
    folds = {name: _folds(made, name) for name in cache.teachers}
    live = LiveBatches(
        cache,
        load_tokenizer(str(made.teachers / "bert")),
        BatchSettings(8, 32, 0, 8, "error"),
        TargetChoice(("bert", "roberta"), logits=True),
        [load_teacher(made.teachers, name) for name in cache.teachers],
        splits=("train", "transfer"),
        out_of_fold=folds,
    )
    stored = {name: _logits(cache, name) for name in cache.teachers}
    rows = 0
    for batch in live.batches(0):
        assert batch.targets is not None
        for row, one in enumerate(id_list(np.asarray(batch.text_ids))):
            for index, name in enumerate(cache.teachers):
                np.testing.assert_allclose(batch.targets.logits[index, row].numpy(), stored[name][one], atol=1e-5)
            rows += 1
    assert rows == 32
    split = live.logits_for("train").numpy()
    ids = id_list(cache.examples("train").text_ids)
    np.testing.assert_allclose(split[1], [stored["roberta"][one] for one in ids], atol=1e-6)


def test_the_plan_counts_what_folds_cost(made: Workbench) -> None:
    there = plan_storage(made.recipe(), made.teachers, unseen=4, progress=SilentProgress())
    assert there.folds is not None and there.folds.seconds == 0
    assert there.lines()[2] == "the logits of train texts come from 3 folds; the dump takes no longer with them"
    assert plan_storage(made.recipe(WITHOUT), made.teachers, unseen=4, progress=SilentProgress()).folds is None


def test_the_plan_of_folds_that_are_still_to_be_trained(made: Workbench, tmp_path: Path) -> None:
    shutil.copytree(made.teachers, tmp_path / "teachers", ignore=shutil.ignore_patterns("_folds"))
    record = json.loads((tmp_path / "teachers" / "teachers.json").read_text())
    del record["training"]["folds"]
    (tmp_path / "teachers" / "teachers.json").write_text(json.dumps(record))
    plan = plan_storage(made.recipe("cofinetune.epochs=4"), tmp_path / "teachers", unseen=4, progress=SilentProgress())
    assert plan.folds is not None
    assert (plan.folds.count, plan.folds.rows) == (3, 24)
    forward = sum(plan.seconds.values()) / (32 + 8 + 16)  # seconds per text: 32 in full, 8 with logits, 16 for bases
    assert plan.folds.seconds == pytest.approx(24 * (3 * 2 * 4 + 2) * forward)
    assert "2 times the steps of co-finetuning on 24 labelled rows" in plan.lines()[2]
    assert plan.as_dict()["folds"]["count"] == 3
    with pytest.raises(MismatchError, match="has no folds"):
        estimate_dump(made.recipe(), tmp_path / "teachers", tmp_path / "cache", progress=SilentProgress())
