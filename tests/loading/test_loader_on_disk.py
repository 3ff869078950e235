"""The loader on a real cache.

What was dumped comes out, whatever the student's tokenizer, and damage stops it in time.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.cache.ids import id_list
from kdcache.cache.reader import open_cache
from kdcache.codecs.base import HiddenBlock
from kdcache.data.encoding import encode, pad
from kdcache.distill.setup import prepare
from kdcache.errors import DamageError, MismatchError
from kdcache.loading import prefetch
from kdcache.loading.alignment import align, student_tokens
from kdcache.loading.cached import CachedBatches, loader
from kdcache.loading.choice import TargetChoice
from kdcache.loading.live import LiveBatches
from kdcache.loading.order import BatchSettings
from kdcache.loading.prefetch import READ_AHEAD
from kdcache.teachers.bundle import load_teacher
from kdcache.testing import tiny
from tests.conftest import TinyRun
from tests.distill.test_textfree import Listening


def test_targets_equal_a_direct_forward_of_each_row(tiny_run: TinyRun) -> None:
    """Row by row, without padding, through the plain definition.

    What the whole way from dump to batch must amount to.
    """
    cache = open_cache(tiny_run.exact)
    texts = {
        one: text
        for part in cache.parts
        for one, text in zip(id_list(cache.text_ids(part.name)), cache.texts(part.name), strict=True)
    }
    teachers = {name: load_teacher(tiny_run.teachers, name) for name in cache.teachers}
    tokenizer = tiny.wordpiece_tokenizer(lowercase=False, vocab_size=260)  # none of the teachers'
    source = loader(cache, tokenizer, student_layers=2, batch_size=5, max_length=24)
    batch = next(source.batches(0))
    assert batch.targets is not None
    length = batch.inputs["input_ids"].shape[1]
    for row, one in enumerate(id_list(batch.text_ids)):
        student = student_tokens(encode(tokenizer, [texts[one]], 24))
        for index, (name, teacher) in enumerate(teachers.items()):
            encoded = encode(teacher.tokenizer, [texts[one]], teacher.max_length)
            with torch.no_grad():
                forward = teacher.model(pad(encoded, [0], 0), hidden_states=True)
            torch.testing.assert_close(batch.targets.logits[index, row], forward.logits[0], rtol=1e-4, atol=1e-5)
            aligned = align(student, student_tokens(encoded))
            assert aligned.first is not None and aligned.src is not None and aligned.weight is not None
            for layer, own in enumerate(source.layer_map[name], start=1):
                states, hidden = forward.hidden_states[own][0].numpy(), batch.targets.hidden[index, layer]
                mine = (hidden.positions // length == row).numpy()
                wanted = [
                    aligned.weight[a:b] @ states[aligned.src[a:b]]
                    for a, b in zip(aligned.first[:-1], aligned.first[1:], strict=True)
                    if b > a
                ]
                np.testing.assert_allclose(hidden.aligned()[mine].numpy(), np.stack(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["exact", "cache"])
@pytest.mark.parametrize("tokenizer", [tiny.wordpiece_tokenizer, tiny.sentencepiece_tokenizer])
def test_live_batches_are_the_cached_ones(tiny_run: TinyRun, kind: str, tokenizer: Callable[[], Any]) -> None:
    cache = open_cache(getattr(tiny_run, kind))
    teachers = [load_teacher(tiny_run.teachers, name) for name in ("xlm", "bert")]
    settings = BatchSettings(batch_size=7, max_length=20, window=2, rank=1, world=2)
    choice = TargetChoice(("xlm", "bert"), {"bert": (2, 4), "xlm": (4, 2)})
    cached = CachedBatches(cache, tokenizer(), settings, choice, splits=("train", "transfer"))
    live = LiveBatches(cache, tokenizer(), settings, choice, teachers, splits=("train", "transfer"))
    assert (cached.teachers, cached.layer_map, cached.steps_per_epoch) == (
        live.teachers,
        live.layer_map,
        live.steps_per_epoch,
    )
    for one, other in zip(cached.batches(1, 2), live.batches(1, 2), strict=True):
        assert np.array_equal(one.text_ids, other.text_ids) and torch.equal(one.labels, other.labels)
        assert all(torch.equal(tensor, other.inputs[name]) for name, tensor in one.inputs.items())
        assert one.targets is not None and other.targets is not None
        torch.testing.assert_close(one.targets.logits, other.targets.logits, rtol=1e-4, atol=1e-5)
        for key, hidden in one.targets.hidden.items():
            theirs = other.targets.hidden[key]
            assert torch.equal(hidden.positions, theirs.positions)
            close = {"rtol": 1e-4, "atol": 1e-5} if kind == "exact" else {"rtol": 0.0, "atol": 0.05}
            torch.testing.assert_close(hidden.aligned(), theirs.aligned(), **close)
            assert hidden.values.shape[1] == live.target_dim(*layer_of(live, key))
    assert cached.coverage.keys() == live.coverage.keys() == {"bert", "xlm"}
    for split in ("validation", "test"):
        torch.testing.assert_close(cached.logits_for(split), live.logits_for(split), rtol=1e-4, atol=1e-5)


def layer_of(source: LiveBatches, key: tuple[int, int]) -> tuple[str, int]:
    name = source.teachers[key[0]]
    return name, source.layer_map[name][key[1] - 1]


def test_live_targets_may_be_saved_for_backward(tiny_run: TinyRun) -> None:
    """The teacher's side of W may be the target itself, and autograd keeps no tensors of inference mode."""
    source = LiveBatches(
        open_cache(tiny_run.exact),
        tiny.wordpiece_tokenizer(),
        BatchSettings(4, 32),
        TargetChoice(("bert",), {"bert": (2, 4)}),
        [load_teacher(tiny_run.teachers, "bert")],
    )
    targets = next(source.batches(0)).targets
    assert targets is not None
    matrix = torch.zeros(3, 16, requires_grad=True)
    (
        torch.nn.functional.linear(targets.hidden[0, 1].aligned(), matrix).sum() + (targets.logits * matrix.sum()).sum()
    ).backward()
    assert matrix.grad is not None


def test_other_teachers_are_refused_live(tiny_run: TinyRun) -> None:
    teacher = load_teacher(tiny_run.teachers, "bert")
    teacher.fingerprints = load_teacher(tiny_run.teachers, "roberta").fingerprints
    with pytest.raises(MismatchError, match=r"'bert' is not the one of cache .* weights"):
        LiveBatches(
            open_cache(tiny_run.exact),
            tiny.wordpiece_tokenizer(),
            BatchSettings(4, 32),
            TargetChoice(("bert",)),
            [teacher],
        )


def epoch(cache: Path) -> int:
    source = loader(cache, tiny.sentencepiece_tokenizer(), student_layers=2, batch_size=8, window=1)
    return sum(len(batch) for batch in source.batches(0))


FILES = [
    "teachers/bert/hidden/*/layer-04/c/0/0",
    "teachers/bert/hidden/*/layer-04-scale/c/0",
    "teachers/xlm/tokens/*",
    "teachers/roberta/outputs/*",
    "texts/*",
    "data/train-*",
]


@pytest.mark.parametrize("pattern", FILES)
@pytest.mark.parametrize("kind", ["flipped", "truncated", "empty", "deleted", "swapped"])
def test_damage_is_found_before_a_row_of_it_is_used(
    tiny_run: TinyRun, copied: Callable[[Path], Path], pattern: str, kind: str
) -> None:
    cache = copied(tiny_run.cache)
    files = sorted(file for file in cache.glob(pattern) if file.is_file() and "logits" not in str(file))
    full = {part.name for part in open_cache(cache).parts if part.scope == "full"}
    files = [file for file in files if "data" in pattern or any(name in str(file) for name in full)]
    victim, other = files[0], files[-1] if len(files) > 1 else cache / "teachers/bert/tokenizer/tokenizer.json"
    data = victim.read_bytes()
    if kind == "flipped":
        victim.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 16]) + data[len(data) // 2 + 1 :])
    elif kind == "truncated":
        victim.write_bytes(data[:-1])
    elif kind == "empty":
        victim.write_bytes(b"")
    elif kind == "deleted":
        victim.unlink()
    else:
        shutil.copyfile(other, cache / "spare")
        victim.replace(other)
        (cache / "spare").rename(victim)
    damaged = [victim, other] if kind == "swapped" else [victim]
    with pytest.raises(DamageError, match="|".join(re.escape(str(path.relative_to(cache))) for path in damaged)):
        epoch(cache)


@pytest.mark.parametrize("window", [1, "all"])
def test_a_window_that_will_not_fit_is_told_of(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: Any
) -> None:
    cache = open_cache(tiny_run.cache)
    source = loader(cache, tiny.wordpiece_tokenizer(), student_layers=2, window=window)
    parts = np.unique(source.epochs.parts).tolist()
    stored = [
        sum(
            block.values.nbytes + (0 if block.scales is None else block.scales.nbytes)
            for name, layers in source.layer_map.items()
            for block in (cache.hidden(name, cache.parts[part].name, layer) for layer in set(layers))
        )
        for part in parts
    ]
    held = sum(sorted(stored)[-(1 + READ_AHEAD) :]) if window == 1 else sum(stored)
    assert source.window_bytes == held
    for memory, told in ((held, True), (3 * held, False)):
        monkeypatch.setattr("os.sysconf", lambda name, memory=memory: 1 if name == "SC_PAGE_SIZE" else memory)
        progress = Listening()
        prepare(tiny_run.recipe(f"distill.window={json.dumps(window)}"), tiny_run.cache, tmp_path, None, progress)
        assert any("a smaller distill.window needs less" in note for note in progress.notes) == told


def test_few_labelled_rows_are_told_of(tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def notes(*overrides: str) -> list[str]:
        progress = Listening()
        prepare(tiny_run.recipe(*overrides), tiny_run.cache, tmp_path, None, progress)
        return [note for note in progress.notes if "have a label" in note]

    assert not notes()  # 96 of 120
    monkeypatch.setattr("kdcache.distill.setup._FEW_LABELS", 0.9)
    (note,) = notes()
    assert note.startswith("96 of 120 rows have a label") and 'distill.task_mean = "rows"' in note
    for others in ('distill.task_mean="rows"', "distill.weights.task=0", "data.transfer=[]"):
        assert not notes(others)


def test_the_layers_of_a_teacher_are_read_side_by_side(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(tiny_run.cache)
    plain, together = cache.hidden, threading.Barrier(2)

    def both(*which: Any) -> HiddenBlock:
        together.wait(30)  # an error where no other layer is being read
        return plain(*which)

    monkeypatch.setattr(cache, "hidden", both)
    monkeypatch.setattr(prefetch, "READERS", 1)  # part by part
    source = loader(cache, tiny.wordpiece_tokenizer(), student_layers=2, memory_bytes=0)
    assert sum(len(batch) for batch in source.batches(0)) == 96 + 24


def test_layers_are_read_by_a_thread_per_core(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, threads in ((1, 2), (4, 4), (64, 8)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert prefetch.layer_readers() == threads


def test_a_sound_copy_is_read_whole(tiny_run: TinyRun, copied: Callable[[Path], Path]) -> None:
    assert epoch(copied(tiny_run.cache)) == 96 + 24


def test_a_window_that_nobody_chose_is_part_of_the_training(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Its identity and its results name the number, as those of 0.1.0 do."""
    recipe = tiny_run.recipe()
    recipe = recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"window": None})})
    training = prepare(recipe, tiny_run.cache, tmp_path, None, Listening())
    assert training.recipe.distill.window == 8
    assert isinstance(training.source, CachedBatches)
    assert training.source.epochs.settings.window == 8
