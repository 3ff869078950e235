"""Extending, refusing what is stale, one writer at a time, and what may not be written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kdcache.cache.ids import id_array
from kdcache.cache.reader import open_cache
from kdcache.cache.spec import Settings, TaskSpec, TeacherSpec
from kdcache.cache.tokens import Outputs
from kdcache.cache.verify import unreferenced, verify
from kdcache.cache.writer import CacheWriter, open_writer
from kdcache.codecs.base import HiddenBlock, LayerSpec
from kdcache.errors import DamageError, KdcacheError, LockedError, MismatchError, NonFiniteError
from kdcache.testing.caches import (
    LAYERS,
    SETTINGS,
    TASK,
    Plan,
    dump,
    dump_teacher,
    made_basis,
    made_hidden,
    made_outputs,
    made_plan,
    made_teacher,
    made_texts,
    made_tokens,
    tokenizer_json,
)  # fmt: skip

Copy = Callable[[Path], Path]
MORE_LAYERS = {**LAYERS, 3: LayerSpec("random", 2, "float16")}


def test_nothing_is_missing_after_a_dump(pristine: Path, plan: Plan, copy_of: Copy) -> None:
    path = copy_of(pristine)
    with open_writer(path, TASK, SETTINGS) as writer:
        writer.add_texts(plan.train, plan.test)
        assert [writer.declare_teacher(spec, tokenizer_json(spec.name)) for spec in plan.teachers] == [(), ()]
        assert len(writer.parts) == 5


def test_a_new_layer_alone_is_missing(pristine: Path, plan: Plan, copy_of: Copy) -> None:
    path = copy_of(pristine)
    with open_writer(path, TASK, SETTINGS) as writer:
        writer.add_texts(plan.train, plan.test)
        missing = writer.declare_teacher(made_teacher("bert", MORE_LAYERS), tokenizer_json("bert"))
        assert [(task.part.name, task.outputs, task.layers) for task in missing] == [
            (f"part-0000{index}", False, (3,)) for index in range(3)
        ]


def test_a_cache_that_grew_is_the_one_that_was_made_at_once(tmp_path: Path, pristine: Path) -> None:
    dump(tmp_path / "c", made_plan(teachers=["roberta"]))
    dump(tmp_path / "c", replace(made_plan(teachers=["bert"]), teachers=(made_teacher("bert", {4: LAYERS[4]}),)))
    dump(tmp_path / "c", made_plan(teachers=["bert"]))
    assert open_cache(tmp_path / "c").identity == open_cache(pristine).identity
    assert verify(tmp_path / "c") == []


def test_readers_of_the_old_manifest_stay_right_while_a_cache_grows(pristine: Path, plan: Plan, copy_of: Copy) -> None:
    path = copy_of(pristine)
    old = open_cache(path)
    grown = Plan(plan.train | made_texts(3, "more"), plan.test, (*plan.teachers, made_teacher("electra")))
    dump(path, grown)
    assert len(old.examples("train").labels) == 10
    assert len(open_cache(path).examples("train").labels) == 13
    for part in old.parts:
        old.outputs("bert", part.name)
    assert unreferenced(path) == sorted(
        info.file for info in old.manifest.contents.splits.values() if "train" in info.file
    )
    assert verify(path) == []


def test_changed_labels_need_no_teacher(pristine: Path, plan: Plan, copy_of: Copy) -> None:
    path = copy_of(pristine)
    with open_writer(path, TASK, SETTINGS) as writer:
        writer.add_texts(plan.train, plan.test)
        writer.write_examples(
            "train", id_array(plan.train), np.ones(10, np.int64), [str(number) for number in range(10)]
        )
        writer.publish({})
    cache = open_cache(path)
    assert cache.examples("train").labels.tolist() == [1] * 10
    assert cache.examples("train").groups == tuple("0123456789")
    assert cache.identity != open_cache(pristine).identity


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (
            {"fingerprints": replace(made_teacher().fingerprints, weights="0" * 64)},
            r"weights \(sha256\) '32987c4b7a9f'",
        ),
        ({"fingerprints": replace(made_teacher().fingerprints, config="0" * 64)}, "config"),
        ({"fingerprints": replace(made_teacher().fingerprints, head="0" * 64)}, "head"),
        ({"fingerprints": replace(made_teacher().fingerprints, tokenizer="0" * 64)}, "tokenizer"),
        ({"head": "own"}, "head 'shared'; now it is 'own'"),
        ({"max_length": 32}, "max_length 16; now it is 32"),
        ({"truncation": "only_first"}, "truncation"),
        ({"backend": "onnxruntime"}, "backend 'torch'; now it is 'onnxruntime'"),
        ({"precision": "bf16"}, "precision"),
        ({"pooled": None}, "pooled 5; now it is None"),
        ({"sample_texts": 9}, "sample_texts 8; now it is 9"),
        ({"layers": {2: LayerSpec("pca", 4, "int8")}}, "dim of layer 2 3; now it is 4"),
        ({"layers": {2: LayerSpec("pca", 3, "float16")}}, "dtype of layer 2 'int8'; now it is 'float16'"),
        ({"layers": {4: LayerSpec("random", 6, "float32")}}, "projection of layer 4 'none'; now it is 'random'"),
    ],
)
def test_a_stale_teacher_is_refused_and_the_field_named(
    pristine: Path, plan: Plan, copy_of: Copy, change: dict[str, object], names: str
) -> None:
    path = copy_of(pristine)
    spec = made_teacher(**{"layers": LAYERS, **change})
    with open_writer(path, TASK, SETTINGS) as writer:
        writer.add_texts(plan.train, plan.test)
        with pytest.raises(MismatchError, match=names) as caught:
            writer.declare_teacher(spec, tokenizer_json("bert"))
    assert caught.value.exit_code == 4
    assert "another name" in caught.value.hint
    assert verify(path) == []


@pytest.mark.parametrize(
    ("task", "settings", "names"),
    [
        (
            TaskSpec(("sentence",), ("bad", "fair")),
            SETTINGS,
            r"label_names \['bad', 'good'\]; now it is \['bad', 'fair'\]",
        ),
        (TaskSpec(("text",), ("bad", "good")), SETTINGS, "text_columns"),
        (TASK, Settings(4, 4), "seed 3; now it is 4"),
        (TASK, Settings(3, 8), "part_size 4; now it is 8"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_task_or_setting_is_refused(
    tmp_path: Path, plan: Plan, task: TaskSpec, settings: Settings, names: str, finished: bool
) -> None:
    with open_writer(tmp_path / "c", TASK, SETTINGS) as writer:
        writer.add_texts(plan.train, plan.test)
        if finished:
            writer.publish({})
    with pytest.raises(MismatchError, match=names), open_writer(tmp_path / "c", task, settings):
        pass


def test_texts_stored_or_not_is_refused_when_it_changes(pristine: Path, copy_of: Copy) -> None:
    with (
        pytest.raises(MismatchError, match="with its texts"),
        open_writer(copy_of(pristine), TASK, SETTINGS, store_text=False),
    ):
        pass


def test_another_tokenizer_file_is_refused(pristine: Path, plan: Plan, copy_of: Copy) -> None:
    with (
        open_writer(copy_of(pristine), TASK, SETTINGS) as writer,
        pytest.raises(MismatchError, match=r"another tokenizer\.json"),
    ):
        writer.declare_teacher(plan.teachers[0], "{}")


def test_other_tokens_for_a_new_layer_are_refused(pristine: Path, copy_of: Copy) -> None:
    spec = made_teacher("bert", MORE_LAYERS)
    with open_writer(copy_of(pristine), TASK, SETTINGS) as writer:
        task = writer.declare_teacher(spec, tokenizer_json("bert"))[0]
        texts = [("other",)] * len(task.part.text_ids)
        with pytest.raises(MismatchError, match="other tokens"):
            writer.write_part(
                "bert", task.part, outputs=None, tokens=made_tokens(texts), hidden={3: made_hidden(spec, 3, texts)}
            )


def test_another_basis_is_refused(pristine: Path, plan: Plan, copy_of: Copy) -> None:
    with open_writer(copy_of(pristine), TASK, SETTINGS) as writer:
        writer.declare_teacher(plan.teachers[0], tokenizer_json("bert"))
        basis = made_basis(plan.teachers[0], 2)
        writer.write_bases("bert", {2: basis})
        with pytest.raises(MismatchError, match="another basis"):
            writer.write_bases("bert", {2: replace(basis, target_variance=9.0)})


def test_new_texts_need_every_teacher_and_layer(pristine: Path, plan: Plan, copy_of: Copy) -> None:
    path = copy_of(pristine)
    more = Plan(plan.train | made_texts(2, "more"), plan.test, plan.teachers[:1])
    with pytest.raises(MismatchError, match="layer 2 of teacher 'bert', which the new texts would lack"):
        dump(path, replace(more, teachers=(made_teacher("bert", {4: LAYERS[4]}),)))
    with pytest.raises(MismatchError, match="holds teacher 'roberta', which lacks the texts"):
        dump(path, more)
    assert open_cache(path).identity == open_cache(pristine).identity
    dump(path, replace(more, teachers=plan.teachers))
    assert verify(path) == []


def test_what_another_run_began_and_left_is_not_published(tmp_path: Path) -> None:
    plan = made_plan(5, 2, ["bert"])
    undisturbed = dump(tmp_path / "undisturbed", plan)
    with open_writer(tmp_path / "c", TASK, SETTINGS) as writer:
        writer.add_texts(plan.train, plan.test)
        spec = made_teacher("electra")
        task = writer.declare_teacher(spec, tokenizer_json("electra"))[0]
        outputs, texts = made_outputs(spec, task.part.text_ids), writer.texts_of(task.part)
        writer.write_part("electra", task.part, outputs=outputs, tokens=made_tokens(texts), hidden={})
    assert dump(tmp_path / "c", plan).identity == undisturbed.identity
    assert verify(tmp_path / "c") == []
    with open_writer(tmp_path / "c", TASK, SETTINGS) as writer:  # whoever asks for it goes on
        left = writer.declare_teacher(spec, tokenizer_json("electra"))
        assert [one.part.name for one in left if not one.outputs] == [task.part.name]
        with pytest.raises(MismatchError, match="holds teacher 'electra' with max_length 16; now it is 8") as caught:
            writer.declare_teacher(made_teacher("electra", max_length=8), tokenizer_json("electra"))
        shutil.rmtree(caught.value.hint.split("'")[1])  # as the hint says
    with open_writer(tmp_path / "c", TASK, SETTINGS) as writer:
        short = made_teacher("electra", max_length=8)
        assert all(one.outputs for one in writer.declare_teacher(short, tokenizer_json("electra")))


@pytest.mark.parametrize(("texts", "kept"), [(5, False), (9, True)])
def test_a_basis_is_kept_where_a_dump_of_all_texts_would_have_the_same(tmp_path: Path, texts: int, kept: bool) -> None:
    """It is fitted on a sample of eight texts, or on all of fewer."""
    plan, spec = made_plan(texts, 2, ["bert"]), made_teacher("electra")
    dump(tmp_path / "c", plan)
    with open_writer(tmp_path / "c", TASK, SETTINGS) as writer:
        task = writer.declare_teacher(spec, tokenizer_json("electra"))[0]
        writer.write_bases("electra", {layer: made_basis(spec, layer) for layer in spec.layers})
        tokens = made_tokens(writer.texts_of(task.part))
        writer.write_part(
            "electra", task.part, outputs=made_outputs(spec, task.part.text_ids), tokens=tokens, hidden={}
        )
    dump(tmp_path / "c", replace(plan, train=plan.train | made_texts(3, "more")))
    with open_writer(tmp_path / "c", TASK, SETTINGS) as writer:
        writer.declare_teacher(spec, tokenizer_json("electra"))
        assert bool(writer.layers_with_basis("electra")) is kept


def test_a_layer_that_another_run_began_is_left_out(pristine: Path, plan: Plan, copy_of: Copy) -> None:
    path = copy_of(pristine)
    spec = made_teacher("bert", MORE_LAYERS)
    with open_writer(path, TASK, SETTINGS) as writer:
        task = writer.declare_teacher(spec, tokenizer_json("bert"))[0]
        writer.write_bases("bert", {3: made_basis(spec, 3)})
        texts = writer.texts_of(task.part)
        writer.write_part(
            "bert", task.part, outputs=None, tokens=made_tokens(texts), hidden={3: made_hidden(spec, 3, texts)}
        )
    with open_writer(path, TASK, SETTINGS) as writer:
        assert writer.declare_teacher(plan.teachers[0], tokenizer_json("bert")) == ()
        assert writer.publish({}).identity == open_cache(pristine).identity
    assert all("layer-03" in file for file in unreferenced(path))
    assert verify(path) == []
    with open_writer(path, TASK, SETTINGS) as writer:
        left = writer.declare_teacher(spec, tokenizer_json("bert"))
        assert left and task.part.name not in {one.part.name for one in left}
        other = made_teacher("bert", {**MORE_LAYERS, 3: replace(MORE_LAYERS[3], dtype="float32")})
        with pytest.raises(MismatchError, match="dtype of layer 3") as caught:
            writer.declare_teacher(other, tokenizer_json("bert"))
        assert f"delete '{path / '.dump/teachers/bert'}'" in caught.value.hint


def test_an_unfinished_teacher_is_not_published(tmp_path: Path, plan: Plan) -> None:
    with open_writer(tmp_path / "c", TASK, SETTINGS) as writer:
        writer.add_texts(plan.train, plan.test)
        writer.declare_teacher(plan.teachers[0], tokenizer_json("bert"))
        with pytest.raises(KdcacheError, match="teacher 'bert' is not complete"):
            writer.publish({})
    with pytest.raises(DamageError, match="its dump was not finished"):
        open_cache(tmp_path / "c")


def test_two_writers_in_one_process_and_in_two(tmp_path: Path) -> None:
    path = tmp_path / "c"
    code = (
        "import sys; from kdcache.testing.caches import *; from kdcache.cache.writer import open_writer\n"
        "with open_writer(sys.argv[1], TASK, SETTINGS): print('held', flush=True); sys.stdin.read()"
    )
    with (
        open_writer(path, TASK, SETTINGS),
        pytest.raises(LockedError, match="is being written by process"),
        open_writer(path, TASK, SETTINGS),
    ):
        pass
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=f"process {other.pid} on "), open_writer(path, TASK, SETTINGS):
            pass
        other.kill()
    with open_writer(path, TASK, SETTINGS):  # the lock died with its owner
        pass


def test_a_directory_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(MismatchError, match=r"holds 'thesis\.tex' and no cache"), open_writer(tmp_path, TASK, SETTINGS):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(MismatchError, match="is a file"), open_writer(tmp_path / "thesis.tex", TASK, SETTINGS):
        pass


def test_a_cache_that_lost_its_manifest_is_damaged(pristine: Path, copy_of: Copy) -> None:
    path = copy_of(pristine)
    (path / "manifest.json").unlink()
    with pytest.raises(DamageError, match=r"lost its manifest\.json"), open_writer(path, TASK, SETTINGS):
        pass
    with pytest.raises(DamageError, match=r"has no manifest\.json"):
        open_cache(path)
    assert [damage.file for damage in verify(path)] == ["manifest.json"]


def with_first_part(path: Path, plan: Plan, write: Callable[[CacheWriter, TeacherSpec, object, list], None]) -> None:
    with open_writer(path, TASK, SETTINGS) as writer:
        writer.add_texts(plan.train, plan.test)
        spec = plan.teachers[0]
        task = writer.declare_teacher(spec, tokenizer_json("bert"))[0]
        write(writer, spec, task.part, writer.texts_of(task.part))


@pytest.mark.parametrize("where", ["logits", "pooled", "layer 4", "layer 2"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_with_text_and_layer(
    tmp_path: Path, plan: Plan, where: str, value: float
) -> None:
    def write(writer: CacheWriter, spec: TeacherSpec, part: object, texts: list) -> None:
        tokens = made_tokens(texts)
        outputs = made_outputs(spec, part.text_ids)
        hidden = {layer: made_hidden(spec, layer, texts) for layer in spec.layers}
        row = int(tokens.offsets[2])  # the first token of the third text
        {
            "logits": outputs.logits[2],
            "pooled": outputs.pooled[2],
            "layer 4": hidden[4].values[row],
            "layer 2": hidden[2].scales[row : row + 1],
        }[where][-1] = value
        with pytest.raises(
            NonFiniteError,
            match=f"'bert' gave a value that is not finite in {where} for text {bytes(part.text_ids[2]).hex()}",
        ):
            writer.write_part("bert", part, outputs=outputs, tokens=tokens, hidden=hidden)

    with_first_part(tmp_path / "c", plan, write)


def test_shapes_that_do_not_fit_are_refused(tmp_path: Path, plan: Plan) -> None:
    def write(writer: CacheWriter, spec: TeacherSpec, part: object, texts: list) -> None:
        tokens, good = made_tokens(texts), made_outputs(spec, part.text_ids)
        hidden = made_hidden(spec, 2, texts)
        low = HiddenBlock(
            np.where(hidden.values == hidden.values.max(), -128, hidden.values).astype(np.int8), hidden.scales
        )
        wrong: list[dict[str, object]] = [
            {"outputs": Outputs(good.logits[:-1], good.pooled)},
            {"outputs": Outputs(good.logits.astype(np.float64), good.pooled)},
            {"outputs": Outputs(good.logits, None)},
            {"tokens": replace(tokens, offsets=tokens.offsets[:-1])},
            {"tokens": replace(tokens, roles=tokens.roles + np.int8(4))},
            {"tokens": replace(tokens, starts=tokens.starts.astype(np.int64))},
            {"tokens": None, "hidden": {2: hidden}},
            {"hidden": {2: HiddenBlock(hidden.values[:-1], hidden.scales)}},
            {"hidden": {2: HiddenBlock(hidden.values, None)}},
            {"hidden": {2: low}},
            {"hidden": {4: hidden}},
        ]
        for change in wrong:
            with pytest.raises(ValueError, match="part-00000"):
                writer.write_part("bert", part, **{"outputs": None, "tokens": tokens, "hidden": {}, **change})

    with_first_part(tmp_path / "c", plan, write)


def test_a_text_must_be_the_one_of_its_id(tmp_path: Path) -> None:
    with (
        open_writer(tmp_path / "c", TASK, SETTINGS) as writer,
        pytest.raises(ValueError, match="its id is the hash of"),
    ):
        writer.add_texts({b"0" * 16: ("something",)}, {})


def test_texts_that_are_not_stored_must_be_given(tmp_path: Path, plan: Plan) -> None:
    dump(tmp_path / "c", replace(plan, store_text=False))
    with open_writer(tmp_path / "c", TASK, SETTINGS, store_text=False) as writer:
        with pytest.raises(MismatchError, match="does not store its texts"):
            writer.texts_of(writer.parts[0])
        writer.add_texts(plan.train, plan.test)
        assert all(writer.texts_of(part) for part in writer.parts)


def test_teachers_that_differ_in_case_only_are_refused(pristine: Path, copy_of: Copy) -> None:
    with (
        open_writer(copy_of(pristine), TASK, SETTINGS) as writer,
        pytest.raises(MismatchError, match="differs in case only"),
    ):
        dump_teacher(writer, made_teacher("BERT"))
