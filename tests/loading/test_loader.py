"""Cached batches: right values for every row, in the promised order, for any process and after any interruption."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from kdcache.cache.ids import Examples, text_id
from kdcache.data.encoding import encode, pad
from kdcache.errors import DamageError, MismatchError, RecipeError
from kdcache.loading import prefetch
from kdcache.loading.alignment import align, student_tokens
from kdcache.loading.assembly import PaddedBatches, StepRows, student_inputs
from kdcache.loading.cached import CachedBatches, loader
from kdcache.loading.choice import TargetChoice
from kdcache.loading.data import StudentData
from kdcache.loading.examples import join_examples, stored_logits
from kdcache.loading.order import BatchSettings
from kdcache.loading.parts import DecodedPart
from kdcache.loading.prefetch import Balance
from kdcache.loading.without_targets import PlainBatches
from kdcache.testing import tiny
from kdcache.testing.memory_cache import MemoryCache, MemoryTeacher, Text, truth, truth_logits
from kdcache.training.processes import ALONE, Processes

if TYPE_CHECKING:
    from kdcache.loading.targets import Batch

MAP = {"bert": (2, 4), "roberta": (4, 4), "xlm": (2, 4)}


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCACHE_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {
        "student": tiny.wordpiece_tokenizer(),
        "roberta": tiny.bytelevel_tokenizer(),
        "xlm": tiny.sentencepiece_tokenizer(),
    }


def texts(count: int) -> list[Text]:
    odd = [("crème brûlée naïve 👍🏽",), ("日本語 の film",), ("  spaces   good  ",), ("good " * 70,)]
    return [*odd, *((text,) for text, _ in tiny.reviews(count - len(odd), seed=3))]


def cache_of(
    tokenizers: dict[str, Any], count: int = 60, part_size: int = 8, dtype: str = "float32", **more: Any
) -> MemoryCache:
    """Train repeats one text; two of its texts are transfer texts without a label."""
    known = texts(count)
    parts = [known[start : start + part_size] for start in range(0, count, part_size)]
    teachers = {
        "bert": MemoryTeacher(tokenizers["student"], dtype=dtype),
        "roberta": MemoryTeacher(tokenizers["roberta"], dtype=dtype),
        "xlm": MemoryTeacher(tokenizers["xlm"], max_length=40, dtype=dtype),
    }
    rows = [(text, index % 2) for index, text in enumerate(known[:-2])]
    splits = {"train": [*rows, rows[0]], "transfer": [(text, -1) for text in known[-2:]]}
    return MemoryCache(parts, teachers, splits, **more)


def batches_of(cache: MemoryCache, tokenizers: dict[str, Any], **options: Any) -> CachedBatches:
    names = tuple(options.pop("teachers", cache.teachers))
    layer_map = options.pop("layer_map", MAP)
    choice = TargetChoice(
        names, {name: layer_map[name] for name in names if name in layer_map}, logits=options.pop("logits", True)
    )
    kept = {name: options.pop(name) for name in ("memory_bytes", "background", "texts") if name in options}
    splits = ("train", "transfer") if options.pop("with_transfer", True) and "transfer" in cache.splits else ("train",)
    settings = BatchSettings(**{"batch_size": 7, "max_length": 64, "window": 3, "seed": 5, **options})
    source = CachedBatches(cache, tokenizers["student"], settings, choice, splits=splits, **kept)  # type: ignore[arg-type]
    source._balance = Threaded()
    return source


class Threaded(Balance):
    """A thread makes all batches, whatever the consumer does."""

    def __init__(self) -> None:
        super().__init__()
        self.in_thread = True

    def add(self, _working: float, _making: float) -> bool:
        return self.in_thread


def expected_row(
    cache: MemoryCache, tokenizers: dict[str, Any], teacher: str, layer: int, text: Text
) -> dict[int, np.ndarray]:
    """Student token -> target, from the definition."""
    spec = cache.memory_teachers[teacher]
    student = student_tokens(encode(tokenizers["student"], [text], 64))
    encoded = student_tokens(encode(spec.tokenizer, [text], spec.max_length))
    values = truth(teacher, layer, text, int(encoded.offsets[-1]), spec.layers[layer])
    aligned = align(student, encoded)
    assert aligned.first is not None and aligned.src is not None and aligned.weight is not None
    return {
        token: aligned.weight[low:high] @ values[aligned.src[low:high]]
        for token, (low, high) in enumerate(zip(aligned.first[:-1], aligned.first[1:], strict=True))
        if high > low
    }


def check_batch(batch: Batch, cache: MemoryCache, tokenizers: dict[str, Any], tolerance: float = 1e-5) -> None:
    by_id = {text_id(text): text for part in cache.part_texts for text in part}
    rows = [by_id[one.tobytes()] for one in batch.text_ids]
    encoded = encode(tokenizers["student"], rows, 64)
    inputs = pad(encoded, np.arange(len(rows)), tokenizers["student"].pad_token_id)
    assert batch.inputs.keys() == inputs.keys()
    assert all(torch.equal(batch.inputs[name], tensor) for name, tensor in inputs.items())
    length = inputs["input_ids"].shape[1]
    assert batch.targets is not None
    for index, teacher in enumerate(batch.targets.teachers):
        wanted = np.stack([truth_logits(teacher, text, 2) for text in rows])
        assert np.array_equal(batch.targets.logits[index].numpy(), wanted)
        for student_layer, layer in enumerate(MAP[teacher], start=1):
            hidden = batch.targets.hidden[index, student_layer]
            places = {
                row * length + token: value
                for row, text in enumerate(rows)
                for token, value in expected_row(cache, tokenizers, teacher, layer, text).items()
            }
            assert hidden.positions.tolist() == sorted(places)
            np.testing.assert_allclose(
                hidden.aligned().numpy(), np.stack([places[p] for p in sorted(places)]), atol=tolerance
            )


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 5e-3), ("int8", 3e-2)])
def test_every_row_has_its_own_targets(tokenizers: dict[str, Any], dtype: str, tolerance: float) -> None:
    cache = cache_of(tokenizers, dtype=dtype)
    source = batches_of(cache, tokenizers)
    seen = []
    for batch in source.batches(0):
        check_batch(batch, cache, tokenizers, tolerance)
        assert batch.targets is not None
        assert batch.targets.hidden[1, 1].values.dtype == getattr(torch, dtype), "targets travel as they were stored"
        seen += [one.tobytes() for one in batch.text_ids]
    rows = [*cache.split_rows["train"], *cache.split_rows["transfer"]]
    assert sorted(seen) == sorted(text_id(text) for text, _ in rows)
    assert source.coverage["bert"] == 1.0
    assert 0.5 < source.coverage["xlm"] < 1.0, "truncated at 40 tokens, it cannot cover the long text"


def test_labels_follow_their_texts(tokenizers: dict[str, Any]) -> None:
    cache = cache_of(tokenizers)
    labels = {text_id(text): label for rows in cache.split_rows.values() for text, label in rows}
    for batch in batches_of(cache, tokenizers).batches(1):
        assert batch.labels.tolist() == [labels[one.tobytes()] for one in batch.text_ids]


def same(one: Batch, other: Batch) -> bool:
    assert one.targets is not None and other.targets is not None
    pairs = [(one.labels, other.labels), (one.targets.logits, other.targets.logits)]
    pairs += [(tensor, other.inputs[name]) for name, tensor in one.inputs.items()]
    for key, hidden in one.targets.hidden.items():
        pairs += [
            (hidden.aligned(), other.targets.hidden[key].aligned()),
            (hidden.positions, other.targets.hidden[key].positions),
        ]
    return np.array_equal(one.text_ids, other.text_ids) and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("window", [3, "all"])
def test_an_epoch_continues_in_the_middle(tokenizers: dict[str, Any], window: Any) -> None:
    cache = cache_of(tokenizers)
    whole = list(batches_of(cache, tokenizers, window=window).batches(2))
    for first in (0, 1, 4, len(whole) - 1, len(whole)):
        rest = list(batches_of(cache, tokenizers, window=window).batches(2, first))
        assert len(rest) == len(whole) - first
        assert all(same(a, b) for a, b in zip(rest, whole[first:], strict=True))


def test_one_source_serves_many_epochs_without_reading_again(tokenizers: dict[str, Any]) -> None:
    cache = cache_of(tokenizers)
    source = batches_of(cache, tokenizers)
    first = [batch.text_ids.tobytes() for batch in source.batches(0)]
    assert set(cache.reads.values()) == {1}
    second = [batch.text_ids.tobytes() for batch in source.batches(1)]
    assert set(cache.reads.values()) == {1}, "with memory for all parts, none is read twice"
    assert first != second
    assert [batch.text_ids.tobytes() for batch in source.batches(0)] == first


def test_memory_decides_what_stays_but_not_what_comes(tokenizers: dict[str, Any]) -> None:
    cache = cache_of(tokenizers)
    poor, rich = batches_of(cache, tokenizers, memory_bytes=1), batches_of(cache, tokenizers)
    for epoch in range(2):
        assert all(same(a, b) for a, b in zip(poor.batches(epoch), rich.batches(epoch), strict=True))
    assert max(cache.reads.values()) == 3, "each part once per epoch for the poor one, once for the rich one"


def test_rows_of_a_batch_come_longest_first(tokenizers: dict[str, Any]) -> None:
    for batch in batches_of(cache_of(tokenizers), tokenizers).batches(0):
        lengths = batch.inputs["attention_mask"].sum(dim=1)
        assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)


def test_pairs_of_texts_keep_their_token_types(tokenizers: dict[str, Any]) -> None:
    encoded = encode(tokenizers["student"], [("a good film", "bad"), ("x", "a film " * 9), ("one", "two three")], 64)
    part = DecodedPart(encoded, ())
    rows = StepRows([part, part], np.array([1, 0, 1]), np.array([2, 0, 1]), np.array([0, 2, 3]))
    inputs = student_inputs(PaddedBatches(rows), 0)
    for found, wanted in zip(inputs, (pad(encoded, np.array([2, 0]), 0), pad(encoded, np.array([1]), 0)), strict=True):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
        assert found["token_type_ids"].any()


@pytest.mark.parametrize("world", [2, 3])
def test_processes_partition_every_step(tokenizers: dict[str, Any], world: int) -> None:
    cache = cache_of(tokenizers)
    alone = batches_of(cache, tokenizers)
    ranks = [batches_of(cache, tokenizers, rank=rank, world=world) for rank in range(world)]
    assert len({source.steps_per_epoch for source in ranks}) == 1
    for whole, *shares in zip(alone.batches(0), *(source.batches(0) for source in ranks), strict=False):
        assert sorted(row.tobytes() for share in shares for row in share.text_ids) == sorted(map(bytes, whole.text_ids))
        for share in shares:
            check_batch(share, cache, tokenizers)


def test_a_last_step_too_short_for_all_processes_is_left_out(tokenizers: dict[str, Any]) -> None:
    cache = cache_of(tokenizers)
    rows = sum(map(len, cache.split_rows.values()))
    source = batches_of(cache, tokenizers, batch_size=rows - 1, rank=1, world=2)
    assert source.steps_per_epoch == 1
    assert len(list(source.batches(0))) == 1
    with pytest.raises(RecipeError, match="cannot be shared"):
        batches_of(cache, tokenizers, batch_size=1, rank=1, world=2)


@pytest.mark.parametrize("first_step", [0, 1])
def test_a_training_keeps_it_and_those_without_a_row_get_no_batch(tokenizers: dict[str, Any], first_step: int) -> None:
    cache = cache_of(tokenizers)
    rows = sum(map(len, cache.split_rows.values()))
    settings = {"batch_size": rows - 1, "world": 3, "every_row": True}
    ranks = [batches_of(cache, tokenizers, rank=rank, **settings) for rank in range(3)]
    assert [source.steps_per_epoch for source in ranks] == [2, 2, 2]
    found = [list(source.batches(0, first_step)) for source in ranks]
    assert [len(batches) for batches in found] == [1 - first_step, 1 - first_step, 2 - first_step]
    assert len(found[2][-1]) == 1


def test_batches_without_targets_are_shared_too(tokenizers: dict[str, Any]) -> None:
    lines = texts(11)
    ids = np.stack([np.frombuffer(text_id(text), np.uint8) for text in lines])
    split = Examples(ids, np.arange(11, dtype=np.int64) % 2, None)
    data = StudentData({text_id(text): text for text in lines}, {"train": split}, ("0", "1"), ("sentence",), "recipe")

    def rows(rank: int, world: int) -> list[list[bytes]]:
        settings = BatchSettings(5, 64, rank=rank, world=world, every_row=True)
        source = PlainBatches(data, tokenizers["student"], settings)
        assert source.steps_per_epoch == 3
        source.count_together(ALONE)
        return [list(map(bytes, batch.text_ids)) for batch in source.batches(0)]

    alone, first, second = rows(0, 1), rows(0, 2), rows(1, 2)
    assert [len(step) for step in first] == [2, 2]
    assert [len(step) for step in second] == [3, 3, 1]
    shared = [[*mine, *theirs] for mine, theirs in zip([*first, []], second, strict=True)]
    assert [sorted(step) for step in shared] == [sorted(step) for step in alone]


def test_what_was_read_is_counted_over_all_processes(tokenizers: dict[str, Any]) -> None:
    """A process that read no part at all has the coverage of all."""
    cache = cache_of(tokenizers)
    alone, idle = batches_of(cache, tokenizers), batches_of(cache, tokenizers)
    list(alone.batches(0))

    class Both(Processes):
        def gathered(self, value: Any) -> list[Any]:
            return [value, (alone._covered, alone._truncated)]

    assert idle.truncated is None
    idle.count_together(Both(1, 2))
    assert (idle.coverage, idle.truncated) == (alone.coverage, alone.truncated)


def test_only_what_is_asked_for_is_read(tokenizers: dict[str, Any]) -> None:
    cache = cache_of(tokenizers)
    batch, *_ = batches_of(cache, tokenizers, teachers=["xlm", "bert"], layer_map={}).batches(0)
    assert batch.targets is not None and batch.targets.teachers == ("xlm", "bert") and not batch.targets.hidden
    assert {what for what, _ in cache.reads} == {"texts", "outputs xlm", "outputs bert"}
    cache.reads.clear()
    batch, *_ = batches_of(cache, tokenizers, teachers=["roberta"], logits=False).batches(0)
    assert batch.targets is not None and batch.targets.logits.shape == (1, 7, 0)
    assert {what for what, _ in cache.reads} == {"tokens roberta", "hidden roberta 4"}, (
        "texts are encoded once and kept"
    )
    cache.reads.clear()
    assert all(batch.targets is None for batch in batches_of(cache, tokenizers, teachers=[], layer_map={}).batches(0))
    assert not cache.reads


def test_start_up_and_the_first_batch_touch_one_part(tokenizers: dict[str, Any]) -> None:
    touched: list[int] = []
    first: list[int] = []
    released = threading.Event()

    def on_read(_what: str, part: int) -> None:
        touched.append(part)
        if part not in first:
            assert released.wait(60)

    cache = cache_of(tokenizers, count=200, part_size=50, on_read=on_read)
    source = batches_of(cache, tokenizers, window=2)
    assert not touched, "nothing is scanned at start"
    first += {int(source.epochs.parts[row]) for row in source.epochs.rows(source.epochs.order(0), 0)}
    assert len(first) == 1
    batches = source.batches(0)
    next(batches)
    released.set()
    batches.close()  # type: ignore[attr-defined]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("kdcache")]


@pytest.mark.parametrize(
    "error", [DamageError("file x is damaged", "repair"), KeyboardInterrupt(), RuntimeError("any")]
)
def test_what_a_thread_raises_reaches_the_consumer(tokenizers: dict[str, Any], error: BaseException) -> None:
    def on_read(what: str, part: int) -> None:
        if what == "hidden bert 2" and part == 3:
            raise error

    cache = cache_of(tokenizers, on_read=on_read)
    with pytest.raises(type(error)) as raised:
        list(batches_of(cache, tokenizers).batches(0))
    assert raised.value is error
    assert not threads()


def test_no_thread_outlives_its_consumer(tokenizers: dict[str, Any]) -> None:
    cache = cache_of(tokenizers)
    source = batches_of(cache, tokenizers)
    for _ in source.batches(0):
        break
    assert not threads()
    held = source.batches(0)
    next(held)
    assert "kdcache-batches" in threads()
    held.close()  # type: ignore[attr-defined]
    assert not threads()
    with pytest.raises(ZeroDivisionError):
        for _ in source.batches(0):
            raise ZeroDivisionError
    assert not threads()
    list(source.batches(0))
    assert not threads()


def test_batches_made_in_the_callers_thread_are_the_same(tokenizers: dict[str, Any]) -> None:
    cache = cache_of(tokenizers)
    there, here = batches_of(cache, tokenizers), batches_of(cache, tokenizers, background=False)
    for epoch in range(2):
        assert all(same(a, b) for a, b in zip(there.batches(epoch), here.batches(epoch, 0), strict=True))
    held = here.batches(2)
    next(held)
    assert "kdcache-batches" not in threads()
    held.close()  # type: ignore[attr-defined]
    assert not threads()


def test_an_epoch_is_made_where_the_one_before_ended(
    tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = batches_of(cache_of(tokenizers), tokenizers)
    whole = [list(source.batches(epoch)) for epoch in range(2)]
    source._balance.in_thread = False

    def refuse(*_: Any) -> Any:
        raise AssertionError("a thread was started for a consumer that does nothing")

    monkeypatch.setattr(prefetch, "in_background", refuse)
    for epoch, batches in enumerate(whole):
        assert all(same(one, other) for one, other in zip(source.batches(epoch), batches, strict=True))


@pytest.mark.parametrize("in_thread", [True, False])
def test_a_process_that_ends_with_an_open_iterator_ends_in_peace(in_thread: bool) -> None:
    import subprocess
    import sys

    code = (
        "import itertools\n"
        "import torch\n"  # keeps this program's names until other modules are emptied
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from kdcache.loading.prefetch import Balance, closed_at_exit, where_it_pays\n"
        "def items():\n"
        "    pool = ThreadPoolExecutor(2)\n"
        "    try:\n"
        "        yield from (pool.submit(int, n).result() for n in itertools.count())\n"
        "    finally:\n"
        "        pool.shutdown(wait=True, cancel_futures=True)\n"
        "balance = Balance()\n"
        f"balance.in_thread = {in_thread}\n"
        "held = closed_at_exit(where_it_pays(items, balance))\n"
        "print(next(held))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_timing_of_the_threads_changes_nothing(tokenizers: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    quick = cache_of(tokenizers)
    slow = cache_of(tokenizers, on_read=lambda _what, _part: time.sleep(float(rng.random()) * 0.004))
    pairs: Iterator[tuple[Batch, Batch]] = zip(
        batches_of(quick, tokenizers).batches(0), batches_of(slow, tokenizers).batches(0), strict=True
    )
    assert all(same(one, other) for one, other in pairs)


def test_texts_that_the_cache_lacks(tokenizers: dict[str, Any]) -> None:
    cache = cache_of(tokenizers)
    cache.split_rows = {"train": [*cache.split_rows["train"], (("never seen",), 1), (("nor this",), 0)]}
    cache.splits = ("train",)
    with pytest.raises(
        MismatchError, match=f"lacks 2 of the 61 texts of 'train'; the first, {text_id(('never seen',)).hex()}"
    ):
        batches_of(cache, tokenizers)
    source = batches_of(cache, tokenizers, missing="skip")
    assert source.skipped == 2
    assert sum(len(batch) for batch in source.batches(0)) == 59
    cache.split_rows = {"train": [(("never seen",), 1)]}
    with pytest.raises(MismatchError, match="holds the text of none of the 1 examples of 'train'"):
        batches_of(cache, tokenizers, missing="skip")


def test_texts_that_are_there_with_logits_only(tokenizers: dict[str, Any]) -> None:
    cache = cache_of(tokenizers, scopes=["full"] * 7 + ["logits"])
    with pytest.raises(MismatchError, match="stored with logits only, without hidden states"):
        batches_of(cache, tokenizers)
    assert batches_of(cache, tokenizers, layer_map={}).skipped == 0
    assert batches_of(cache, tokenizers, missing="skip").skipped == 2, "transfer texts may have logits only"


def test_names_that_the_cache_does_not_know(tokenizers: dict[str, Any]) -> None:
    cache = cache_of(tokenizers)
    with pytest.raises(MismatchError, match="no teacher 'gpt'; it has: bert, roberta, xlm"):
        batches_of(cache, tokenizers, teachers=["gpt"])
    with pytest.raises(MismatchError, match="no hidden states of layer 3 of teacher 'xlm'; it has layers: 2, 4"):
        batches_of(cache, tokenizers, layer_map={"xlm": (3, 4)})
    with pytest.raises(RecipeError, match="bert: 1, roberta: 2"):
        batches_of(cache, tokenizers, layer_map={"bert": (2,), "roberta": (2, 4)})
    with pytest.raises(RecipeError, match="window is 0"):
        batches_of(cache, tokenizers, window=0)


def test_a_cache_without_texts_takes_them_from_the_caller(tokenizers: dict[str, Any]) -> None:
    cache = cache_of(tokenizers, has_text=False)
    with pytest.raises(MismatchError, match="came without its texts"):
        batches_of(cache, tokenizers)
    given = {text_id(text): text for part in cache.part_texts for text in part}
    for batch in batches_of(cache, tokenizers, texts=given).batches(0):
        check_batch(batch, cache, tokenizers)
    assert not any(what == "texts" for what, _ in cache.reads)
    one = given.popitem()[0].hex()
    with pytest.raises(MismatchError, match=f"1 of the 61 examples have a text that is not among .* first is {one}"):
        batches_of(cache, tokenizers, texts=given)


def test_texts_of_rows_that_are_not_learned_from_may_be_absent(tokenizers: dict[str, Any]) -> None:
    """And what stands in for them is not kept: the next student, who has all texts, must not meet it."""
    cache = cache_of(tokenizers, has_text=False)
    given = {text_id(text): text for part in cache.part_texts for text in part}
    train = {text_id(text): text for text, _ in cache.split_rows["train"]}
    for texts, with_transfer in ((train, False), (given, True)):
        for batch in batches_of(cache, tokenizers, texts=texts, with_transfer=with_transfer).batches(0):
            check_batch(batch, cache, tokenizers)


def test_logits_of_a_split_come_in_its_order(tokenizers: dict[str, Any]) -> None:
    cache = cache_of(tokenizers)
    table = batches_of(cache, tokenizers, teachers=["xlm", "bert"]).logits_for("train")
    rows = cache.split_rows["train"]
    for index, teacher in enumerate(("xlm", "bert")):
        assert np.array_equal(table[index].numpy(), np.stack([truth_logits(teacher, text, 2) for text, _ in rows]))
    assert stored_logits(cache, (), join_examples(cache, cache.examples, ("train",))).shape == (0, len(rows), 2)  # type: ignore[arg-type]


def test_the_public_helper_chooses_what_is_usual(tokenizers: dict[str, Any]) -> None:
    cache = cache_of(tokenizers)
    source = loader(cache, tokenizers["student"], student_layers=2, batch_size=5)  # type: ignore[arg-type]
    assert source.layer_map == {"bert": (2, 4), "roberta": (2, 4), "xlm": (2, 4)}
    assert source.target_dim("xlm", 4) == 5 and source.target_variance("xlm", 4) == 4.5
    batch = next(source.batches(0))
    assert batch.inputs["input_ids"].shape[0] == 5 and batch.targets is not None and len(batch.targets.hidden) == 6
    assert not loader(cache, tokenizers["student"]).layer_map  # type: ignore[arg-type]
