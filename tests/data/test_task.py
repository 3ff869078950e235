"""Tasks: texts by id, labels by name, splits that do not depend on the order of rows, and counts of what is odd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from kdcache.cache.ids import id_list, text_id
from kdcache.data.task import TaskData, load_task, read_examples
from kdcache.data.texts import seeded_keys
from kdcache.errors import DataError
from kdcache.recipe import DataSection

if TYPE_CHECKING:
    from tests.conftest import ReviewTask

Row = tuple[str, str]


def tsv(directory: Path, name: str, rows: list[Row], header: str = "text\tlabel") -> str:
    path = directory / name
    path.write_text("\n".join([header, *("\t".join(row) for row in rows)]) + "\n", encoding="utf-8")
    return str(path)


def jsonl(directory: Path, name: str, rows: list[dict[str, Any]]) -> str:
    path = directory / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def section(train: str, **keys: Any) -> DataSection:
    return DataSection.model_validate({"train": train, "text": ["text"], "label": "label"} | keys)


def texts_of(data: TaskData, split: str) -> list[str]:
    return [data.texts[identity][0] for identity in id_list(data.splits[split].text_ids)]


def test_the_review_task_is_read_whole(review_task: ReviewTask) -> None:
    data = load_task(
        DataSection(
            train=str(review_task.train), validation=str(review_task.validation), test=str(review_task.test),
            transfer=[str(review_task.transfer)], text=["sentence"], label="label",
        )
    )  # fmt: skip
    assert {split: len(examples) for split, examples in data.splits.items()} == data.counts.rows
    assert data.counts.rows == {"train": 96, "validation": 32, "test": 32, "transfer": 24}
    assert data.label_names == ("0", "1")
    assert len(data.texts) == 184
    assert all(identity == text_id(text) for identity, text in data.texts.items())
    first_line = review_task.train.read_text().splitlines()[1]
    assert first_line == f"{texts_of(data, 'train')[0]}\t{data.splits['train'].labels[0]}"
    assert data.splits["transfer"].labels.tolist() == [-1] * 24


def test_pairs_and_groups(tmp_path: Path) -> None:
    train = tsv(tmp_path, "t.tsv", [("a", "b", "yes", "g1"), ("ab", "c", "no", "")], "one\ttwo\tlabel\tuser")  # type: ignore[list-item]
    data = load_task(DataSection(train=train, text=["one", "two"], label="label", group="user"))
    assert data.text_columns == ("one", "two")
    assert list(data.texts.values()) == [("a", "b"), ("ab", "c")]
    assert data.splits["train"].groups == ("g1", "")
    assert data.label_names == ("no", "yes")
    assert data.splits["train"].labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("labels", "given_names", "names", "numbers"),
    [
        ([10, 9, 2], None, ("2", "9", "10"), [2, 1, 0]),
        (["10", "9", "-2"], None, ("-2", "9", "10"), [2, 1, 0]),
        (["b", "a", "10"], None, ("10", "a", "b"), [2, 1, 0]),
        ([True, False], None, ("false", "true"), [1, 0]),
        ([1.0, 0.0], None, ("0", "1"), [1, 0]),
        (["neg", "pos"], ["pos", "neg"], ("pos", "neg"), [1, 0]),
        ([0, 1], ["neg", "pos"], ("neg", "pos"), [0, 1]),  # class numbers go with names given in the recipe
        ([1, 0], ["1", "0"], ("1", "0"), [0, 1]),  # but not where a name is a number itself
        ([0, 1], ["neg", "mid", "pos"], ("neg", "mid", "pos"), [0, 1]),
        (["a", "", "b", None], None, ("a", "b"), [0, -1, 1, -1]),
        (["a", float("nan"), "b"], None, ("a", "b"), [0, -1, 1]),
    ],
)
def test_label_names_and_numbers(
    tmp_path: Path, labels: list[Any], given_names: list[str] | None, names: Any, numbers: Any
) -> None:
    train = jsonl(tmp_path, "t.jsonl", [{"text": f"text {row}", "label": label} for row, label in enumerate(labels)])
    data = load_task(section(train, labels=given_names))
    assert data.label_names == names
    assert data.splits["train"].labels.tolist() == numbers


def test_oddities_are_counted_and_told(tmp_path: Path) -> None:
    train = tsv(tmp_path, "train.tsv", [("a", "0"), ("a", "1"), ("a", "0"), ("b", "1"), ("c", "0"), ("u", "")])
    validation = tsv(tmp_path, "dev.tsv", [("c", "1"), ("d", "0"), ("d", "0")])
    test = tsv(tmp_path, "test.tsv", [("b", "1"), ("e", "0"), ("d", "1")])
    transfer = [
        tsv(tmp_path, "x.tsv", [("a",), ("d",), ("d",), ("e",), ("new",), ("c",)], "text"),  # type: ignore[list-item]
        tsv(tmp_path, "y.tsv", [("new", "ignored"), ("other", "unseen")]),
    ]
    counts = load_task(section(train, validation=validation, test=test, transfer=transfer)).counts
    assert counts.as_dict() == {
        "rows": {"train": 6, "validation": 3, "test": 3, "transfer": 2},
        "unlabelled": {"train": 1},
        "labels": {"train": {"0": 3, "1": 2}, "validation": {"0": 2, "1": 1}, "test": {"0": 1, "1": 2}},
        "duplicates": {"train": 2, "validation": 1},
        "conflicts": {"train": 1},
        "shared": {"train and validation": 1, "train and test": 1, "validation and test": 1},
        "transfer_dropped": {"found in validation or test": 4, "already in train": 1, "duplicates": 1},
        "empty": {},
        "warnings": [],
    }
    assert counts.lines() == [
        "train: 6 rows (0: 3, 1: 2)",
        "validation: 3 rows (0: 2, 1: 1)",
        "test: 3 rows (0: 1, 1: 2)",
        "transfer: 2 rows",
        "train: 1 rows have no label",
        "train: 2 rows repeat a text",
        "validation: 1 rows repeat a text",
        "train: 1 texts have conflicting labels",
        "train and validation share 1 texts",
        "train and test share 1 texts",
        "validation and test share 1 texts",
        "transfer: 4 rows dropped, found in validation or test",
        "transfer: 1 rows dropped, already in train",
        "transfer: 1 rows dropped, duplicates",
    ]


def test_transfer_texts_that_are_all_dropped_leave_no_split(tmp_path: Path) -> None:
    train = tsv(tmp_path, "train.tsv", [("a", "0"), ("b", "1")])
    data = load_task(section(train, transfer=[train]))
    assert set(data.splits) == {"train"}
    assert data.counts.transfer_dropped == {"already in train": 2}


rows_with_labels = st.lists(
    st.tuples(st.sampled_from([f"text {n}" for n in range(30)]), st.sampled_from(["0", "1", ""])), min_size=8
)


@given(rows_with_labels, st.randoms(use_true_random=False), st.integers(0, 3))
def test_what_goes_to_validation_does_not_depend_on_the_order_of_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row], random: Any, seed: int
) -> None:
    directory = tmp_path_factory.mktemp("split")
    rows = [*rows, ("first", "0"), ("second", "1")]
    shuffled = random.sample(rows, len(rows))
    sides = []
    for order in (rows, shuffled):
        try:
            data = load_task(section(tsv(directory, "t.tsv", order), validation_fraction=0.4, seed=seed))
        except DataError as error:
            sides.append(error.message)
            continue
        train, validation = texts_of(data, "train"), texts_of(data, "validation")
        assert not set(train) & set(validation)  # all rows of a text go to one side
        assert len(train) + len(validation) == len(rows)
        assert (data.splits["validation"].labels >= 0).all()
        sides.append((sorted(train), sorted(validation)))
    assert sides[0] == sides[1]


@given(
    st.sets(st.text(st.characters(blacklist_categories=("Cs", "Cc", "Z")), min_size=1), min_size=2), st.integers(1, 10)
)
def test_transfer_rows_are_chosen_by_text_alone_and_more_rows_add_to_fewer(
    tmp_path_factory: pytest.TempPathFactory, texts: set[str], count: int
) -> None:
    directory = tmp_path_factory.mktemp("transfer")
    train = tsv(directory, "train.tsv", [("a b", "0"), ("b c", "1")])

    def chosen(order: list[str], rows: int) -> list[str]:
        source = tsv(directory, "more.tsv", [(text,) for text in order], "text")  # type: ignore[misc]
        return texts_of(load_task(section(train, transfer=[source], transfer_rows=rows)), "transfer")

    some = chosen(sorted(texts), count)
    assert len(some) == min(count, len(texts))
    assert chosen(sorted(texts, reverse=True), count) == some
    assert chosen(sorted(texts), count + 3)[: len(some)] == some


def test_split_sizes_follow_the_fraction_and_change_with_the_seed(tmp_path: Path) -> None:
    train = tsv(tmp_path, "t.tsv", [(f"text {row}", str(row % 2)) for row in range(2000)])
    sides = [
        set(texts_of(load_task(section(train, validation_fraction=0.1, seed=seed)), "validation")) for seed in (0, 1)
    ]
    assert all(abs(len(side) - 200) < 50 for side in sides)
    assert len(sides[0] & sides[1]) < 50


def test_seeded_keys_never_change() -> None:
    """Splits of published runs depend on these numbers."""
    assert seeded_keys([bytes(16), bytes(range(16))], 7, "validation") == [16213396958731055227, 10259994073864816143]


BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"text": 7, "label": "0"}, "line 3, column 'text': 7 is no text but int"),
    ({"text": "a\0b", "label": "0"}, "line 3, column 'text': the text holds a NUL character"),
    ({"text": "half \ud83d", "label": "0"}, "line 3: text 'half \\ud83d' is not valid Unicode"),
    ({"text": "c", "label": 0.5}, "line 3, column 'label': 0.5 is no class; a string or an integer was expected"),
    ({"text": "c", "label": ["x"]}, "line 3, column 'label': ['x'] is no class"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_bad_row_is_told_with_its_line(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    train = jsonl(tmp_path, "t.jsonl", [{"text": "a", "label": "0"}, {"text": "b", "label": "1"}, row])
    with pytest.raises(DataError) as caught:
        load_task(section(train))
    assert caught.value.message.startswith(f"{train}, {message}")
    assert caught.value.hint


BAD_SECTIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"text": ["sentence"]}, "has no column 'sentence'; it has: 'text', 'label'", "Set data.text"),
    ({"label": "category"}, "has no column 'category'; it has: 'text', 'label'", "Set data.label"),
    ({"group": "user"}, "has no column 'user'; it has: 'text', 'label'", "Set data.group"),
    (
        {"labels": ["x", "y"]},
        "line 2 has the label 'neg', which data.labels does not have; known: 'x', 'y'",
        "Correct the row",
    ),
    (
        {"validation": "unseen.tsv"},
        "unseen.tsv, line 3 has the label 'odd', which training does not have; known: 'neg', 'pos'",
        "",
    ),
    ({"test": "unseen.tsv"}, "unseen.tsv, line 3 has the label 'odd', which training does not have", "data.labels"),
    (
        {"test": "unlabelled.tsv"},
        "unlabelled.tsv, line 2 has no label; rows of validation and test are scored",
        "data.transfer",
    ),
    ({"test": "bare.tsv"}, "bare.tsv has no column 'label'; it has: 'text'", "Set data.label"),
    ({"transfer": ["missing.tsv"]}, "there is no data file", "relative to the recipe"),
    ({"train": "unlabelled.tsv"}, "unlabelled.tsv has no label in its column 'label'", "data.transfer"),
    ({"train": "one.tsv"}, "one.tsv has only the label 'neg'; a classifier needs two or more", "data.label"),
    ({"validation_fraction": 1e-9}, "splits the 3 rows of", "data.validation_fraction"),
    ({"validation_fraction": 1 - 1e-9}, "into 0 for training and 3 for validation; both need some", "data.seed"),
]


@pytest.mark.parametrize(("keys", "message", "hint"), BAD_SECTIONS)
def test_data_that_does_not_fit_the_recipe_is_told(
    tmp_path: Path, keys: dict[str, Any], message: str, hint: str
) -> None:
    train = tsv(tmp_path, "train.tsv", [("a", "neg"), ("b", "pos"), ("c", "pos")])
    tsv(tmp_path, "unseen.tsv", [("d", "neg"), ("e", "odd")])
    tsv(tmp_path, "unlabelled.tsv", [("d", ""), ("e", "")])
    tsv(tmp_path, "one.tsv", [("d", "neg"), ("e", "neg")])
    tsv(tmp_path, "bare.tsv", [("d",)], "text")  # type: ignore[list-item]

    def placed(value: Any) -> Any:
        return str(tmp_path / value) if isinstance(value, str) and value.endswith(".tsv") else value

    keys = {
        key: [placed(one) for one in value] if isinstance(value, list) else placed(value) for key, value in keys.items()
    }
    with pytest.raises(DataError) as caught:
        load_task(section(train).model_copy(update=keys))
    assert message in caught.value.message
    assert hint in caught.value.hint


NAMED, NUMBERED = ["entailment", "neutral", "contradiction"], ["0", "1", "2"]


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize(("in_train", "in_split"), [(NAMED, NUMBERED), (NUMBERED, NAMED)])
def test_numbers_in_one_file_and_names_in_another_need_a_declared_order(
    tmp_path: Path, split: str, in_train: list[str], in_split: list[str]
) -> None:
    train = tsv(tmp_path, "train.tsv", [(f"text {row}", label) for row, label in enumerate(in_train * 2)])
    other = tsv(tmp_path, "other.tsv", [(f"other {row}", label) for row, label in enumerate(in_split)])
    with pytest.raises(DataError) as caught:
        load_task(section(train, **{split: other}))
    assert f"{other}, line 2, column 'label': the label is '{in_split[0]}'" in caught.value.message
    assert "'neutral'" in caught.value.message or "'1'" in caught.value.message
    assert "data.labels" in caught.value.hint
    data = load_task(section(train, **{split: other}, labels=NAMED))
    assert data.splits["train"].labels.tolist() == [0, 1, 2] * 2
    assert data.splits[split].labels.tolist() == [0, 1, 2]


def test_names_and_their_numbers_in_one_column_are_not_twice_as_many_classes(tmp_path: Path) -> None:
    rows = [(f"text {row}", label) for row, label in enumerate([*NAMED, *NUMBERED])]
    train = tsv(tmp_path, "train.tsv", rows)
    with pytest.raises(
        DataError, match=r"line 5, column 'label': the label is '0', and the same column has 'contradiction'"
    ):
        load_task(section(train))
    assert load_task(section(train, labels=NAMED)).splits["train"].labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_false_and_true_are_0_and_1_everywhere(tmp_path: Path) -> None:
    train = jsonl(tmp_path, "t.jsonl", [{"text": "a", "label": True}, {"text": "b", "label": False}])
    data = load_task(section(train, test=tsv(tmp_path, "test.tsv", [("c", "0"), ("d", "1")])))
    assert data.splits["test"].labels.tolist() == [0, 1]


SCORES = [("a", "3.8"), ("b", "5.0"), ("c", "0.25"), ("d", "3"), ("e", "3.8")]


@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl", "parquet"])
def test_scores_are_refused_whatever_the_file(tmp_path: Path, ending: str) -> None:
    train = str(tmp_path / f"t.{ending}")
    if ending == "jsonl":
        jsonl(tmp_path, "t.jsonl", [{"text": text, "label": float(label)} for text, label in SCORES])
    elif ending == "parquet":
        parquet.write_table(pa.table({"text": [a for a, _ in SCORES], "label": [float(b) for _, b in SCORES]}), train)
    else:
        between = "\t" if ending == "tsv" else ","
        Path(train).write_text("".join(between.join(row) + "\n" for row in [("text", "label"), *SCORES]))
    with pytest.raises(DataError, match=r"column 'label': 3\.8 is no class; .*regression") as caught:
        load_task(section(train))
    assert "data.labels" in caught.value.hint
    names = ["0.25", "3", "3.8", "5" if ending in ("jsonl", "parquet") else "5.0"]
    assert load_task(section(train, labels=names)).splits["train"].labels.tolist() == [2, 3, 0, 1, 2]


@pytest.mark.parametrize("number", ["-0.5", ".5", "5e-1", "+3.25", "1.5e0"])
def test_every_spelling_of_a_fraction_is_no_class(tmp_path: Path, number: str) -> None:
    with pytest.raises(DataError, match="is no class"):
        load_task(section(tsv(tmp_path, "t.tsv", [("a", "1"), ("b", number)])))


@pytest.mark.parametrize(
    "labels",
    [
        ["0.0", "1.0"],
        ["1e3", "2e3"],
        ["v1.2", "v1.3"],
        ["1.2.3", "1.2.4"],
        ["1 star", "1.5 stars"],
        ["9" * 400, "1"],
        ["nan", "inf"],
    ],
)
def test_what_only_looks_like_a_fraction_stays_a_class(tmp_path: Path, labels: list[str]) -> None:
    assert set(load_task(section(tsv(tmp_path, "t.tsv", [("a", labels[0]), ("b", labels[1])]))).label_names) == set(
        labels
    )


@pytest.mark.parametrize("as_number", [True, False])
def test_minus_one_is_a_class_or_no_label_and_the_recipe_says_which(tmp_path: Path, as_number: bool) -> None:
    def file(name: str, labels: list[int]) -> str:
        if as_number:
            return jsonl(
                tmp_path, f"{name}.jsonl", [{"text": f"{name} {row}", "label": one} for row, one in enumerate(labels)]
            )
        return tsv(tmp_path, f"{name}.tsv", [(f"{name} {row}", str(one)) for row, one in enumerate(labels)])

    with pytest.raises(
        DataError, match="column 'label': the label -1 is a class, or stands for no label as in GLUE"
    ) as caught:
        load_task(section(file("train", [0, 1, -1, 1])))
    assert "empty" in caught.value.hint and "data.labels" in caught.value.hint
    assert load_task(section(file("train", [0, 1, -1]), labels=["-1", "0", "1"])).label_names == ("-1", "0", "1")
    assert load_task(section(file("train", [1, -1, 1]))).label_names == (
        "-1",
        "1",
    )  # without it there would be one class
    assert load_task(section(file("train", [-2, -1, 0]))).label_names == ("-2", "-1", "0")
    for keys in ({}, {"labels": ["neg", "pos"]}):
        with pytest.raises(
            DataError, match=r"line [12] has the label '-1', .*in GLUE it stands for a label that is withheld"
        ) as caught:
            load_task(section(file("train", [0, 1, 1]), test=file("test", [-1, -1]), **keys))
        assert "score on a split that has labels" in caught.value.hint


def test_white_space_makes_no_class(tmp_path: Path) -> None:
    rows = [("a", "sad"), ("b", " "), ("c", "glad"), ("d", "sad ")]
    with pytest.raises(DataError, match="line 4, column 'label': the label is 'sad ', and the same column has 'sad'"):
        load_task(section(jsonl(tmp_path, "t.jsonl", [{"text": text, "label": label} for text, label in rows])))
    data = load_task(section(tsv(tmp_path, "t.tsv", rows[:3])))
    assert (data.label_names, data.splits["train"].labels.tolist()) == (("glad", "sad"), [1, -1, 0])
    declared = load_task(section(tsv(tmp_path, "t.tsv", rows), labels=["sad", "glad", "sad ", " "]))
    assert declared.splits["train"].labels.tolist() == [0, 3, 1, 2]


def test_names_that_no_cache_can_hold_are_refused_with_the_data(tmp_path: Path) -> None:
    """Before a teacher is trained on them."""
    lines = [{"text": "a", "label": "sad\x07"}, {"text": "b", "label": "glad"}]
    with pytest.raises(DataError, match=r"label 'sad\\x07' is empty or holds a control character"):
        load_task(section(jsonl(tmp_path, "t.jsonl", lines)))


@pytest.mark.parametrize("separator", ["|", ";", ",", ", "])
def test_several_labels_in_a_cell_are_refused_where_each_is_a_class_of_its_own(tmp_path: Path, separator: str) -> None:
    rows = [("a", "sad"), ("b", "glad"), ("c", separator.join(["sad", "glad"]))]
    with pytest.raises(DataError, match=r"line 4, column 'label': .* is several labels, 'sad', 'glad', .*multi-label"):
        load_task(section(tsv(tmp_path, "t.tsv", rows)))
    declared = load_task(section(tsv(tmp_path, "t.tsv", rows), labels=["sad", "glad", rows[2][1]]))
    assert declared.splits["train"].labels.tolist() == [0, 1, 2]
    test = tsv(tmp_path, "test.tsv", [("d", rows[2][1])])
    with pytest.raises(DataError, match="is several labels"):
        load_task(section(tsv(tmp_path, "t.tsv", rows[:2]), test=test))


@pytest.mark.parametrize(
    ("labels", "warned"),
    [
        (["sport|ball", "sport|ice", "news|world"], True),  # a hierarchy, or two labels each
        (["a|b", "c|d", "e"], False),
        (["Arts, Crafts", "Food; Drink", "Home"], False),
        (["x||y", "|", "x|"], False),
    ],
)
def test_a_separator_alone_proves_nothing(tmp_path: Path, labels: list[str], warned: bool) -> None:
    data = load_task(section(tsv(tmp_path, "t.tsv", [(f"text {row}", label) for row, label in enumerate(labels)])))
    assert set(data.label_names) == set(labels)
    assert [("several labels in one" in note) for note in data.counts.notes()] == [True] * warned


def test_lists_are_refused_as_multi_label(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"], "label": [["x"], ["x", "y"]]})
    parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"row 1, column 'label': \['x'\] is no class but a list: multi-label"):
        load_task(section(str(tmp_path / "t.parquet")))


def test_many_classes_with_few_rows_are_warned_of(tmp_path: Path) -> None:
    few = tsv(tmp_path, "few.tsv", [(f"text {row}", f"{row % 26}") for row in range(40)])
    assert ["fewer than 8 rows" in note for note in load_task(section(few)).counts.notes()] == [True]
    many = tsv(tmp_path, "many.tsv", [(f"text {row}", f"{row % 26}") for row in range(26 * 20)])
    assert load_task(section(many)).counts.notes() == []


@pytest.mark.parametrize("empty", ["", " ", "\u00a0\u2003"])
def test_rows_without_text_are_left_out_and_counted_in_every_split(tmp_path: Path, empty: str) -> None:
    files = {
        name: [(f"{name} 1", "0"), (empty, "1"), (f"{name} 2", "1")] for name in ("train", "validation", "test", "more")
    }
    paths = {name: tsv(tmp_path, f"{name}.tsv", rows) for name, rows in files.items()}
    data = load_task(
        section(
            paths["train"], validation=paths["validation"], test=paths["test"], transfer=[paths["more"]], group="label"
        )
    )
    assert data.counts.rows == {"train": 2, "validation": 2, "test": 2, "transfer": 2}
    assert data.counts.empty == {"train": 1, "validation": 1, "test": 1}
    assert data.counts.transfer_dropped == {"without text": 1}
    assert "test: 1 rows have no text and are left out" in data.counts.notes()
    assert texts_of(data, "test") == ["test 1", "test 2"]
    assert data.splits["train"].groups == ("0", "1")
    assert data.splits["validation"].labels.tolist() == [0, 1]
    split = load_task(
        section(tsv(tmp_path, "t.tsv", [*files["train"] * 10, *files["test"] * 10]), validation_fraction=0.5)
    )
    assert sum(split.counts.empty.values()) == 20
    with pytest.raises(DataError, match="has no text in any row of 'text'"):
        load_task(section(paths["train"], test=tsv(tmp_path, "none.tsv", [(empty, "1")])))


def test_the_line_of_a_bad_label_is_that_of_the_file_where_rows_are_left_out(tmp_path: Path) -> None:
    train = tsv(tmp_path, "train.tsv", [("a", "0"), ("b", "1")])
    test = tsv(tmp_path, "test.tsv", [("", "0"), ("c", "1"), ("", "1"), ("d", "7")])
    with pytest.raises(DataError, match="line 5 has the label '7'"):
        load_task(section(train, test=test))
    assert read_examples(tsv(tmp_path, "e.tsv", [("", "0"), ("c", "1")]), ["text"], "label").empty == 1


def test_a_pair_with_one_empty_column_is_a_text(tmp_path: Path) -> None:
    rows = [
        {"one": "a", "two": "", "label": "0"},
        {"one": None, "two": "b", "label": "1"},
        {"one": "", "two": None, "label": "1"},
    ]
    train = jsonl(tmp_path, "t.jsonl", rows)
    data = load_task(DataSection(train=train, text=["one", "two"], label="label"))
    assert list(data.texts.values()) == [("a", ""), ("", "b")]
    assert data.counts.empty == {"train": 1}


def test_many_classes_are_not_all_listed(tmp_path: Path) -> None:
    train = tsv(tmp_path, "train.tsv", [(f"text {row}", f"{row}") for row in range(50)])
    test = tsv(tmp_path, "test.tsv", [("x", "50")])
    with pytest.raises(DataError, match=r"'18', '19' and 30 more$"):
        load_task(section(train, test=test))


def test_parquet_integers_and_nulls(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b", "c"], "label": pa.array([1, None, 0], pa.int8())})
    parquet.write_table(table, tmp_path / "t.parquet")
    data = load_task(section(str(tmp_path / "t.parquet")))
    assert data.splits["train"].labels.tolist() == [1, -1, 0]


def test_read_examples_keeps_rows_duplicates_and_order(tmp_path: Path) -> None:
    source = tsv(tmp_path, "t.tsv", [("b", "pos"), ("a", "neg"), ("b", "pos")])
    rows = read_examples(source, ["text"], "label", ["pos", "neg"])
    assert rows.texts == (("b",), ("a",), ("b",))
    assert rows.labels.tolist() == [0, 1, 0]
    assert rows.text_ids.dtype == np.uint8
    assert id_list(rows.text_ids) == [text_id(text) for text in rows.texts]
    assert read_examples(source, ["text"], "label").label_names == ("neg", "pos")
    assert read_examples(source, ["text"], None).labels.tolist() == [-1, -1, -1]
    with pytest.raises(DataError, match="line 2 has the label 'pos', which training does not have; known: 'yes', 'no'"):
        read_examples(source, ["text"], "label", ["yes", "no"])
