"""Augmentation: where texts come from, what they never equal, the rules against plain loops, the same bytes again."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from kdcache.cache.ids import Examples, id_array, text_id
from kdcache.data.augment import Augmented, AugmentSettings, Text, augment, key, parents_of
from kdcache.data.counts import DataCounts
from kdcache.data.encoding import encode
from kdcache.data.masked_lm import MaskedLanguageModel
from kdcache.data.task import TaskData, load_task
from kdcache.errors import DataError
from kdcache.progress import SilentProgress
from kdcache.recipe import load_recipe
from kdcache.testing.tiny import make_model, wordpiece_tokenizer
from tests.cli.commands import kdcache

WORD = st.sampled_from(["good", "Good", "bad", "film", "the", "a", "plot"])
LINE = st.lists(WORD, min_size=1, max_size=6).map(" ".join)


def task_of(**splits: list[Text]) -> TaskData:
    """A task with these texts per split."""
    texts = {text_id(text): text for split in splits.values() for text in split}
    examples = {
        name: Examples(id_array([text_id(text) for text in split]), np.zeros(len(split), dtype=np.int64), None)
        for name, split in splits.items()
    }
    columns = tuple(f"column{number}" for number in range(len(next(iter(texts.values())))))
    return TaskData(texts, examples, ("0", "1"), columns, DataCounts({}, {}, {}, {}, {}, {}, {}))


def run(task: TaskData, rows: int = 40, **changes: Any) -> Augmented:
    return augment(task, AugmentSettings(rows, **changes), None, SilentProgress())


def lines(*texts: str) -> list[Text]:
    return [(text,) for text in texts]


@given(
    st.lists(LINE, min_size=1, max_size=8), st.lists(LINE, max_size=8), st.lists(LINE, max_size=8), st.integers(0, 9)
)
def test_nothing_is_made_from_or_equal_to_a_text_of_validation_or_test(
    train: list[str], validation: list[str], test: list[str], seed: int
) -> None:
    task = task_of(train=lines(*train), validation=lines(*validation), test=lines(*test))
    evaluation = {key((text,)) for text in (*validation, *test)}
    settings = AugmentSettings(30, seed=seed, mask=0.4)
    if all(key((text,)) in evaluation for text in train):
        with pytest.raises(DataError, match="may be used: all are in validation or test"):
            parents_of(task, settings)
        return
    made = augment(task, settings, None, SilentProgress())
    known = evaluation | {key((text,)) for text in train}
    found = [key(row.text) for row in made.rows]
    assert not known & set(found)
    assert len(set(found)) == len(found)
    for row in made.rows:
        parents = [task.texts[parent] for parent in row.parents]
        assert not evaluation & {key(parent) for parent in parents}
        assert follows(row.rule, row.text[0].split(), [parent[0].split() for parent in parents])
    assert made.attempts == len(made.rows) + made.rejected.total()


def follows(rule: str, words: list[str], parents: list[list[str]]) -> bool:
    """Whether ``words`` can come from ``parents`` by ``rule``: a plain loop over every place of an n-gram."""
    if rule == "join":
        return words == parents[0] + parents[1]
    (parent,) = parents
    places = range(len(parent) - len(words) + 1) if "ngram" in rule else [0]
    if ("ngram" in rule) != (len(words) < len(parent)) or not words:
        return False
    pieces = [parent[place : place + len(words)] for place in places]
    fits = [all(new in (old, "[MASK]") for new, old in zip(words, piece, strict=True)) for piece in pieces]
    return any(fits) and (words.count("[MASK]") <= len(words) - 1)


MANY = [" ".join(f"w{number}x{place}" for place in range(8)) for number in range(200)]


def test_the_shares_of_the_rules_are_those_that_are_set() -> None:
    made = run(task_of(train=lines(*MANY)), rows=2000)
    rules = [row.rule for row in made.rows]
    joined = rules.count("join")
    assert joined / made.attempts == pytest.approx(0.1, abs=0.02)
    others = made.attempts - joined
    assert sum("ngram" in rule for rule in rules) / others == pytest.approx(0.25, abs=0.04)
    whole = [row for row in made.rows if row.rule == "mask"]
    masked = sum(row.text[0].split().count("[MASK]") for row in whole)
    at_least_one = 1 - 0.9**8
    assert masked / (8 * len(whole)) == pytest.approx(0.1 / at_least_one, abs=0.02)
    assert {len(row.text[0].split()) for row in made.rows if "ngram" in row.rule} == {1, 2, 3, 4, 5}


def test_more_rows_are_the_same_rows_and_then_more() -> None:
    task = task_of(train=lines(*MANY))
    few, many = run(task, rows=50), run(task, rows=400)
    assert many.rows[:50] == few.rows
    assert run(task, rows=50).rows == few.rows
    assert run(task, rows=50, seed=1).rows != few.rows
    shuffled = random.Random(1).sample(MANY, len(MANY))
    assert run(task_of(train=lines(*shuffled)), rows=50).rows == few.rows


def test_a_task_that_is_used_up_ends() -> None:
    made = run(task_of(train=lines("good film")), rows=1000, join=0.0)
    assert 0 < len(made.rows) < 10
    assert run(task_of(train=lines("good")), rows=5, join=0.0).rows == []


def test_pairs_are_changed_in_one_column_or_both_and_never_joined() -> None:
    pairs = [(first, second) for first, second in zip(MANY[:100], MANY[100:], strict=True)]
    made = run(task_of(train=pairs), rows=600, mask=0.5)
    changed = []
    for row in made.rows:
        (parent,) = row.parents
        original = next(pair for pair in pairs if text_id(pair) == parent)
        changed.append(tuple(new != old for new, old in zip(row.text, original, strict=True)))
    assert set(changed) == {(True, False), (False, True), (True, True)}
    assert changed.count((True, True)) / len(changed) == pytest.approx(1 / 3, abs=0.07)
    assert not any(row.rule == "join" for row in made.rows)


def test_a_mask_in_a_text_is_a_token_of_the_text() -> None:
    tokenizer = wordpiece_tokenizer()
    encoded = encode(tokenizer, [("good [MASK] film",)], 16)
    place = encoded.input_ids.tolist().index(tokenizer.mask_token_id)
    assert (encoded.segments[place], encoded.starts[place], encoded.ends[place]) == (0, 5, 11)


@pytest.fixture(scope="module")
def masked_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM

    place = make_model(tmp_path_factory.mktemp("mlm") / "bert", "bert", depth=1)
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(place)).save_pretrained(place)
    return place


def test_words_come_from_the_models_best_ones(masked_model: Path) -> None:
    """Against a plain loop, one text at a time and without padding."""
    import torch
    from transformers import AutoModelForMaskedLM

    model = MaskedLanguageModel(str(masked_model), share=0.5, candidates=3)
    network = AutoModelForMaskedLM.from_pretrained(masked_model).eval()
    vocabulary = model.tokenizer.get_vocab()
    whole = {number for token, number in vocabulary.items() if token.isalpha() and len(token) > 1}
    word_of = {number: token for token, number in vocabulary.items()}
    texts = ["the film is good and the plot is bad", "music feels xyzzy", "the [MASK] is good", "good"] * 15
    made = model([(text.split(), random.Random(number)) for number, text in enumerate(texts)])
    changed = 0
    for number, (text, found) in enumerate(zip(texts, made, strict=True)):
        generator, words = random.Random(number), text.split()
        drawn = [generator.random() < 0.5 for _ in words]
        places = [place for place, word in enumerate(words) if drawn[place] and word in vocabulary]
        if not places or "[MASK]" in words:
            assert found is None
            continue
        masked = " ".join("[MASK]" if place in places else word for place, word in enumerate(words))
        ids = model.tokenizer(masked, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = network(ids).logits[0]
        expected = list(words)
        for place, at in zip(places, (ids[0] == model.tokenizer.mask_token_id).nonzero().flatten(), strict=True):
            best = sorted(whole, key=lambda token, at=at: -float(logits[at, token]))[:3]
            expected[place] = word_of[best[generator.randrange(3)]]
        assert (found or words) == expected
        changed += expected != words
    assert changed > 20


def test_the_command_writes_a_transfer_file_that_the_data_take(
    review_recipe: Path, masked_model: Path, tmp_path: Path
) -> None:
    files = []
    for name in ("one.parquet", "two.parquet", "three.jsonl"):
        said = kdcache(
            "augment", review_recipe, "--rows", 80, "--seed", 3, "--output", tmp_path / name, "--json",
            "--mlm", masked_model,
        )  # fmt: skip
        assert said.code == 0, said.err
        files.append((tmp_path / name).read_bytes())
        report = said.document
        assert report["rows"] == 80
        assert report["attempts"] == 80 + sum(report["rejected"].values())
        assert report["kept"] == pytest.approx(80 / report["attempts"])
        assert report["texts_per_second"] > 0
    assert files[0] == files[1]
    table = parquet.read_table(tmp_path / "one.parquet")
    rows = table.to_pylist()
    assert rows == [json.loads(line) for line in files[2].decode().splitlines()]
    assert table.column_names == ["sentence", "parent", "rule", "seed"]
    assert {row["rule"] for row in rows} >= {"mask", "mlm"}
    described = json.loads(table.schema.metadata[b"kdcache.augment"])
    assert described == json.loads((tmp_path / "three.jsonl.meta.json").read_text())
    assert (described["rows"], described["seed"], described["mask_token"]) == (80, 3, "[MASK]")
    before = load_task(load_recipe(review_recipe, ["data.transfer=[]"]).data)
    assert {bytes.fromhex(part) for row in rows for part in row["parent"].split("+")} <= set(before.texts)
    after = load_task(load_recipe(review_recipe, [f'data.transfer=["{tmp_path / "one.parquet"}"]']).data)
    assert len(after.splits["transfer"].labels) == 80


def test_another_file_is_not_replaced_unless_asked(review_recipe: Path, tmp_path: Path) -> None:
    target = tmp_path / "made.jsonl"
    assert kdcache("augment", review_recipe, "--rows", 10, "--output", target).code == 0
    assert kdcache("augment", review_recipe, "--rows", 10, "--output", target).code == 0
    said = kdcache("augment", review_recipe, "--rows", 11, "--output", target)
    assert said.code == 4
    assert "exists and has other contents" in said.err
    assert len(target.read_text().splitlines()) == 10
    assert kdcache("augment", review_recipe, "--rows", 11, "--output", target, "--replace").code == 0
    assert len(target.read_text().splitlines()) == 11


def test_the_same_bytes_also_when_the_recipe_names_the_file(review_recipe: Path, tmp_path: Path) -> None:
    target = tmp_path / "made.parquet"
    flags = ("--rows", 30, "--output", target, "--from", "train", "--from", "transfer")
    assert kdcache("augment", review_recipe, *flags).code == 0
    more = json.dumps([*load_recipe(review_recipe).data.transfer, str(target)])
    said = kdcache("augment", review_recipe, *flags, "--set", f"data.transfer={more}")
    assert said.code == 0, said.err


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--rows", 5, "--output", "a.tsv"), 2, "a .parquet or .jsonl file was expected"),
        (("--rows", 5, "--from", "test"), 2, "--from is 'test'; train or transfer was expected"),
        (("--rows", 5, "--set", "student.init_from=no/such", "--set", "student.layers=1"), 2, "no tokenizer"),
        (("--rows", 5, "--mlm", "no/such"), 2, "no tokenizer could be loaded"),
        (("--rows", 0), 2, ""),
    ],
)
def test_what_is_refused(review_recipe: Path, tmp_path: Path, flags: tuple[Any, ...], code: int, message: str) -> None:
    said = kdcache("augment", review_recipe, "--output-dir", tmp_path, *flags)
    assert said.code == code
    assert message in said.err
    assert not list(tmp_path.iterdir())
