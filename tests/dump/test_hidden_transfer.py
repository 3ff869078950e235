"""``dump.hidden_transfer``: some transfer texts with hidden states, the others with logits only."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from kdcache.cache.ids import id_list
from kdcache.cache.reader import Cache, open_cache
from kdcache.cache.verify import verify
from kdcache.data.task import load_task
from kdcache.dump.audit import choose_rows
from kdcache.dump.dry_run import estimate_dump
from kdcache.dump.plan import plan_storage
from kdcache.dump.specs import scopes
from kdcache.errors import RecipeError
from kdcache.progress import SilentProgress
from tests.dump.conftest import Workbench

Passes = Counter[tuple[str, tuple[int, ...]]]
TRAIN, EVALUATION, TRANSFER = 96, 64, 24


@pytest.fixture
def one(bench: Workbench) -> Workbench:
    """One teacher is enough here."""
    return bench.only("bert")


def in_parts(cache: Cache, scope: str) -> set[bytes]:
    return {text for part in cache.parts if part.scope == scope for text in id_list(cache.text_ids(part.name))}


def transfer_of(bench: Workbench) -> list[bytes]:
    return id_list(load_task(bench.recipe().data).splits["transfer"].text_ids)


@pytest.mark.parametrize(("asked", "stored"), [(0, 0), (7, 7), (24, 24), (1000, 24), (None, 24)])
def test_so_many_transfer_texts_get_hidden_states(one: Workbench, asked: int | None, stored: int) -> None:
    task = load_task(one.recipe().data)
    found = scopes(task, asked)
    assert (len(found.full), len(found.evaluation), len(found.transfer)) == (TRAIN + stored, EVALUATION, 24 - stored)
    assert list(found.full)[TRAIN:] == transfer_of(one)[:stored], "the first ones in the seeded order"
    assert not set(found.full) & set(found.logits_only)
    assert len(found.trained_on) == TRAIN + TRANSFER


def test_the_others_run_without_any_hidden_state(one: Workbench, forward_passes: Passes) -> None:
    report = one.dump("dump.hidden_transfer=8", "dump.sample_texts=32")
    assert forward_passes == {("bert", (2, 4)): 32 + TRAIN + 8, ("bert", ()): EVALUATION + 16}
    assert report.texts == TRAIN + EVALUATION + TRANSFER
    cache = open_cache(one.cache)
    assert verify(one.cache) == []
    scopes_ = [part.scope for part in cache.parts]
    assert scopes_ == ["full"] * 4 + ["logits"] * 3, "transfer texts do not share parts with validation and test"
    transfer = set(transfer_of(one))
    assert [len(transfer & set(id_list(cache.text_ids(part.name)))) for part in cache.parts[4:]] == [0, 0, 16]
    assert (
        f"{TRAIN + 8} with hidden states, {EVALUATION + 16} with logits alone" in (one.cache / "README.md").read_text()
    )
    for part in cache.parts:
        assert np.isfinite(cache.outputs("bert", part.name).logits).all()
    before = report.identity
    forward_passes.clear()
    assert one.dump("dump.hidden_transfer=8", "dump.sample_texts=32").identity == before and not forward_passes


def test_the_logits_are_those_of_a_dump_with_hidden_states(one: Workbench, tmp_path: Path) -> None:
    """The same texts run in other parts, so in other batches: only rounding differs."""
    one.dump("dump.hidden_transfer=0")
    one.dump(cache=tmp_path / "all")
    some, every = open_cache(one.cache), open_cache(tmp_path / "all")
    ids = load_task(one.recipe().data).splits["transfer"].text_ids
    tables = []
    for cache in (some, every):
        parts, rows = cache.locate(ids)
        names = [cache.parts[part].name for part in parts.tolist()]
        tables.append(
            np.stack([cache.outputs("bert", name).logits[row] for name, row in zip(names, rows.tolist(), strict=True)])
        )
    np.testing.assert_allclose(*tables, atol=1e-5)


def test_a_larger_number_adds_texts_and_runs_only_them(one: Workbench, forward_passes: Passes) -> None:
    one.dump("dump.hidden_transfer=4")
    first = in_parts(open_cache(one.cache), "full")
    forward_passes.clear()
    one.dump("dump.hidden_transfer=10")
    assert forward_passes == {("bert", (2, 4)): 6}
    cache = open_cache(one.cache)
    assert in_parts(cache, "full") == first | set(transfer_of(one)[:10])
    assert len(in_parts(cache, "full")) == TRAIN + 10
    parts, _ = cache.locate(load_task(one.recipe().data).splits["transfer"].text_ids[:10])
    assert {cache.parts[part].scope for part in parts.tolist()} == {"full"}
    forward_passes.clear()
    one.dump("dump.hidden_transfer=4")  # nothing is taken away
    assert not forward_passes
    assert len(in_parts(open_cache(one.cache), "full")) == TRAIN + 10


def test_new_transfer_texts_do_not_change_which_have_hidden_states(
    one: Workbench, tmp_path: Path, forward_passes: Passes
) -> None:
    lines = Path(one.recipe().data.transfer[0]).read_text().splitlines()
    (tmp_path / "half.tsv").write_text("\n".join(lines[:13]) + "\n")
    half = f'data.transfer=["{tmp_path}/half.tsv"]'
    one.dump(half, "dump.hidden_transfer=6")
    before = in_parts(open_cache(one.cache), "full")
    forward_passes.clear()
    one.dump("dump.hidden_transfer=6")
    assert forward_passes == {("bert", ()): 12}
    assert in_parts(open_cache(one.cache), "full") == before


def test_a_later_teacher_stores_the_same_texts(bench: Workbench, forward_passes: Passes) -> None:
    bench.only("bert").dump("dump.hidden_transfer=8", "dump.sample_texts=32")
    forward_passes.clear()
    bench.only("bert", "xlm").dump("dump.hidden_transfer=8", "dump.sample_texts=32")
    assert forward_passes == {("xlm", (2, 4)): 32 + TRAIN + 8, ("xlm", ()): EVALUATION + 16}
    assert verify(bench.cache) == []


def test_an_interrupted_dump_ends_with_the_same_cache(
    one: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = one.dump("dump.hidden_transfer=8", cache=tmp_path / "whole")
    from kdcache.cache.texts import TextPlan

    append, calls = TextPlan._append, 0

    def dies(self: TextPlan, scope: object, ids: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        append(self, scope, ids)  # type: ignore[arg-type]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TextPlan, "_append", dies)
        one.dump("dump.hidden_transfer=8")
    assert one.dump("dump.hidden_transfer=8").identity == whole.identity


@pytest.mark.parametrize("part", range(7))
def test_damaged_ids_come_back(one: Workbench, part: int) -> None:
    identity = one.dump("dump.hidden_transfer=8").identity
    for kind in ("texts", "text"):
        path = one.cache / kind / f"part-{part:05}.arrow"
        path.write_bytes(path.read_bytes()[:-9])
    assert one.dump("dump.hidden_transfer=8", repair=True).identity == identity
    assert verify(one.cache) == []


def test_dry_run_and_plan_count_both_kinds(one: Workbench) -> None:
    recipe = one.recipe("dump.hidden_transfer=8")
    found = estimate_dump(recipe, one.teachers, one.cache, progress=SilentProgress())
    assert (found.full_texts, found.logits_texts) == (TRAIN + 8, EVALUATION + 16)
    plan = plan_storage(recipe, one.teachers, progress=SilentProgress())
    assert (plan.texts, plan.logits_texts) == (TRAIN + 8, EVALUATION + 16)
    assert plan.truncated["bert"].texts == TRAIN + TRANSFER
    assert f"{TRAIN + 8} texts with hidden states, {EVALUATION + 16} with logits only" in plan.lines()[0]
    one.dump("dump.hidden_transfer=8")
    cache = open_cache(one.cache)
    sizes = {
        layer: sum(
            cache.hidden("bert", part.name, layer).values.nbytes + cache.hidden("bert", part.name, layer).scales.nbytes
            for part in cache.parts
            if part.scope == "full"
        )
        for layer in (2, 4)
    }
    assert dict(found.teachers[0].hidden) == sizes
    asked = {one.layer: one.bytes[one.asked] for one in plan.layers}
    assert asked == sizes
    more = estimate_dump(one.recipe("dump.hidden_transfer=11"), one.teachers, one.cache, progress=SilentProgress())
    assert more.teachers[0].texts == 3
    assert json.loads(json.dumps(more.as_dict()))["texts"] == {
        "full": TRAIN + 11, "logits_only": EVALUATION + 13, "in_cache": TRAIN + EVALUATION + TRANSFER - 3,
    }  # fmt: skip


def test_an_audit_looks_at_parts_with_hidden_states(one: Workbench) -> None:
    one.dump("dump.hidden_transfer=0", "dump.part_size=4")  # 24 full parts, 22 with logits only
    cache = open_cache(one.cache)
    for seed in range(8):
        chosen = choose_rows(cache, 40, seed)
        assert len(chosen) == 8 and sum(part.full for part in chosen) >= 4


def test_a_negative_number_is_refused(one: Workbench) -> None:
    with pytest.raises(RecipeError, match=r"dump\.hidden_transfer is -1; 0 or more was expected"):
        one.recipe("dump.hidden_transfer=-1")
