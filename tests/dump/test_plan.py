"""The plan on tiny teachers against what a dump of the same forms then stores and keeps."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.cache.reader import open_cache
from kdcache.codecs.base import LayerSpec
from kdcache.dump.fidelity import Fidelity, measure
from kdcache.dump.plan import LayerCandidates, StoragePlan, plan_storage, recommend
from kdcache.errors import DataError, RecipeError
from kdcache.progress import SilentProgress
from tests.dump.conftest import Workbench


def _plan(bench: Workbench, *overrides: str, budget: int | None = None) -> StoragePlan:
    return plan_storage(bench.recipe(*overrides), bench.teachers, budget=budget, progress=SilentProgress())


@pytest.fixture(scope="module")
def planned(
    tmp_path_factory: pytest.TempPathFactory, review_recipe: object, tiny_teachers: object
) -> tuple[Workbench, StoragePlan]:
    bench = Workbench(review_recipe, tiny_teachers, tmp_path_factory.mktemp("plan") / "cache")  # type: ignore[arg-type]
    return bench, _plan(bench, "dump.layers=[2, 4]", budget=200_000)


def test_no_teacher_runs_twice(bench: Workbench, forward_passes: Counter[tuple[str, tuple[int, ...]]]) -> None:
    _plan(bench, "dump.layers=[2, 4]", "dump.sample_texts=60")
    assert forward_passes == {(name, (2, 4)): 60 + 120 // 4 for name in ("bert", "roberta", "xlm")}


def test_bytes_are_those_of_the_dump_and_fidelity_falls_with_them(planned: tuple[Workbench, StoragePlan]) -> None:
    bench, plan = planned
    assert [(one.teacher, one.layer) for one in plan.layers] == [
        (name, layer) for name in ("bert", "roberta", "xlm") for layer in (2, 4)
    ]
    bench.dump("dump.layers=[2, 4]")
    cache = open_cache(bench.cache)
    for one in plan.layers:
        forms = {form.form: (form, size) for form, size in zip(one.formats, one.bytes, strict=True)}
        form, size = forms["pca 8 int8"]
        assert one.formats[one.asked] == form
        blocks = [cache.hidden(one.teacher, part.name, one.layer) for part in cache.parts if part.scope == "full"]
        assert size == sum(
            block.values.nbytes + (block.scales.nbytes if block.scales is not None else 0) for block in blocks
        )
        exact = next(form for name, (form, _) in forms.items() if name.endswith("float32"))
        assert exact.explained == pytest.approx(1.0, abs=1e-6)
        assert exact.relative_error < 1e-6
        coded = [form for name, (form, _) in forms.items() if name.startswith("trellis")]
        assert sorted(coded, key=lambda form: form.row_bytes) == sorted(coded, key=lambda form: form.explained)
        for form in one.formats:
            head = one.layer == 4 and one.teacher != "xlm"  # xlm is a whole classifier of its own
            assert (form.kl is not None) == head
        if exact.kl is not None:
            assert abs(exact.kl) < 1e-6
            assert min(form.kl for form in coded if form.kl is not None) > exact.kl


def test_what_is_recommended_fits_and_is_what_the_settings_ask_for(planned: tuple[Workbench, StoragePlan]) -> None:
    bench, plan = planned
    assert plan.recommendation is not None
    assert plan.recommendation.bytes <= 200_000
    asked = _plan(bench, "dump.layers=[2, 4]", *plan.recommendation.settings())
    for one in asked.layers:
        assert one.formats[one.asked].form == plan.recommendation.formats[one.teacher, one.layer].form


def test_the_document_is_json_and_the_lines_are_for_people(planned: tuple[Workbench, StoragePlan]) -> None:
    document = json.loads(json.dumps(planned[1].as_dict()))
    assert document["texts"] == 120
    assert document["minutes"].keys() == {"bert", "roberta", "xlm"}
    assert document["recommendation"]["settings"]
    assert "[dump]" in planned[1].recommendation.toml()  # type: ignore[union-attr]


def test_a_budget_that_nothing_fits_has_no_recommendation(bench: Workbench) -> None:
    assert _plan(bench.only("bert"), "dump.layers=[4]", budget=1000).recommendation is None


def test_targets_per_text_are_planned_as_such(bench: Workbench) -> None:
    plan = _plan(bench.only("bert"), "dump.layers=[4]", "dump.tokens=first")
    assert plan.layers[0].bytes[plan.layers[0].asked] == 120 * (8 + 4)
    assert all(form.kl is None for form in plan.layers[0].formats)


def test_what_cannot_be_planned_is_refused(bench: Workbench) -> None:
    with pytest.raises(RecipeError, match="stores no hidden states"):
        _plan(bench, "dump.layers=none")
    small = bench.recipe_file.with_name("small.tsv")
    small.write_text("".join((bench.recipe_file.parent / "train.tsv").read_text().splitlines(True)[:5]))
    with pytest.raises(DataError, match="needs 8 at least"):
        _plan(bench, f'data.train="{small}"', "data.transfer=[]", "dump.layers=[2]")


def test_measures_of_a_known_error() -> None:
    true = torch.tensor([[3.0, 4.0], [-3.0, -4.0]])
    found = measure(LayerSpec("none", 2, "float16"), true * 0.9, true)
    assert found.explained == pytest.approx(0.99)
    assert found.relative_error == pytest.approx(0.1)
    assert found.cosine == pytest.approx(1.0)
    assert found.row_bytes == 4


SPEC = LayerSpec("none", 4, "int8")


def _choice(layer: int, kept: list[tuple[int, float]]) -> LayerCandidates:
    forms = [Fidelity(replace(SPEC, dim=size), size, explained, 0.0, 0.0) for size, explained in kept]
    return LayerCandidates("t", layer, forms, [size for size, _ in kept])


@given(
    st.lists(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1)), min_size=1, max_size=5), min_size=1, max_size=3),
    st.integers(0, 160),
)
@settings(deadline=None, max_examples=200)
def test_a_recommendation_never_exceeds_its_budget_and_is_near_the_best(
    layers: list[list[tuple[int, float]]], budget: int
) -> None:
    import itertools

    choices = [_choice(number, kept) for number, kept in enumerate(layers)]
    found = recommend(choices, budget, 0)
    mixtures = [mixture for mixture in itertools.product(*layers) if sum(size for size, _ in mixture) <= budget]
    assert (found is None) == (not mixtures)
    if found is not None:
        assert found.bytes <= budget
        best = max(sum(kept for _, kept in mixture) for mixture in mixtures)
        total = found.explained * len(layers)
        largest_step = max(max(kept for _, kept in one) - min(kept for _, kept in one) for one in layers)
        assert best - largest_step - 1e-9 <= total <= best + 1e-9


def test_without_a_budget_nine_tenths_are_kept_where_they_can_be() -> None:
    found = recommend([_choice(0, [(1, 0.5), (4, 0.91), (9, 1.0)]), _choice(1, [(1, 0.3), (2, 0.4)])], None, 7)
    assert found is not None
    assert [form.row_bytes for form in found.formats.values()] == [4, 2]
    assert found.bytes == 13
