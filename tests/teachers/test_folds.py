"""Out-of-fold teachers: who is in which fold, what each bundle is trained on, and what a kill leaves."""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache import files
from kdcache.cache.ids import Examples, id_array, text_id
from kdcache.data.task import load_task
from kdcache.errors import DamageError, DataError, MismatchError, NonFiniteError, RecipeError, StorageError
from kdcache.progress import SilentProgress
from kdcache.recipe import Recipe
from kdcache.teachers import joint, registration
from kdcache.teachers.bundle import read_bundle
from kdcache.teachers.cofinetune import CofinetuneResult, add_teacher, cofinetune
from kdcache.teachers.folds import (
    assign_folds,
    choose_folds,
    fold_directory,
    read_folds,
    rows_where,
    texts_of_fold,
)
from kdcache.testing.faults import UnsyncedDisk, counting_disk, failing_disk
from kdcache.testing.tiny import make_model

from .conftest import files_in
from .test_cofinetune import Notes, changed, logits_of, with_teachers
from .test_resume import Interrupting

ROWS = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from(["", "a", "b", "c", "d"]), st.integers(-1, 1)),
    min_size=1,
    max_size=40,
)


def _examples(rows: list[tuple[int, str, int]], *, grouped: bool = True) -> Examples:
    ids = id_array([text_id((str(text),)) for text, _, _ in rows])
    labels = np.array([label for _, _, label in rows], np.int64)
    return Examples(ids, labels, tuple(group for _, group, _ in rows) if grouped else None)


def _related(rows: list[tuple[int, str, int]], grouped: bool) -> list[set[int]]:
    """Rows that share texts or groups, by a loop until nothing changes."""
    sets = [{row} for row in range(len(rows))]
    for first in range(len(rows)):
        for second in range(first):
            (one, group, _), (other, its_group, _) = rows[first], rows[second]
            if one == other or (grouped and group and group == its_group):
                joined = sets[first] | sets[second]
                for row in joined:
                    sets[row] = joined
    return sets


@given(ROWS, st.booleans(), st.integers(2, 4), st.integers(0, 5), st.randoms(use_true_random=False))
def test_folds_keep_texts_and_groups_together(
    rows: list[tuple[int, str, int]], grouped: bool, folds: int, seed: int, random: Any
) -> None:
    related = _related(rows, grouped)
    trained = {min(own) for own in related if any(rows[row][2] >= 0 for row in own)}
    if len(trained) < folds:
        with pytest.raises(DataError, match=f"{folds} folds need as many"):
            assign_folds(_examples(rows, grouped=grouped), folds, seed)
        return
    assigned = assign_folds(_examples(rows, grouped=grouped), folds, seed).tolist()
    for row, own in enumerate(related):
        assert {assigned[other] for other in own} == {assigned[row]}
        assert (assigned[row] >= 0) == (min(own) in trained)
    labelled = Counter(fold for fold, (_, _, label) in zip(assigned, rows, strict=True) if label >= 0)
    largest = max(sum(rows[row][2] >= 0 for row in own) for own in related)
    assert len(labelled) == folds
    assert max(labelled.values()) - min(labelled.values()) <= largest
    order = list(range(len(rows)))
    random.shuffle(order)
    again = assign_folds(_examples([rows[row] for row in order], grouped=grouped), folds, seed)
    assert [assigned[row] for row in order] == again.tolist()  # the order of the file does not matter


def test_folds_of_single_texts_are_equally_large_and_depend_on_the_seed() -> None:
    examples = _examples([(row, "", row % 2) for row in range(103)])
    by_seed = [assign_folds(examples, 5, seed) for seed in (0, 0, 1)]
    assert sorted(np.bincount(by_seed[0]).tolist()) == [20, 20, 21, 21, 21]
    assert np.array_equal(by_seed[0], by_seed[1])
    assert not np.array_equal(by_seed[0], by_seed[2])


@pytest.fixture
def folded(recipe: Recipe) -> Recipe:
    return changed(recipe, cofinetune={"folds": 2})


def run(recipe: Recipe, root: Path, progress: SilentProgress | None = None) -> CofinetuneResult:
    return cofinetune(recipe, root / "teachers", root / "work", progress=progress or SilentProgress())


@pytest.fixture(scope="module")
def kept() -> dict[str, Path]:
    return {}


@pytest.fixture(scope="module")
def writes() -> list[str]:
    """The steps of the disk in the run that made ``whole``."""
    return []


@pytest.fixture
def whole(folded: Recipe, kept: dict[str, Path], writes: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers with two folds, made once by an undisturbed run. Not to be changed."""
    if "root" not in kept:
        kept["root"] = tmp_path_factory.mktemp("whole")
        with files.use_disk(counting := counting_disk()):
            run(folded, kept["root"])
        writes += counting.steps
    return kept["root"]


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def _trained_on(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, set[tuple[str, ...]]]]:
    """The texts of every training, by the name of its directory of checkpoints."""
    seen: list[tuple[str, set[tuple[str, ...]]]] = []
    train = joint.train

    def spied(settings: Any, task: Any, sources: Any, models: Any, identity: Any, place: Path, **others: Any) -> int:
        rows = joint.labelled_rows(task, "train")
        assert rows is not None
        seen.append((place.name, set(rows.texts)))
        return train(settings, task, sources, models, identity, place, **others)

    monkeypatch.setattr(joint, "train", spied)
    return seen


def test_no_bundle_sees_the_texts_that_it_answers(
    folded: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With repeated texts, unlabelled rows and groups in train; every bundle says which it is in its answers."""
    lines = [line.split("\t") for line in Path(folded.data.train).read_text().splitlines()[1:]]
    rows = [(text, label, f"g{row // 2 if row < 20 else ''}") for row, (text, label) in enumerate(lines)]
    rows += [(text, label, "") for text, label, _ in rows[:10]] + [(f"{rows[0][0]} again", "", "g0"), ("new", "", "")]
    table = "\n".join("\t".join(row) for row in [("sentence", "label", "group"), *rows])
    (tmp_path / "train.tsv").write_text(table.replace("\tg\n", "\t\n") + "\n")
    recipe = changed(
        folded,
        cofinetune={"folds": 3},
        data={"train": str(tmp_path / "train.tsv"), "validation": None, "group": "group"},
    )
    seen = _trained_on(monkeypatch)

    def constant(directory: Path, _name: str, _bundle: Any, texts: Any, _trusted: Any) -> np.ndarray:
        number = int(directory.name) if directory.name.isdecimal() else 0
        return np.full((len(texts), 2), number, np.float32)

    monkeypatch.setattr(registration, "present_logits", constant)
    with files.use_disk(UnsyncedDisk()):
        result = run(recipe, tmp_path)
    by_bundle = {int(name.removeprefix("fold-")): texts for name, texts in seen if name != "joint"}
    assert sorted(by_bundle) == [1, 2, 3]
    task = load_task(recipe.data)
    groups = dict(zip(map(bytes, task.splits["train"].text_ids), task.splits["train"].groups or (), strict=True))
    for name in ("bert", "roberta"):
        found = read_folds(tmp_path / "teachers", name)
        assert found is not None
        assert np.array_equal(found.logits[:, 0], found.folds + 1)
        of_groups: dict[str, set[int]] = defaultdict(set)
        for one, answer in zip(map(bytes, found.text_ids), found.logits[:, 0].tolist(), strict=True):
            assert task.texts[one] not in by_bundle[int(answer)]
            of_groups[groups[one]].add(int(answer))
        assert all(len(folds) == 1 for group, folds in of_groups.items() if group)
        labelled = {bytes(one) for one in rows_where(task.splits["train"], task.splits["train"].labels >= 0).text_ids}
        answered = set(map(bytes, found.text_ids))
        assert labelled < answered and text_id((f"{rows[0][0]} again",)) in answered  # its group was trained on
        assert text_id(("new",)) not in answered
        everything = np.arange(4, dtype=np.float32).repeat(2).reshape(4, 2)
        ids = id_array(
            [bytes(found.text_ids[0]), text_id(("elsewhere",)), text_id(("new",)), bytes(found.text_ids[-1])]
        )
        replaced = found.instead_of(everything, ids)[:, 0].tolist()
        assert replaced == [found.logits[0, 0], 1.0, 2.0, found.logits[-1, 0]]
    assert dict(seen)["joint"] == set.union(*by_bundle.values())
    assert result.folds["count"] == 3


def test_the_teachers_and_all_keys_are_as_without_folds(
    recipe: Recipe, folded: Recipe, whole: Path, tmp_path: Path
) -> None:
    with files.use_disk(UnsyncedDisk()):
        run(recipe, tmp_path)
        plain = files_in(tmp_path / "teachers")
        ours = files_in(whole / "teachers")
        assert {name for name in plain if plain[name] != ours[name]} == {"teachers.json"}
        assert all(name.startswith("_folds/") for name in ours.keys() - plain.keys())
        record = json.loads(ours["teachers.json"])
        del record["training"]["folds"]
        assert record == json.loads(plain["teachers.json"])
        assert run(recipe, whole).folds  # without the key, what is there stays
        assert run(folded, tmp_path).folds == run(folded, whole).folds  # folds may come later
    assert files_in(tmp_path / "teachers") == ours


def test_the_answers_are_those_of_the_bundle_without_the_fold(folded: Recipe, whole: Path) -> None:
    task = load_task(folded.data)
    teachers = whole / "teachers"
    assigned = assign_folds(task.splits["train"], 2, folded.cofinetune.seed)
    record = read_bundle(teachers).training["folds"]
    for fold in range(2):
        directory, ids = fold_directory(teachers, fold), texts_of_fold(task, assigned, fold)
        bundle = read_bundle(directory)
        assert bundle.training["identity"]["data.train"] == joint.examples_digest(
            rows_where(task.splits["train"], assigned != fold)
        )
        assert bundle.teachers["bert"].scores["loss"] != read_bundle(teachers).teachers["bert"].scores["loss"]
        for name in ("bert", "roberta"):
            found = read_folds(teachers, name)
            assert found is not None and found.spec.texts == 96
            texts = [task.texts[bytes(one)] for one in ids]
            expected = registration.present_logits(directory, name, bundle, texts, ())
            np.testing.assert_array_equal(found.logits[found.places(ids)], expected)
            assert set(found.folds[found.places(ids)].tolist()) == {fold}
    scores = record["teachers"]["bert"]["scores"]
    assert scores["in_fold"].keys() == scores["out_of_fold"].keys() >= {"accuracy", "loss"}
    assert scores["in_fold"]["loss"] < scores["out_of_fold"]["loss"]


@pytest.mark.parametrize("after", [9])
def test_ctrl_c_in_any_training_loses_nothing(after: int, folded: Recipe, whole: Path, tmp_path: Path) -> None:
    with files.use_disk(UnsyncedDisk()):
        with pytest.raises(KeyboardInterrupt):
            run(folded, tmp_path, Interrupting(after))
        run(folded, tmp_path)
    assert files_in(tmp_path) == files_in(whole)


@pytest.mark.parametrize("share", [0.0, 0.7])
def test_a_full_disk_at_any_write_of_the_folds_loses_nothing(
    share: float, folded: Recipe, whole: Path, writes: list[str], tmp_path: Path
) -> None:
    """From the moment when the teachers of all rows are there, until teachers.json names the folds."""
    first, *_, last = [
        at for at, step in enumerate(writes, start=1) if step == f"rename {whole}/teachers/teachers.json"
    ]
    with (
        files.use_disk(failing_disk(first + 1 + round(share * (last - first - 1)))),
        pytest.raises(StorageError),
    ):
        run(folded, tmp_path)
    assert read_bundle(tmp_path / "teachers").training["best_epoch"]
    with pytest.raises(MismatchError, match="are not complete") as caught:
        choose_folds(tmp_path / "teachers", "bert", 32, asked=None)
    assert "dump.out_of_fold = false" in caught.value.hint
    assert choose_folds(tmp_path / "teachers", "bert", 32, asked=False) is None
    with files.use_disk(UnsyncedDisk()):
        run(folded, tmp_path)
    assert files_in(tmp_path) == files_in(whole)


def test_a_finished_fold_is_not_trained_again(
    folded: Recipe, copied: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = _trained_on(monkeypatch)
    assert run(folded, copied).reused and not seen
    shutil.rmtree(fold_directory(copied / "teachers", 1))
    with pytest.raises(DamageError, match=r"_folds/2"):
        read_folds(copied / "teachers", "bert")
    with files.use_disk(UnsyncedDisk()):
        run(folded, copied)
    assert [name for name, _ in seen] == ["fold-2"]
    assert files_in(copied / "teachers") == files_in(whole / "teachers")


def test_folds_that_somebody_removed_are_gone(recipe: Recipe, folded: Recipe, copied: Path) -> None:
    shutil.rmtree(copied / "teachers" / "_folds")
    with pytest.raises(DamageError, match="_folds/1"):
        read_folds(copied / "teachers", "bert")
    assert run(recipe, copied).folds == {}
    assert read_folds(copied / "teachers", "bert") is None
    (copied / "teachers" / "_folds").mkdir()
    with pytest.raises(DataError, match="100 folds need as many"):
        run(changed(folded, cofinetune={"folds": 100}), copied)


def test_other_folds_are_refused(folded: Recipe, copied: Path) -> None:
    with pytest.raises(MismatchError, match="have 2 folds; the recipe asks for 3") as caught:
        run(changed(folded, cofinetune={"folds": 3}), copied)
    assert "_folds'" in caught.value.hint
    (logits,) = fold_directory(copied / "teachers", 0).glob("_logits/bert.*")
    shutil.copy(fold_directory(copied / "teachers", 1) / "_logits" / "bert.safetensors", logits)
    with pytest.raises(DamageError, match=r"a text is in two folds"):
        read_folds(copied / "teachers", "bert")
    with pytest.raises(MismatchError, match="max_length 32; the dump asks for 64"):
        choose_folds(copied / "teachers", "roberta", 64, asked=None)


def test_altered_answers_are_found(copied: Path) -> None:
    from safetensors.numpy import load_file, save_file

    (path,) = fold_directory(copied / "teachers", 1).glob("_logits/bert.*")
    tensors = load_file(path)
    tensors["logits"][0, 0] += 1e-3
    save_file(tensors, path)
    with pytest.raises(DamageError, match=r"are not those that teachers.json names"):
        read_folds(copied / "teachers", "bert")


def test_a_newcomer_gets_folds_against_the_heads_of_the_folds(
    folded: Recipe, copied: Path, shallow_models: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folds are trained against heads that have not seen the fold; the answers of the others stay."""
    larger = with_teachers(
        changed(folded, cofinetune={"folds": None}),
        *(teacher.model_dump() for teacher in folded.teachers),
        {"name": "new", "model": str(shallow_models["distilbert"])},
    )
    before = read_bundle(copied / "teachers").training["folds"]["teachers"]
    seen = _trained_on(monkeypatch)
    with files.use_disk(UnsyncedDisk()):
        with pytest.raises(KeyboardInterrupt):
            add_teacher(larger, "new", copied / "teachers", copied / "work", progress=Interrupting(9))
        with pytest.raises(MismatchError, match=r"'new' in .* are not complete"):
            read_folds(copied / "teachers", "new")
        assert read_folds(copied / "teachers", "bert") is not None
        result = add_teacher(larger, "new", copied / "teachers", copied / "work", progress=SilentProgress())
        again = add_teacher(larger, "new", copied / "teachers", copied / "work", progress=SilentProgress())
    assert result.reused and again.folds == result.folds
    assert [*dict.fromkeys(name for name, _ in seen)] == ["add-new", *(f"fold-{fold}-add-new" for fold in (1, 2))]
    assert {name: result.folds["teachers"][name] for name in before} == before
    heads = [
        json.loads((fold_directory(copied / "teachers", fold) / "teachers.json").read_text())["training"]["added"][
            "new"
        ]
        for fold in range(2)
    ]
    assert len({head["shared_head"] for head in heads} | {head["data.train"] for head in heads}) == 4
    found = read_folds(copied / "teachers", "new")
    assert found is not None and found.spec.texts == 96


def test_a_newcomer_that_saw_other_rows_has_no_folds(
    recipe: Recipe, tmp_path: Path, shallow_models: Mapping[str, Path]
) -> None:
    rows = Path(recipe.data.train).read_text().splitlines()
    (tmp_path / "fewer.tsv").write_text("\n".join(rows[:60]) + "\n")
    new = {"name": "new", "model": str(shallow_models["distilbert"])}
    short = changed(recipe, cofinetune={"epochs": 1})
    larger = with_teachers(short, *(teacher.model_dump() for teacher in recipe.teachers), new)
    with files.use_disk(UnsyncedDisk()):
        run(short, tmp_path)
        fewer = changed(larger, data={"train": str(tmp_path / "fewer.tsv")})
        add_teacher(fewer, "new", tmp_path / "teachers", tmp_path / "work", progress=SilentProgress())
        with pytest.raises(MismatchError, match="'new' was added with other train rows"):
            run(changed(larger, cofinetune={"folds": 2}), tmp_path)
        others = run(changed(short, cofinetune={"folds": 2}), tmp_path)
    assert [*others.folds["teachers"]] == ["bert", "roberta"]


def test_folds_are_made_with_what_their_teachers_were_made_with(
    recipe: Recipe, tmp_path: Path, shallow_models: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would be trained otherwise is refused before the first fold, and the cure of the message works."""
    bert, new = recipe.teachers[0].model_dump(), {"name": "new", "model": str(shallow_models["distilbert"])}
    one = with_teachers(changed(recipe, cofinetune={"epochs": 1}), bert)
    two, longer = with_teachers(one, bert, new), {"epochs": 2}
    other = with_teachers(one, bert, new | {"model": str(shallow_models["bert"])})
    folds = {"folds": 2}

    def add(recipe: Recipe) -> CofinetuneResult:
        return add_teacher(recipe, "new", tmp_path / "teachers", tmp_path / "work", progress=SilentProgress())

    with files.use_disk(UnsyncedDisk()):
        run(one, tmp_path)
        seen = _trained_on(monkeypatch)
        with pytest.raises(MismatchError, match=r"'bert' would be made .* differs: cofinetune\.epochs$") as caught:
            add(changed(two, cofinetune=folds | longer))
        assert "kdcache cofinetune RECIPE --folds 2" in caught.value.hint and not seen
        add(changed(two, cofinetune=longer))
        with pytest.raises(MismatchError, match=r"'new' would be made .* differs: cofinetune\.epochs$") as caught:
            run(changed(two, cofinetune=folds), tmp_path)
        assert "--add new --folds 2" in caught.value.hint
        with pytest.raises(MismatchError, match=r"differs: .*teachers\.new\.weights$"):
            run(changed(other, cofinetune=folds), tmp_path)
        assert [name for name, _ in seen] == ["add-new"]
        assert [*run(changed(one, cofinetune=folds), tmp_path).folds["teachers"]] == ["bert"]
        assert [*add(changed(two, cofinetune=folds | longer)).folds["teachers"]] == ["bert", "new"]
    lines = [json.loads(line) for line in (tmp_path / "work" / "metrics.jsonl").read_text().splitlines()]
    epochs = Counter(line["stage"] for line in lines if line["event"] == "epoch")
    assert (epochs["cofinetune, fold 1 of 2"], epochs["add new, fold 1 of 2"]) == (1, 2)


def test_a_newcomer_that_can_have_no_folds_is_not_trained(
    folded: Recipe, copied: Path, tmp_path: Path, shallow_models: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Path(folded.data.train).read_text().splitlines()
    (tmp_path / "fewer.tsv").write_text("\n".join(rows[:60]) + "\n")
    new = {"name": "new", "model": str(shallow_models["distilbert"])}
    larger = with_teachers(folded, *(teacher.model_dump() for teacher in folded.teachers), new)
    fewer = changed(larger, data={"train": str(tmp_path / "fewer.tsv")}, cofinetune={"folds": None})
    seen = _trained_on(monkeypatch)
    for wrong, message in (
        (fewer, "other train rows than the teachers in"),
        (changed(larger, cofinetune={"folds": 3}), "have 2 folds; the recipe asks for 3"),
    ):
        with pytest.raises(MismatchError, match=message):
            add_teacher(wrong, "new", copied / "teachers", copied / "work", progress=SilentProgress())
    with pytest.raises(DataError, match="100 folds need as many"):
        hundred = changed(larger, cofinetune={"folds": 100})
        add_teacher(hundred, "new", copied / "teachers", copied / "work", progress=SilentProgress())
    assert not seen and "new" not in read_bundle(copied / "teachers").teachers


def test_ready_classifiers_have_no_folds(recipe: Recipe, tmp_path: Path, shallow_models: Mapping[str, Path]) -> None:
    model = str(make_model(tmp_path / "ready", "bert", depth=1, classes=2))
    ready = {"name": "ready", "model": model, "head": "own"}
    folded = changed(recipe, cofinetune={"folds": 2, "epochs": 1})
    with pytest.raises(RecipeError, match="every teacher has a head of its own"):
        run(with_teachers(folded, ready), tmp_path / "own")
    with files.use_disk(UnsyncedDisk()):
        both = with_teachers(folded, {"name": "trained", "model": str(shallow_models["bert"])}, ready)
        result = run(both, tmp_path, notes := Notes())
    assert any("2 folds: 1 times the steps" in line for line in notes.lines)
    assert [*result.folds["teachers"]] == ["trained"]
    assert read_folds(tmp_path / "teachers", "ready") is None
    assert choose_folds(tmp_path / "teachers", "ready", 32, asked=True) is None
    assert [*read_bundle(fold_directory(tmp_path / "teachers", 0)).teachers] == ["trained"]
    assert logits_of(tmp_path / "teachers", "trained").shape == (1, 2)


def test_answers_that_are_no_numbers_are_refused(
    folded: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        registration, "present_logits", lambda *arguments: np.full((len(arguments[3]), 2), np.nan, np.float32)
    )
    with files.use_disk(UnsyncedDisk()), pytest.raises(NonFiniteError, match=r"'bert' in .*_folds/1"):
        run(changed(folded, data={"validation": None}), tmp_path)


def test_a_dump_that_asks_for_folds_does_not_go_without(recipe: Recipe, tmp_path: Path) -> None:
    with files.use_disk(UnsyncedDisk()):
        run(changed(recipe, cofinetune={"epochs": 1}), tmp_path)
    assert choose_folds(tmp_path / "teachers", "bert", 32, asked=None) is None
    with pytest.raises(MismatchError, match="has no folds") as caught:
        choose_folds(tmp_path / "teachers", "bert", 32, asked=True)
    assert "--folds" in caught.value.hint
