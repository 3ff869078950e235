"""The whole dump on tiny teachers of three tokenizers, read back through the reader and compared with the models."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.cache.reader import open_cache
from kdcache.cache.writer import CacheWriter
from kdcache.codecs.int8 import INT8
from kdcache.data.encoding import encode, pad
from kdcache.dump import run
from kdcache.errors import MismatchError, ModelError
from kdcache.files import use_disk
from kdcache.students.speed import Speed, time_forward
from kdcache.teachers.bundle import load_teacher, read_bundle
from kdcache.teachers.teacher import Teacher
from kdcache.testing.faults import Died, counting_disk, dying_disk
from kdcache.testing.teachers import make_teachers
from kdcache.testing.tiny import reviews
from tests.dump.conftest import Workbench

FULL_TEXTS, LOGITS_TEXTS = 96 + 24, 32 + 32
EXACT = ("dump.projection=none", "dump.dtype=float32", "dump.layers=[0, 2, 4]", "dump.pooled=true")


def _forward(
    teacher: Teacher, text: tuple[str, ...], max_length: int = 32
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Logits, pooled vector and hidden states of one text, run alone."""
    encoded = encode(teacher.tokenizer, [text], max_length)
    with torch.no_grad():
        forward = teacher.model(pad(encoded, [0], int(teacher.tokenizer.pad_token_id)), hidden_states=True)
    assert forward.hidden_states is not None
    return forward.logits[0].numpy(), forward.pooled[0].numpy(), [state[0].numpy() for state in forward.hidden_states]


def test_soft_labels_alone(bench: Workbench) -> None:
    bench.dump("dump.layers=none")
    cache = open_cache(bench.cache)
    assert {name: dict(spec.layers) for name, spec in cache.teachers.items()} == {"bert": {}, "roberta": {}, "xlm": {}}
    assert cache.outputs("bert", cache.parts[0].name).logits.shape == (32, 2)
    assert not list(bench.cache.rglob("*.zarr"))


def test_what_is_read_back_is_what_the_teachers_say(bench: Workbench) -> None:
    report = bench.dump(*EXACT)
    cache = open_cache(bench.cache)
    assert cache.identity == report.identity
    assert list(cache.teachers) == ["bert", "roberta", "xlm"]
    assert Counter(part.scope for part in cache.parts) == {"full": 4, "logits": 2}
    assert sum(part.texts for part in cache.parts) == report.texts == FULL_TEXTS + LOGITS_TEXTS
    for name, spec in cache.teachers.items():
        teacher = load_teacher(bench.teachers, name)
        assert spec.fingerprints == teacher.fingerprints
        for part in cache.parts:
            outputs = cache.outputs(name, part.name)
            assert outputs.pooled is not None
            texts = cache.texts(part.name)
            expected = [_forward(teacher, text) for text in texts]
            np.testing.assert_allclose(outputs.logits, [one[0] for one in expected], atol=1e-5, rtol=1e-5)
            np.testing.assert_allclose(outputs.pooled, [one[1] for one in expected], atol=1e-5, rtol=1e-5)
            if part.scope == "logits":
                continue
            encoded = encode(teacher.tokenizer, texts, 32)
            tokens = cache.tokens(name, part.name)
            for field in ("offsets", "starts", "ends", "segments", "roles"):
                np.testing.assert_array_equal(getattr(tokens, field), getattr(encoded, field))
            for layer in (0, 2, 4):
                stored = cache.hidden(name, part.name, layer).values
                states = np.concatenate([one[2][layer] for one in expected])
                np.testing.assert_allclose(stored, states, atol=1e-5, rtol=1e-5)


def test_int8_on_a_pca_basis_is_within_half_a_scale(bench: Workbench) -> None:
    bench.dump("dump.dim=6", "dump.layers=[3]")
    cache = open_cache(bench.cache)
    stored, exact = [], []
    for name in cache.teachers:
        teacher = load_teacher(bench.teachers, name)
        basis = cache.basis(name, 3)
        assert basis.components is not None
        assert basis.components.shape == (6, teacher.width)
        for part in (part for part in cache.parts if part.scope == "full"):
            block = cache.hidden(name, part.name, 3)
            assert block.values.dtype == np.int8
            assert block.scales is not None
            states = np.concatenate([_forward(teacher, text)[2][3] for text in cache.texts(part.name)])
            projected = (states - basis.mean) @ basis.components.T
            assert (np.abs(INT8.decode(block, basis) - projected) <= block.scales[:, None] / 2 + 1e-5).all()
            if name == "bert":
                stored.append(INT8.decode(block, basis))
                exact.append(projected)
    target_variance = cache.basis("bert", 3).target_variance  # of the sample, 64 of 120 texts
    assert target_variance == pytest.approx(np.concatenate(exact).var(axis=0).mean(), rel=0.25)
    assert np.concatenate(stored).var(axis=0).mean() == pytest.approx(
        np.concatenate(exact).var(axis=0).mean(), rel=0.02
    )


def test_two_dumps_of_one_recipe_have_one_identity(bench: Workbench, tmp_path: Path) -> None:
    first = bench.dump()
    assert bench.dump(cache=tmp_path / "again").identity == first.identity
    assert bench.dump("dump.layers=[1]", cache=tmp_path / "other").identity != first.identity


def digests(cache: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and ".dump" not in path.parts
    }


def test_batches_of_another_size_change_rounding_only(bench: Workbench, tmp_path: Path) -> None:
    """``tokens_per_batch`` is not part of a cache's specification.

    Nor are device and library versions, which do no more.
    """
    bench.dump(*EXACT)
    other = bench.dump(*EXACT, "dump.tokens_per_batch=64", cache=tmp_path / "other").cache
    found, again = digests(bench.cache), digests(other)
    assert found.keys() == again.keys()
    rounded = [name for name in found if found[name] != again[name] and "manifest" not in name and "README" not in name]
    assert all("/outputs/" in name or "/hidden/" in name or "/basis/" in name for name in rounded)
    one, two = open_cache(bench.cache), open_cache(other)
    for name in one.teachers:
        for part in one.parts:
            np.testing.assert_allclose(
                one.outputs(name, part.name).logits, two.outputs(name, part.name).logits, rtol=1e-5, atol=1e-5
            )
            for layer in one.teachers[name].layers if part.scope == "full" else ():
                values = (cache.hidden(name, part.name, layer).values for cache in (one, two))
                np.testing.assert_allclose(*values, rtol=1e-5, atol=1e-5)


def test_a_dump_goes_on_with_batches_of_another_size(bench: Workbench, tmp_path: Path) -> None:
    """What is there stays as it is, byte for byte, and the rest is made as it is asked for now."""
    with use_disk(counting := counting_disk()):
        bench.dump(*EXACT, cache=tmp_path / "whole")
    with use_disk(dying_disk(len(counting.steps) // 2)), pytest.raises(Died):
        bench.dump(*EXACT)
    before = digests(bench.cache)
    kept = {
        name: data for name, data in before.items() if name.startswith("teachers/bert/")
    }  # finished; the next one was begun
    assert len([name for name in kept if "/outputs/" in name]) == 6
    report = bench.dump(*EXACT, "dump.tokens_per_batch=64")
    after = digests(bench.cache)
    assert kept.items() <= after.items()
    assert bench.dump(*EXACT, "dump.tokens_per_batch=333").runs == ()
    assert open_cache(bench.cache).identity == report.identity


@pytest.mark.parametrize("columns", [("premise", "hypothesis"), ("premise",)], ids=["pairs", "single texts"])
def test_token_types_that_a_tokenizer_withholds_are_another_teacher(columns: tuple[str, ...], tmp_path: Path) -> None:
    """Where they change what the teacher says.

    Pairs, for a model that tells types apart. Bundles of 0.1.0 stay what they are.
    """
    families = {"bert": "bert", "roberta": "roberta", "xlm": "xlm-roberta", "distilbert": "distilbert"}
    directory = make_teachers(tmp_path / "teachers", families, text_columns=columns)  # type: ignore[arg-type]
    old = read_bundle(directory)
    fingerprints = {name: load_teacher(directory, name).fingerprints for name in families}
    recorded = {f"teachers.{name}.token_types": name == "bert" for name in families}
    new = replace(old, training={"identity": recorded, "added": {}})
    assert {name: load_teacher(directory, name, new).fingerprints for name in families} == fingerprints
    for name in families:
        path = directory / name / "tokenizer_config.json"
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"model_input_names": ["input_ids", "attention_mask"]})
        )
    refused = []
    for name in families:
        assert load_teacher(directory, name, old).fingerprints == fingerprints[name]
        try:
            load_teacher(directory, name, new)
        except MismatchError as error:
            assert "tokenizer" in error.message
            refused.append(name)
    assert refused == (["bert"] if len(columns) == 2 else [])


def test_the_layers_of_a_teacher_may_be_its_own(bench: Workbench) -> None:
    bench.dump("teachers.bert.layers=[1]", "teachers.xlm.layers=[0, 3]")
    cache = open_cache(bench.cache)
    assert {name: tuple(spec.layers) for name, spec in cache.teachers.items()} == {
        "bert": (1,),
        "roberta": (2, 4),
        "xlm": (0, 3),
    }


def test_a_finished_dump_runs_nothing(bench: Workbench, forward_passes: Counter[object]) -> None:
    first = bench.dump()
    assert forward_passes
    forward_passes.clear()
    second = bench.dump()
    assert not forward_passes
    assert second.runs == ()
    assert second.identity == first.identity


def test_one_teacher_at_a_time(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[torch.nn.Module] = []
    load = run.load_teacher

    def watched(directory: Path, name: str, **options: bool) -> Teacher:
        assert all(parameter.device.type == "meta" for model in loaded for parameter in model.parameters())
        teacher = load(directory, name, **options)
        loaded.append(teacher.model)
        return teacher

    monkeypatch.setattr(run, "load_teacher", watched)
    bench.dump()
    assert len(loaded) == 3


def test_a_new_teacher_leaves_the_others_alone(
    bench: Workbench, tmp_path: Path, forward_passes: Counter[object]
) -> None:
    two = bench.only("bert", "roberta")
    two.dump("dump.layers=[2]")
    files = {path: path.stat().st_mtime_ns for path in bench.cache.rglob("part-*") if path.is_file()}
    forward_passes.clear()
    report = bench.dump("dump.layers=[2]")
    assert {teacher for teacher, _ in forward_passes} == {"xlm"}
    assert [one.teacher for one in report.runs] == ["xlm"]
    assert all(path.stat().st_mtime_ns == when for path, when in files.items())
    assert report.identity == bench.dump("dump.layers=[2]", cache=tmp_path / "at once").identity


def test_a_new_layer_is_dumped_alone(
    bench: Workbench, tmp_path: Path, forward_passes: Counter[tuple[str, tuple[int, ...]]]
) -> None:
    bench.dump("dump.layers=[2]")
    forward_passes.clear()
    report = bench.dump("dump.layers=[2, 3]")
    assert {layers for _, layers in forward_passes} == {(3,)}
    per_teacher = {teacher: count for (teacher, _), count in forward_passes.items()}
    assert per_teacher == dict.fromkeys(
        ("bert", "roberta", "xlm"), FULL_TEXTS + 64
    )  # the sample of the new bases besides
    assert report.identity == bench.dump("dump.layers=[2, 3]", cache=tmp_path / "at once").identity


def test_new_texts_get_new_parts_and_the_stored_bases(
    bench: Workbench, forward_passes: Counter[tuple[str, tuple[int, ...]]]
) -> None:
    bench.dump("data.transfer=[]")
    before = open_cache(bench.cache)
    bases = {name: before.basis(name, 2).components for name in before.teachers}
    forward_passes.clear()
    bench.dump()
    assert set(forward_passes.values()) == {24}
    after = open_cache(bench.cache)
    assert [part.texts for part in after.parts if part.scope == "full"] == [32, 32, 32, 24]
    for name, components in bases.items():
        np.testing.assert_array_equal(after.basis(name, 2).components, components)
    assert len(after.examples("transfer").labels) == 24


def test_a_teacher_of_the_cache_that_the_recipe_forgets_must_not_lack_new_texts(bench: Workbench) -> None:
    first = bench.dump("dump.layers=[2]", "data.transfer=[]")
    fewer = bench.only("bert", "xlm")
    with pytest.raises(
        MismatchError, match="holds teacher 'roberta', which the recipe does not name and which would lack 24 new texts"
    ):
        fewer.dump("dump.layers=[2]")
    assert bench.dump("dump.layers=[2]", "data.transfer=[]").identity == first.identity  # nothing was changed
    assert fewer.dump("dump.layers=[2]", "data.transfer=[]").identity == first.identity  # no new texts: the others stay


def test_a_refusal_leaves_no_new_texts_behind(bench: Workbench) -> None:
    first = bench.dump("dump.layers=[2]", "data.transfer=[]")
    with pytest.raises(MismatchError, match="dim of layer 2"):
        bench.dump("dump.layers=[2]", "dump.dim=4")
    assert bench.dump("dump.layers=[2]", "data.transfer=[]").identity == first.identity


def test_a_test_text_that_is_trained_on_later_is_run_in_full(bench: Workbench, tmp_path: Path) -> None:
    bench.dump()
    directory = bench.recipe_file.parent
    joined = tmp_path / "joined.tsv"
    joined.write_text(
        (directory / "train.tsv").read_text() + "".join((directory / "test.tsv").read_text().splitlines(True)[1:])
    )
    bench.dump(f'data.train="{joined}"')
    cache = open_cache(bench.cache)
    assert [part.texts for part in cache.parts if part.scope == "full"] == [32, 32, 32, 24, 32]
    indices, _ = cache.locate(cache.examples("test").text_ids)
    assert {cache.parts[index].scope for index in indices.tolist()} == {"full"}


def test_changed_labels_run_nothing(bench: Workbench, tmp_path: Path, forward_passes: Counter[object]) -> None:
    first = bench.dump()
    forward_passes.clear()
    flipped = tmp_path / "flipped.tsv"
    lines = (bench.recipe_file.parent / "train.tsv").read_text().splitlines()
    flipped.write_text("\n".join([lines[0], *(line[:-1] + str(1 - int(line[-1])) for line in lines[1:])]) + "\n")
    before = open_cache(bench.cache).examples("train").labels
    second = bench.dump(f'data.train="{flipped}"')
    assert not forward_passes
    assert second.identity != first.identity
    np.testing.assert_array_equal(open_cache(bench.cache).examples("train").labels, 1 - before)


def test_a_teacher_is_timed_at_the_end_of_its_first_dump(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches that the dump has too; a later dump keeps the record, and no identity depends on it."""
    timed: list[tuple[int, int]] = []  # rows and padded tokens of each batch

    def speed(forward: Callable[[dict[str, torch.Tensor]], torch.Tensor], *arguments: Any) -> Speed:
        def watched(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
            timed.append((len(inputs["input_ids"]), inputs["input_ids"].numel()))
            return forward(inputs)

        return time_forward(watched, *arguments)

    two = bench.only("bert", "roberta")
    monkeypatch.setattr(run, "time_forward", speed)
    two.dump("data.transfer=[]", "dump.tokens_per_batch=40")
    assert 0 < len(timed) <= 2 * (2 + 2 + 4)
    assert max(tokens for _, tokens in timed) <= 40
    record = open_cache(bench.cache).manifest.provenance["teachers"]["roberta"]
    assert min(float(record[key]) for key in ("parameters", "latency_ms", "forward_texts_per_second")) > 0
    timed.clear()
    two.dump("dump.tokens_per_batch=40")
    assert not timed
    kept = open_cache(bench.cache).manifest.provenance["teachers"]["roberta"]
    assert kept["latency_ms"] == record["latency_ms"]
    monkeypatch.setattr(run, "measured_record", lambda *_: {})
    other = replace(two, cache=tmp_path / "other")
    other.dump("data.transfer=[]", "dump.tokens_per_batch=40")
    assert "latency_ms" not in open_cache(other.cache).manifest.provenance["teachers"]["roberta"]
    assert other.dump("dump.tokens_per_batch=40").identity == open_cache(bench.cache).manifest.identity


def test_provenance_and_card(bench: Workbench) -> None:
    bench.dump('licence="CC-BY-4.0"', 'teachers.bert.licence="MIT"', "dump.layers=[2]")
    provenance = open_cache(bench.cache).manifest.provenance
    assert provenance["recipe"] == "reviews"
    assert provenance["versions"].keys() >= {"kdcache", "torch", "transformers", "zarr"}
    assert provenance["teachers"]["bert"].keys() >= {"device", "dumped", "texts_per_second", "scores", "source"}
    made = provenance["teachers"]["bert"]["dumped"]
    card = (bench.cache / "README.md").read_text()
    for expected in (
        "3 fine-tuned teachers",
        "184 texts",
        "| train | 96 |",
        "| bert |",
        "CC-BY-4.0",
        "teacher bert: MIT",
        "2 (pca 8 int8)",
    ):
        assert expected in card
    bench.dump("dump.layers=[2, 3]")
    assert open_cache(bench.cache).manifest.provenance["teachers"]["bert"]["dumped"] >= made


def test_an_interruption_does_not_lose_how_a_teacher_was_run(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    load = run.load_teacher

    def interrupted(directory: Path, name: str, **options: bool) -> Teacher:
        if name == "xlm":
            raise KeyboardInterrupt
        return load(directory, name, **options)

    monkeypatch.setattr(run, "load_teacher", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.dump()
    monkeypatch.undo()
    report = bench.dump()
    assert [one.teacher for one in report.runs] == ["xlm"]
    teachers = open_cache(bench.cache).manifest.provenance["teachers"]
    assert {name for name, record in teachers.items() if record["device"] and record["texts_run"] == 184} == {
        "bert",
        "roberta",
        "xlm",
    }
    assert not list((bench.cache / ".dump").glob("*.run"))


def test_what_a_killed_dump_ran_is_in_the_provenance(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after some parts, then between a teacher's last part and its record."""
    only, measured = bench.only("bert"), {"texts_run", "texts_truncated", "parameters", "device", "texts_per_second"}
    commit, left = CacheWriter._commit_part, [2]

    def interrupted(writer: CacheWriter, *arguments: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return commit(writer, *arguments)

    def never(*_: object) -> dict[str, str]:
        raise KeyboardInterrupt

    for owner, name, instead in ((CacheWriter, "_commit_part", interrupted), (run, "measured_record", never)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, instead)
            only.dump("data.max_length=8")
    assert only.dump("data.max_length=8").identity == only.dump("data.max_length=8", cache=tmp_path / "whole").identity
    found, expected = (
        open_cache(cache).manifest.provenance["teachers"]["bert"] for cache in (only.cache, tmp_path / "whole")
    )
    assert found.keys() == expected.keys() >= measured | {"latency_ms"}
    assert expected["texts_truncated"] > 0
    for key in ("texts_run", "texts_truncated", "parameters", "device"):
        assert found[key] == expected[key]
    assert not list((only.cache / ".dump").glob("bert*"))


def test_pairs_of_texts(bench: Workbench, tmp_path: Path) -> None:
    rows = [
        (one, other, label) for (one, label), (other, _) in zip(reviews(20, seed=8), reviews(20, seed=9), strict=True)
    ]
    rows += [("the film is good", "", 1), ("", "the plot is bad", 0)]  # a column may be empty
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text(
        "premise\thypothesis\tlabel\n" + "".join(f"{one}\t{other}\t{label}\n" for one, other, label in rows)
    )
    recipe = tmp_path / "pairs.toml"
    recipe.write_text(f"""\
name = "pairs"
[data]
train = "{pairs}"
text = ["premise", "hypothesis"]
label = "label"
max_length = 24
[[teachers]]
name = "bert"
model = "none"
[[teachers]]
name = "xlm"
model = "none"
[dump]
layers = [4]
projection = "none"
dtype = "float32"
""")
    families = {"bert": "bert", "xlm": "xlm-roberta"}
    teachers = make_teachers(tmp_path / "pair-teachers", families, text_columns=("premise", "hypothesis"))  # type: ignore[arg-type]
    Workbench(recipe, teachers, bench.cache).dump()
    cache = open_cache(bench.cache)
    for name in families:
        teacher = load_teacher(teachers, name)
        tokens, hidden = cache.tokens(name, "part-00000"), cache.hidden(name, "part-00000", 4).values
        assert set(tokens.segments.tolist()) == {-1, 0, 1}
        for row, text in enumerate(cache.texts("part-00000")):
            logits, _, states = _forward(teacher, text, max_length=24)
            np.testing.assert_allclose(cache.outputs(name, "part-00000").logits[row], logits, atol=1e-5)
            np.testing.assert_allclose(hidden[tokens.offsets[row] : tokens.offsets[row + 1]], states[4], atol=1e-5)


def test_the_onnx_backend_agrees_and_its_parity_is_recorded(bench: Workbench, tmp_path: Path) -> None:
    bench = bench.only("bert")
    narrow = ("dump.layers=[2]", "dump.projection=none", "dump.dtype=float32")
    bench.dump(*narrow, "dump.backend=onnxruntime")
    bench.dump(*narrow, cache=tmp_path / "torch")
    onnx, torched = open_cache(bench.cache), open_cache(tmp_path / "torch")
    assert {spec.backend for spec in onnx.teachers.values()} == {"onnxruntime"}
    for name in onnx.teachers:
        for part in onnx.parts:
            np.testing.assert_allclose(
                onnx.outputs(name, part.name).logits, torched.outputs(name, part.name).logits, atol=1e-4
            )
        hidden = onnx.hidden(name, "part-00000", 2).values, torched.hidden(name, "part-00000", 2).values
        np.testing.assert_allclose(*hidden, atol=1e-4)
        assert float(onnx.manifest.provenance["teachers"][name]["max_abs_difference_to_torch"]) < 1e-4


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["data.max_length=16"], "max_length"),
        (["dump.dim=4"], "dim of layer 2"),
        (["dump.dtype=float16"], "dtype of layer 2"),
        (["dump.projection=random"], "projection of layer 2"),
        (["dump.sample_texts=32"], "sample_texts"),
        (["dump.part_size=16"], "part_size"),
        (["dump.seed=1"], "seed"),
        (["dump.precision=bf16"], "precision"),
        (["dump.backend=onnxruntime"], "backend"),
        (["dump.pooled=true"], "pooled"),
    ],
)
def test_changed_settings_are_refused_and_named(
    stale_bench: Workbench, overrides: list[str], named: str, forward_passes: Counter[object]
) -> None:
    before = (stale_bench.cache / "manifest.json").read_bytes()
    with pytest.raises(MismatchError, match=named):
        stale_bench.dump("dump.layers=[2]", *overrides)
    assert not forward_passes
    assert (stale_bench.cache / "manifest.json").read_bytes() == before
    assert stale_bench.dump("dump.layers=[2]").runs == ()


@pytest.fixture(scope="module")
def stale_bench(tmp_path_factory: pytest.TempPathFactory, review_recipe: Path, tiny_teachers: Path) -> Workbench:
    bench = Workbench(review_recipe, tiny_teachers, tmp_path_factory.mktemp("stale") / "cache")
    bench.dump("dump.layers=[2]")
    return bench


@pytest.mark.parametrize("what", ["weights", "head", "tokenizer"])
def test_a_changed_teacher_is_refused_and_named(
    bench: Workbench, tiny_teachers: Path, tmp_path: Path, what: str
) -> None:
    bench.dump("dump.layers=[2]")
    others = tmp_path / "others"
    families = {"bert": "bert", "roberta": "roberta", "xlm": "xlm-roberta"}
    if what == "tokenizer":
        families["roberta"] = "bert"
    make_teachers(others, families, widths={"roberta": 24}, own_heads=["xlm"], seed=5)  # type: ignore[arg-type]
    if what == "head":
        for name in families:
            shutil.rmtree(others / name)
            shutil.copytree(tiny_teachers / name, others / name)
        _record_fingerprints(others)
    with pytest.raises(
        MismatchError, match=f"holds teacher '(bert|roberta)' with .*{what}" if what != "tokenizer" else "roberta|bert"
    ):
        Workbench(bench.recipe_file, others, bench.cache).dump("dump.layers=[2]")


def _record_fingerprints(directory: Path) -> None:
    """teachers.json after a change of files that co-finetuning would have recorded."""
    from dataclasses import replace

    from kdcache.teachers.bundle import _load_parts, read_bundle, write_bundle
    from kdcache.teachers.fingerprints import fingerprint_teacher

    bundle = read_bundle(directory)
    records = {
        name: replace(record, fingerprints=fingerprint_teacher(*_load_parts(directory, name, record, bundle)))
        for name, record in bundle.teachers.items()
    }
    write_bundle(directory, replace(bundle, teachers=records))


def test_weights_that_changed_behind_the_record_s_back_are_refused(bench: Workbench, tiny_teachers: Path) -> None:
    bench.dump()
    shutil.copy(tiny_teachers / "shared_head.safetensors", bench.teachers / "shared_head.safetensors")
    file = bench.teachers / "bert" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(MismatchError, match=r"bert.* is not the one that teachers\.json describes: weights"):
        bench.dump()


def test_other_labels_or_columns_than_the_teachers_know_are_refused(bench: Workbench) -> None:
    with pytest.raises(MismatchError, match=r"the labels of the data are 1, 0; those of the teachers in .* are 0, 1"):
        bench.dump('data.labels=["1", "0"]')
    assert not bench.cache.exists()


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["dump.layers=[2, 9]"], "teacher 'bert' has no layer 9"),
        (["dump.dim=64"], r"dump\.dim is 64, but layer 2 of teacher 'bert' is only 16 wide"),
        (["data.max_length=512"], "teacher 'bert' takes at most 80 tokens, max_length is 512"),
    ],
)
def test_what_a_teacher_cannot_do_is_said_before_anything_is_written(
    bench: Workbench, overrides: list[str], named: str
) -> None:
    with pytest.raises(ModelError, match=named):
        bench.dump(*overrides)
    assert not bench.cache.exists()


def test_a_teacher_that_is_not_there(bench: Workbench) -> None:
    with pytest.raises(ModelError, match="no teacher 'bort'"):
        bench.dump("teachers.roberta.name=bort")
