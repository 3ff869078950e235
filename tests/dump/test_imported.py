"""Answers from elsewhere as a teacher of a cache: joined by content, exact, checked row by row, used like others."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache import open_cache
from kdcache.cache.manifest import read_manifest
from kdcache.cache.reader import Cache
from kdcache.cache.verify import verify
from kdcache.data.answers import AnswerFormat, Kind, read_answers
from kdcache.dump.extend import Wanted, extend_cache
from kdcache.dump.imported import ImportedTeacher
from kdcache.errors import DataError, RecipeError
from kdcache.files import use_disk
from kdcache.progress import SilentProgress
from kdcache.testing.caches import TASK, dump, made_plan
from kdcache.testing.faults import Died, dying_disk
from tests.cli.commands import kdcache
from tests.conftest import TinyRun

Row = dict[str, Any]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    dump(tmp_path / "cache", made_plan())
    return tmp_path / "cache"


def sentences(cache: Cache) -> list[str]:
    return [text for part in cache.parts for (text,) in cache.texts(part.name)]


def write(path: Path, rows: Sequence[Row]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    return path


def by_text(cache: Cache, teacher: str) -> dict[str, np.ndarray]:
    return {
        text: logits
        for part in cache.parts
        for (text,), logits in zip(cache.texts(part.name), cache.outputs(teacher, part.name).logits, strict=True)
    }


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64))
    shares: np.ndarray = powers / powers.sum()
    return shares


def format_of(kind: Kind, *columns: str, **fields: Any) -> AnswerFormat:
    pairs = [column.rpartition("=") for column in columns]
    return AnswerFormat(kind, tuple((label or None, name) for label, _, name in pairs), **fields)


@pytest.mark.parametrize("to", ["parquet", "jsonl"])
def test_exported_and_imported_again_gives_the_same_logits_bit_by_bit(cache: Path, tmp_path: Path, to: str) -> None:
    """Into the same cache as another teacher. Both formats are the same teacher: the identity is the same."""
    assert kdcache("cache", "export", cache, "--to", to, "--output-dir", tmp_path / "out").code == 0
    column = ("--as", "logits", "--column", "logits_bert")
    said = kdcache("cache", "import", cache, "--teacher", f"again={tmp_path / 'out'}", *column, "--json")
    assert said.code == 0, said.err
    opened = open_cache(cache)
    for part in opened.parts:
        there, here = (opened.outputs(name, part.name).logits for name in ("bert", "again"))
        assert here.tobytes() == there.tobytes()
    assert verify(cache) == []
    assert said.document["teachers"]["again"]["texts"] == 15
    spec = opened.teachers["again"]
    assert (spec.backend, spec.precision, spec.layers, spec.pooled, spec.head) == (
        "imported",
        "logits",
        {},
        None,
        "own",
    )


def test_both_file_formats_give_the_same_cache(cache: Path, tmp_path: Path) -> None:
    identities = set()
    for to in ("parquet", "jsonl"):
        copy = Path(shutil.copytree(cache, tmp_path / to))
        kdcache("cache", "export", copy, "--to", to, "--output-dir", tmp_path / f"out-{to}")
        file = f"again={tmp_path / f'out-{to}'}"
        assert (
            kdcache("cache", "import", copy, "--teacher", file, "--as", "logits", "--column", "logits_bert").code == 0
        )
        identities.add(read_manifest(copy).identity)
    assert len(identities) == 1


def test_a_new_cache_from_answers_alone_is_distilled_and_weighed(tiny_run: TinyRun, tmp_path: Path) -> None:
    """No teacher of kdcache's own: export, import into a new cache, verify, weigh, distil."""
    kdcache("cache", "export", tiny_run.cache, "--output-dir", tmp_path / "out", "--teacher", "bert")
    place = tmp_path / "judged"
    column = ("--as", "logits", "--column", "logits_bert", "--recipe", tiny_run.recipe_file)
    said = kdcache("cache", "import", place, "--teacher", f"judge={tmp_path / 'out'}", *column, "--licence", "MIT")
    assert said.code == 0, said.err
    again = kdcache("cache", "import", place, "--teacher", f"judge={tmp_path / 'out'}", *column, "--licence", "MIT")
    assert again.code == 0 and "nothing was missing" in again.out
    assert again.out.splitlines()[-1] == said.out.splitlines()[-1]  # the identity
    new, old = open_cache(place), open_cache(tiny_run.cache)
    found, wanted = by_text(new, "judge"), by_text(old, "bert")
    assert found.keys() == wanted.keys()
    assert all(found[text].tobytes() == wanted[text].tobytes() for text in found)
    assert kdcache("cache", "verify", place).code == 0
    assert "| judge | out | imported | – | none: logits only |" in (place / "README.md").read_text()
    assert kdcache("cache", "info", place).code == 0
    assert kdcache("weigh", place, "--split", "train").code == 0
    arguments = ("distill", tiny_run.recipe_file, "--cache", place, "--output-dir", tmp_path / "runs")
    student = ("--set", "student.init_from=" + str(tiny_run.teachers / "bert"))
    refused = kdcache(*arguments, *student, "--set", "distill.method=mt-bert")
    assert refused.code == 4, refused.err
    assert "teacher 'judge'" in refused.err and "imported from a file" in refused.err


def test_an_imported_teacher_beside_others_takes_part_in_methods_of_logits(
    tiny_run: TinyRun, copied: Callable[[Path], Path], tmp_path: Path
) -> None:
    from kdcache.distill.stage import distill

    place = copied(tiny_run.cache)
    rows = [{"text": text, "verdict": "1" if "good" in text else "0"} for text in sentences(open_cache(place))]
    file = write(tmp_path / "judge.csv", rows)
    how = ("--as", "labels", "--column", "verdict", "--text", "text")
    said = kdcache("cache", "import", place, "--teacher", f"judge={file}", *how)
    assert said.code == 0, said.err
    model = tiny_run.recipe().teachers[0].model
    recipe = tiny_run.recipe("distill.method=kd", "distill.teachers=['judge','bert']", f"student.init_from={model}")
    result = distill(recipe, place, tmp_path / "run", live_teachers=None, progress=SilentProgress())
    assert set(result.results["teachers"]) == {"judge", "bert"}
    assert 0 < result.results["teachers"]["judge"]["scores"]["validation"]["accuracy"] <= 1
    record = read_manifest(place).provenance["teachers"]["judge"]
    assert record["source"] == "judge.csv" and float(record["scores"]["accuracy"]) > 0
    digest = record["import"]["files"]["judge.csv"]
    assert digest["bytes"] == file.stat().st_size and len(digest["sha256"]) == 64
    assert record["import"]["columns"] == ["verdict"] and record["dumped"] > "2020"


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_the_logits_are_those_whose_softmax_is_the_answer(cache: Path, tmp_path: Path, suffix: str) -> None:
    lines = sentences(open_cache(cache))
    shares = {line: np.array([(n + 1) / 20, 1 - (n + 1) / 20]) for n, line in enumerate(lines)}
    rows = [
        {
            "sentence": line,
            "p0": p[0],
            "p1": p[1],
            "both": json.dumps(p.tolist()),
            "named": json.dumps({"good": p[1], "bad": p[0]}),
            "z": float(np.log(p[1] / p[0])),
        }
        for line, p in reversed(shares.items())
    ]
    file = write(tmp_path / f"answers.{suffix}", rows)
    for how in (
        format_of("probabilities", "bad=p0", "good=p1"),
        format_of("probabilities", "good=p1", "bad=p0"),
        format_of("probabilities", "good=p1"),
        format_of("probabilities", "both"),
        format_of("probabilities", "named"),
        format_of("logits", "good=z"),
        format_of("probabilities", "named", smoothing=0.2),
    ):
        answers = read_answers(file, TASK, how)
        found = dict(zip(map(bytes, answers.ids), answers.logits, strict=True))
        opened = open_cache(cache)
        for part in opened.parts:
            for one, (line,) in zip(opened.text_ids(part.name), opened.texts(part.name), strict=True):
                wanted = (1 - how.share) * shares[line] + how.share / 2
                np.testing.assert_allclose(softmax(found[bytes(one)]), wanted, rtol=1e-5)


def test_votes_labels_and_zeros(tmp_path: Path) -> None:
    rows = [
        {"sentence": "one", "a": "pos", "b": "good", "p": [0.0, 1.0]},
        {"sentence": "two", "a": "bad", "b": "pos", "p": [1.0, 0.0]},
        {"sentence": "two", "a": "bad", "b": None, "p": [1.0, 0.0]},
        {"sentence": "three", "a": None, "b": None, "p": None},
        {"sentence": " ", "a": "bad", "b": None, "p": None},
    ]
    file = write(tmp_path / "votes.jsonl", rows)
    votes = read_answers(file, TASK, format_of("votes", "a", "b", names={"pos": "good"}, smoothing=0.0))
    assert sorted(round(float(softmax(one)[1]), 4) for one in votes.logits) == [0.3333, 1.0]
    assert votes.record["rows_without_answer"] == 2 and votes.record["rows_of_a_text_again"] == 1
    labels = read_answers(file, TASK, format_of("labels", "a", names={"pos": "good"}))
    assert sorted(round(float(softmax(one)[1]), 4) for one in labels.logits) == [0.05, 0.95]
    zeros = read_answers(file, TASK, format_of("probabilities", "p"))
    assert np.isfinite(zeros.logits).all() and zeros.record["probabilities_raised_to_1e-06"] == 2


GOOD: Row = {"sentence": "one", "p0": 0.5, "p1": 0.5, "label": "good"}
FAULTS: tuple[tuple[Kind, tuple[str, ...], Row, str], ...] = (
    ("probabilities", ("bad=p0", "good=p2"), {}, "answers.jsonl has no column 'p2'; it has: 'sentence', 'p0'"),
    ("probabilities", ("bad=p0", "good=p1"), {"p0": 0.4}, "line 2: the probabilities 0.4, 0.5 sum to 0.9"),
    ("probabilities", ("bad=p0", "good=p1"), {"p0": -0.5, "p1": 1.5}, "line 2: the probabilities -0.5, 1.5 sum to 1"),
    ("probabilities", ("bad=p0", "good=p1"), {"p0": float("nan")}, "line 2, column 'p0': nan is not a finite number"),
    ("logits", ("bad=p0", "good=p1"), {"p0": 1e39}, "line 2, column 'p0': 1e+39 is not a finite number"),
    ("logits", ("bad=p0", "good=p1"), {"p0": "high"}, "line 2, column 'p0': 'high' is not a finite number"),
    ("logits", ("bad=p0", "good=p1"), {"p0": None}, "line 2, column 'p0': None is not a finite number"),
    ("logits", ("p0",), {}, "line 1, column 'p0': 0.5 is not a list of 2 numbers"),
    ("labels", ("label",), {"label": "fine"}, "line 2, column 'label': 'fine' is no class of the cache; it has: 'bad'"),
    ("labels", ("label",), {"label": 1}, "line 2, column 'label': '1' is no class of the cache"),
    ("labels", ("label",), {"label": ["good", "bad"]}, "is a list of labels"),
    ("labels", ("label",), {"sentence": "one", "label": "bad"}, "line 2 has the text of"),
    ("probabilities", ("bad=p0",), {"sentence": "one", "p0": 0.25}, "line 2 has the text of"),
    ("probabilities", ("bad=p0", "bad=p1"), {}, "a column for each class was expected"),
    ("probabilities", ("worse=p0", "good=p1"), {}, "'worse' is no class of the cache"),
    ("probabilities", (), {}, "no column with answers is named"),
    ("votes", ("good=label",), {}, "--as votes takes columns that hold labels"),
    ("labels", ("label", "p0"), {}, "'--as labels' takes one"),
)


@pytest.mark.parametrize(("kind", "columns", "change", "message"), FAULTS, ids=[fault[-1][:40] for fault in FAULTS])
def test_a_row_that_is_not_usable_is_named(
    kind: Kind, columns: tuple[str, ...], change: Row, message: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "answers.jsonl", [GOOD, {**GOOD, "sentence": "two", **change}])
    with pytest.raises((DataError, RecipeError)) as caught:
        read_answers(file, TASK, format_of(kind, *columns))
    assert message in caught.value.message and caught.value.hint and "\n" not in caught.value.message


def test_missing_texts_are_refused_counted_and_listed(cache: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    rows = [
        {"sentence": line, "p": 0.5} for line in sentences(open_cache(cache)) if line not in ("train 3 word word word",)
    ]
    rows = [row for row in rows if not row["sentence"].startswith("test 1")] + [{"sentence": "elsewhere", "p": 0.1}]
    file = write(tmp_path / "some.jsonl", rows)
    arguments = ("cache", "import", cache, "--teacher", f"judge={file}", "--column", "good=p")
    said = kdcache(*arguments)
    assert said.code == 4
    assert "some.jsonl has no answer of 'judge' for 2 texts of the cache (test 1, train 1); the first: 't" in said.err
    assert "--write-missing" in said.err and said.err.count("\n") == 2
    listed = tmp_path / "missing.jsonl"
    said = kdcache(*arguments, "--write-missing", listed)
    assert said.code == 4 and "missing.jsonl" in said.err
    lacking = [json.loads(line) for line in listed.read_text().splitlines()]
    assert len(lacking) == 2 and all(list(row) == ["sentence"] for row in lacking)
    after = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file() and ".dump" not in path.parts}
    assert after == {path: data for path, data in before.items() if ".dump" not in path.parts}
    write(file, [*rows, *({**row, "p": 0.5} for row in lacking)])
    said = kdcache(*arguments, "--json")
    assert said.code == 0, said.err
    assert read_manifest(cache).provenance["teachers"]["judge"]["import"]["texts_not_in_cache"] == 1
    again = kdcache(*arguments, "--json")
    assert again.document["identity"] == said.document["identity"] and again.document["bytes_new"] == 0


def test_other_answers_under_the_same_name_are_refused(cache: Path, tmp_path: Path) -> None:
    lines = sentences(open_cache(cache))
    for number, share in enumerate((0.5, 0.25)):
        file = write(tmp_path / f"{number}.jsonl", [{"sentence": line, "p": share} for line in lines])
        said = kdcache("cache", "import", cache, "--teacher", f"judge={file}", "--column", "good=p")
        assert said.code == (0, 4)[number]
    assert "holds teacher 'judge' with weights (sha256)" in said.err and "give the teacher another name" in said.err
    twin = kdcache("cache", "import", cache, "--teacher", f"Judge={file}", "--column", "good=p")
    assert twin.code == 4 and "differs in case only" in twin.err


def test_a_killed_import_is_continued_to_the_same_identity(cache: Path, tmp_path: Path) -> None:
    rows = [{"sentence": line, "p": 0.3} for line in sentences(open_cache(cache))]
    answers = read_answers(write(tmp_path / "a.jsonl", rows), TASK, format_of("probabilities", "good=p"))
    wanted = Wanted({}, answers={"judge": ImportedTeacher(answers, "a.jsonl")})
    whole = Path(shutil.copytree(cache, tmp_path / "whole"))
    extend_cache(whole, wanted, progress=SilentProgress())
    for at in range(1, 60, 7):
        cut = Path(shutil.copytree(cache, tmp_path / f"cut-{at}"))
        try:
            with use_disk(dying_disk(at)):
                extend_cache(cut, wanted, progress=SilentProgress())
        except Died:
            pass
        extend_cache(cut, wanted, progress=SilentProgress())
        assert read_manifest(cut).identity == read_manifest(whole).identity
        assert verify(cut) == []


def test_a_cache_without_texts_takes_answers_by_content(tmp_path: Path) -> None:
    from kdcache.testing.caches import Plan

    plan = made_plan()
    dump(tmp_path / "bare", Plan(plan.train, plan.test, plan.teachers, store_text=False))
    rows = [{"sentence": text, "p": 0.3} for (text,) in (*plan.train.values(), *plan.test.values())]
    file = write(tmp_path / "a.jsonl", rows)
    assert kdcache("cache", "import", tmp_path / "bare", "--teacher", f"j={file}", "--column", "good=p").code == 0
    few = write(tmp_path / "few.jsonl", rows[1:])
    said = kdcache("cache", "import", tmp_path / "bare", "--teacher", f"k={few}", "--column", "good=p")
    assert said.code == 4 and "the first has the id " in said.err


def test_a_name_on_the_remote_gets_a_new_version(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdcache.share.push import push
    from kdcache.share.stores.registry import open_remote

    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KDCACHE_REMOTE", str(tmp_path / "remote"))
    (tmp_path / "remote").mkdir()
    push(open_remote(str(tmp_path / "remote")), cache, "made")
    file = write(tmp_path / "a.jsonl", [{"sentence": line, "p": 0.3} for line in sentences(open_cache(cache))])
    few = write(tmp_path / "few.jsonl", [{"sentence": line, "p": 0.3} for line in sentences(open_cache(cache))[:4]])
    listed = tmp_path / "missing.jsonl"
    column = ("--column", "good=p")
    said = kdcache("cache", "import", "made", "--teacher", f"judge={few}", *column, "--write-missing", listed)
    assert said.code == 4 and len(listed.read_text().splitlines()) == len(sentences(open_cache(cache))) - 4
    for _ in range(2):  # the second time nothing is missing
        said = kdcache("cache", "import", "made", "--teacher", f"judge={file}", *column, "--json")
        assert said.code == 0, said.err
        assert said.document["reference"] == "made@2"
    exported = kdcache("cache", "export", "made@2", "--teacher", "judge", "--output-dir", tmp_path / "out", "--json")
    assert exported.code == 0, exported.err
    assert exported.document["columns"] == ["sentence", "label", "logits_judge", "row", "text_id"]


def test_a_recipe_beside_a_name_on_the_remote_makes_no_directory(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KDCACHE_REMOTE", str(tmp_path / "remote"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "remote").mkdir()
    kdcache("cache", "push", tiny_run.cache, "--name", "made")
    file = write(tmp_path / "a.jsonl", [{"sentence": line, "p": 0.3} for line in sentences(open_cache(tiny_run.cache))])
    arguments = ("--teacher", f"judge={file}", "--column", "1=p", "--recipe", tiny_run.recipe_file)
    said = kdcache("cache", "import", "made", *arguments, "--tag", "judged", "--json")
    assert said.code == 0, said.err
    assert said.document["reference"] == "made@2" and not (tmp_path / "made").exists()
    said = kdcache("cache", "import", "new", *arguments, "--tag", "judged")
    assert said.code == 2 and "there is no cache 'new' yet" in said.err
    assert kdcache("cache", "import", "new", *arguments).code == 0 and (tmp_path / "new/manifest.json").is_file()


def test_a_cache_with_an_imported_teacher_alone_can_get_a_teacher_that_runs(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Its settings are not those of the imported one, which has none."""
    kdcache("cache", "export", tiny_run.cache, "--output-dir", tmp_path / "out", "--teacher", "bert")
    place = tmp_path / "judged"
    column = ("--as", "logits", "--column", "logits_bert", "--recipe", tiny_run.recipe_file)
    assert kdcache("cache", "import", place, "--teacher", f"judge={tmp_path / 'out'}", *column).code == 0
    add = ("cache", "extend", place, "--teacher", f"bert={tiny_run.teachers}")
    by_default = kdcache(*add)
    assert by_default.code == 1 and "takes at most 80 tokens, max_length is 128" in by_default.err
    said = kdcache(*add, "--recipe", tiny_run.recipe_file, "--json")
    assert said.code == 0, said.err
    assert open_cache(place).teachers["bert"].max_length == 32
    assert verify(place) == []


def test_bad_flags_are_one_line(cache: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"sentence": "one", "p": 0.3}])
    for flags, code, message in (
        (("--teacher", "judge"), 2, "--teacher judge is not NAME=FILE"),
        (("--teacher", f"../x={file}", "--column", "good=p"), 2, "'../x' is no name of a teacher"),
        (("--teacher", f"judge={file}", "--as", "scores"), 2, "--as is 'scores'; it is one of"),
        (("--teacher", f"judge={file}"), 2, "no column with answers is named"),
        (("--teacher", f"judge={file}", "--column", "good=p", "--map", "x"), 2, "--map x is not LABEL=CLASS"),
        (("--teacher", f"judge={file}", "--column", "good=p", "--smoothing", "1"), 2, "--smoothing is 1"),
        (
            ("--teacher", f"judge={file}", "--column", "good=p", "--text", "p", "--text", "p"),
            2,
            "--text names 2 columns",
        ),
        (("--teacher", f"judge={file}", "--column", "good=p", "--tag", "x"), 2, "--tag belongs to a name"),
        (("--teacher", f"judge={tmp_path / 'none.jsonl'}", "--column", "good=p"), 2, "there is no file"),
    ):
        said = kdcache("cache", "import", cache, *flags)
        assert said.code == code, said.err
        assert message in said.err
        assert [line.split(":")[0] for line in said.err.splitlines()] == ["error", "hint"]
    assert open_cache(cache).teachers.keys() == {"bert", "roberta"}
