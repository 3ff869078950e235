"""Growing a cache.

What is added equals what one dump of everything would have made, and nothing else is run, read or sent.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.cache.layout import MANIFEST
from kdcache.cache.manifest import read_manifest
from kdcache.cache.reader import open_cache
from kdcache.cache.selection import Selection, read_local, write_selection
from kdcache.cache.verify import verify
from kdcache.dump.extend import ExtendReport, Wanted, extend_cache
from kdcache.errors import MismatchError, ModelError, RemoteError
from kdcache.progress import SilentProgress
from kdcache.report.metrics import scores
from kdcache.share import keys as layout
from kdcache.share.keys import parse_file_key
from kdcache.share.local_store import LocalStore
from kdcache.share.push import push, without_text
from kdcache.share.reading_through import read_through
from kdcache.share.refs import resolve
from kdcache.share.stores.directory import DirectoryRemote
from kdcache.share.working_copy import working_copy
from kdcache.testing.faulty_remote import FaultyRemote
from kdcache.testing.memory_remote import MemoryRemote
from kdcache.testing.tiny import make_model, reviews, write_reviews
from tests.cli.commands import kdcache
from tests.dump.conftest import Workbench

TOKENS = "dump.tokens_per_batch=4096"  # the size of a batch changes last bits; this is what is taken without a recipe


def extend(cache: Path, teachers: Mapping[str, Path], **options: Any) -> ExtendReport:
    return extend_cache(cache, Wanted(teachers, **options), progress=SilentProgress())


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, review_recipe: Path, tiny_teachers: Path) -> Path:
    """A cache of bert and roberta."""
    bench = Workbench(review_recipe, tiny_teachers, tmp_path_factory.mktemp("pair") / "cache")
    bench.only("bert", "roberta").dump(TOKENS)
    return bench.cache


@pytest.fixture
def grown(pair: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair, tmp_path / "grown"))


def test_a_newcomer_is_run_as_the_others_were(bench: Workbench, grown: Path) -> None:
    before = {path: path.stat().st_ino for path in (grown / "teachers").rglob("*") if path.is_file()}
    old = read_manifest(grown)
    report = extend(grown, {"xlm": bench.teachers})
    assert report.identity == bench.dump(TOKENS).identity, "not what one dump of the three makes"
    assert [run.teacher for run in report.runs] == ["xlm"]
    assert all(path.stat().st_ino == inode for path, inode in before.items())
    new = read_manifest(grown)
    assert old.contents.files.items() <= new.contents.files.items()
    assert (report.new_texts, report.bytes_shared) == (
        0,
        sum({d.sha256: d.size for d in old.contents.files.values()}.values()),
    )
    assert verify(grown) == []
    record = new.provenance["teachers"]
    assert set(record) == {"bert", "roberta", "xlm"} and record["xlm"]["texts_run"] == 184
    assert record["bert"] == old.provenance["teachers"]["bert"]
    assert "| xlm |" in (grown / "README.md").read_text()
    again = extend(grown, {"xlm": bench.teachers / "xlm"})
    assert again.identity == report.identity and not again.runs


def test_a_newcomer_gets_layers_at_the_depths_that_the_cache_has(bench: Workbench) -> None:
    """[1, 3] of four is not what 'even' takes: that would be [2, 4]."""
    settings = (TOKENS, "dump.layers=[1,3]")
    bench.only("bert").dump(*settings)
    extend(bench.cache, {"roberta": bench.teachers})
    assert sorted(open_cache(bench.cache).teachers["roberta"].layers) == [1, 3]
    both = bench.only("bert", "roberta").dump(*settings, cache=bench.cache.parent / "both")
    assert read_manifest(bench.cache).identity == both.identity


def test_layers_and_rows(bench: Workbench, grown: Path, tmp_path: Path) -> None:
    report = extend(grown, {"bert": bench.teachers}, layers=(3,))
    assert [run.teacher for run in report.runs] == ["bert"]
    assert sorted(open_cache(grown).teachers["bert"].layers) == [2, 3, 4]
    more = write_reviews(
        tmp_path / "more.tsv", [*reviews(184, seed=1)[:96], ("one line more", 1), ("and another one", 0)]
    )
    two = bench.only("bert", "roberta")
    recipe = two.recipe(f'data.train="{more}"', TOKENS)
    with pytest.raises(
        MismatchError, match="2 texts that the cache lacks; teacher 'roberta' would not be run"
    ) as caught:
        extend(grown, {"bert": bench.teachers}, recipe=recipe)
    assert caught.value.exit_code == 4 and "--teacher roberta=DIR" in caught.value.hint
    report = extend(grown, {"bert": bench.teachers, "roberta": bench.teachers}, recipe=recipe)
    assert report.new_texts == 2 and {run.texts for run in report.runs} == {2}
    assert len(open_cache(grown).examples("train").labels) == 98
    assert verify(grown) == []


def test_a_classifier_of_ones_own(grown: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "mine", "bert", depth=2, classes=2, seed=9)
    extend(grown, {"mine": model})
    spec = open_cache(grown).teachers["mine"]
    assert (spec.head, spec.depth, sorted(spec.layers)) == ("own", 2, [1, 2])
    assert read_manifest(grown).provenance["teachers"]["mine"]["scores"] == scores_on_validation(grown, "mine")
    assert verify(grown) == []
    with pytest.raises(ModelError, match="no model could be loaded"):
        extend(grown, {"gpt": Path(__file__).parent})
    three = make_model(tmp_path / "three", "bert", depth=2, classes=3)
    with pytest.raises((MismatchError, ModelError)):
        extend(grown, {"three": three})


def scores_on_validation(cache_dir: Path, name: str) -> dict[str, str]:
    """Found by the reader of students: the rows of the split, and for each the teacher's logits."""
    cache = open_cache(cache_dir)
    logits = {}
    for part in cache.parts:
        logits |= dict(zip(map(bytes, cache.text_ids(part.name)), cache.outputs(name, part.name).logits, strict=True))
    rows = cache.examples("validation")
    found = scores(rows.labels, np.stack([logits[bytes(row)] for row in rows.text_ids]))
    return {metric: f"{value:.6g}" for metric, value in found.items()}


def test_other_weights_are_refused(grown: Path, tmp_path: Path) -> None:
    from kdcache.testing.teachers import make_teachers

    other = make_teachers(tmp_path / "other", {"bert": "bert"}, seed=5)
    with pytest.raises(MismatchError, match="holds teacher 'bert' with weights"):
        extend(grown, {"bert": other}, layers=(1,))


def test_a_cache_without_texts_needs_the_data(bench: Workbench, grown: Path) -> None:
    free = without_text(read_manifest(grown))
    (grown / MANIFEST).write_bytes(free.to_bytes())
    shutil.rmtree(grown / "text")
    with pytest.raises(MismatchError, match="does not store its texts") as caught:
        extend(grown, {"xlm": bench.teachers})
    assert "--recipe RECIPE" in caught.value.hint
    report = extend(grown, {"xlm": bench.teachers}, recipe=bench.recipe(TOKENS))
    assert not (grown / "text").exists() and verify(grown) == []
    bench.dump(TOKENS)
    assert report.identity == without_text(read_manifest(bench.cache)).identity


def test_a_part_of_a_cache_grows_as_far_as_it_is_here(bench: Workbench, grown: Path, pair: Path) -> None:
    for name in ("teachers/roberta", "teachers/bert/hidden", "teachers/bert/tokens", "teachers/bert/basis", "text"):
        shutil.rmtree(grown / name)
    write_selection(grown, Selection({"bert": ()}, text=False), origin="reviews@1")
    with pytest.raises(MismatchError, match="the texts") as caught:
        extend(grown, {"xlm": bench.teachers})
    assert f"kdcache cache pull reviews@1 --teachers bert --no-hidden --to {grown}" in caught.value.hint
    shutil.copytree(pair / "text", grown / "text")
    write_selection(grown, Selection({"bert": ()}), origin="reviews@1")
    report = extend(grown, {"xlm": bench.teachers})
    assert report.identity == bench.dump(TOKENS).identity
    local = read_local(grown)
    assert local is not None and local.selection == Selection({"bert": (), "xlm": (2, 4)})
    assert verify(grown) == []
    open_cache(grown).hidden("xlm", "part-00000", 4)


def test_a_name_gets_its_next_version(
    bench: Workbench, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "remote").mkdir()
    monkeypatch.setenv("KDCACHE_REMOTE", str(tmp_path / "remote"))
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))
    remote = DirectoryRemote(tmp_path / "remote")
    push(remote, pair, "reviews")
    before = {entry.key for entry in remote.list("")}
    said = kdcache("cache", "extend", "reviews", "--teacher", f"xlm={bench.teachers}", "--tag", "v2", "--json")
    assert said.code == 0, said.err
    assert said.document["reference"] == "reviews@2"
    assert said.document["identity"] == bench.dump(TOKENS).identity == resolve(remote, "reviews@v2").identity
    assert resolve(remote, "reviews@1").identity == read_manifest(pair).identity
    added = {entry.key for entry in remote.list("")} - before
    xlm = {d.sha256 for path, d in read_manifest(bench.cache).contents.files.items() if path.startswith("teachers/xlm")}
    assert {parse_file_key(key) for key in added if parse_file_key(key)} <= xlm
    kept = Path(said.document["cache"])
    assert verify(kept) == [] and not (kept / "teachers/bert/hidden").exists()
    assert (tmp_path / "home/store/caches" / read_manifest(pair).identity / "text/part-00000.arrow").samefile(
        kept / "text/part-00000.arrow"
    )
    for flags, message in (
        (("--teacher", f"xlm={bench.teachers}", "--teacher", "gpt"), "is not NAME=DIR"),
        (("--teacher", f"a/b={bench.teachers}"), "'a/b' is no name of a teacher"),
        (("--teacher", f"xlm={bench.teachers}", "--set", "dump.dim=6"), "none is given"),
    ):
        said = kdcache("cache", "extend", "reviews@1", *flags)
        assert said.code == 2 and message in said.err, said.err


def test_an_extension_whose_push_failed_goes_on_without_running_the_teacher_again(
    bench: Workbench, pair: Path, tmp_path: Path
) -> None:
    remote, store = MemoryRemote(), LocalStore(tmp_path / "store")
    push(remote, pair, "reviews")
    counting = FaultyRemote(remote)
    ref = resolve(remote, "reviews")
    with pytest.raises(RemoteError), working_copy(counting, ref, "a" * 64, store=store) as copy:
        extend_cache(copy.path, Wanted({"xlm": bench.teachers}), progress=SilentProgress(), arrivals=copy.arrivals)
        raise RemoteError("the cable")
    fetched = {parse_file_key(line.split()[1]) for line in counting.log if line.startswith("read files/")}
    files = read_manifest(pair).contents.files
    assert fetched == {
        digest.sha256 for path, digest in files.items() if path.split("/")[0] in ("texts", "text", "data")
    }
    with working_copy(remote, ref, "a" * 64, store=store) as copy:
        report = extend_cache(
            copy.path, Wanted({"xlm": bench.teachers}), progress=SilentProgress(), arrivals=copy.arrivals
        )
        assert not report.runs
        assert push(remote, copy.path, "reviews").reference == "reviews@2"
        place = store.adopt(copy.path, read_manifest(copy.path))
    assert not copy.path.exists() and verify(place) == []
    with read_through(remote, resolve(remote, "reviews"), store=store) as cache:
        cache.select(Selection({"xlm": (2, 4), "bert": (2,)}))
        cache.hidden("bert", "part-00000", 2)
    assert verify(place) == []
    assert all(remote.head(layout.file_key(digest.sha256)) for digest in read_manifest(place).contents.files.values())
