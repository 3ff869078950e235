"""The distill stage on a tiny task: what it writes, that it repeats, what it refuses and what it leaves free."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcache.distill.setup import Training
from kdcache.distill.stage import DistillResult, DistillTask, distill
from kdcache.dump.stage import dump_teachers
from kdcache.errors import DamageError, KdcacheError, MismatchError, ModelError, NonFiniteError, RecipeError
from kdcache.methods.base import Feature, Method
from kdcache.methods.parts.hidden_states import HiddenStates
from kdcache.methods.parts.layer_map import LayerMapping
from kdcache.methods.parts.task_loss import TaskLoss
from kdcache.progress import SilentProgress
from kdcache.recipe import Recipe
from kdcache.report.table import data_notes
from kdcache.teachers.bundle import load_teacher
from kdcache.testing.teachers import make_teachers
from kdcache.testing.tiny import make_model, reviews, write_reviews
from tests.conftest import TinyRun

Copy = Callable[[Path], Path]


def run(recipe: Recipe, cache: Path | None, root: Path, **options: Any) -> DistillResult:
    return distill(recipe, cache, root, progress=SilentProgress(), **options)


def weights(result: DistillResult) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(result.student / "model.safetensors")


def same(first: DistillResult, second: DistillResult) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines(root: Path, event: str = "steps") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert {line.pop("stage") for line in found} == {"distill"}
    return [line for line in found if line.pop("event") == event]


@pytest.fixture(scope="module")
def mt_bert(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[DistillResult, Path]:
    root = tmp_path_factory.mktemp("mt-bert")
    return run(tiny_run.recipe(), tiny_run.cache, root), root


def test_results_say_what_the_student_scores(mt_bert: tuple[DistillResult, Path], tiny_run: TinyRun) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    result, root = mt_bert
    model = AutoModelForSequenceClassification.from_pretrained(result.student).eval()
    tokenizer = AutoTokenizer.from_pretrained(result.student)
    rows = [line.split("\t") for line in Path(tiny_run.recipe().data.test or "").read_text().splitlines()[1:]]
    right = 0
    for text, label in rows:
        with torch.no_grad():
            logits = model(**tokenizer(text, truncation=True, max_length=32, return_tensors="pt")).logits[0]
        right += model.config.id2label[int(logits.argmax())] == label
    assert result.scores["test"]["accuracy"] == right / len(rows)
    assert json.loads((root / "results.json").read_text()) == result.results


def test_results_hold_teachers_costs_and_scales(mt_bert: tuple[DistillResult, Path]) -> None:
    results = mt_bert[0].results
    assert list(results["teachers"]) == ["bert", "roberta", "xlm"]
    for entry in [*results["teachers"].values(), results["teachers_mean"]]:
        assert set(entry["scores"]) == {"validation", "test"}
        assert set(entry["scores"]["test"]) == {"accuracy", "macro_f1", "matthews", "loss"}
    assert results["student"]["parameters"] == sum(tensor.numel() for tensor in weights(mt_bert[0]).values())
    assert results["student"]["latency_ms"] > 0
    assert results["teachers"]["roberta"]["parameters"] > results["student"]["parameters"]
    assert results["rows"] == {"train": 96, "validation": 32, "test": 32, "transfer": 24}
    assert results["coverage"]["bert"] == 1.0
    assert all(0.5 < share <= 1.0 for share in results["coverage"].values())
    assert results["layer_map"] == {name: [2, 4] for name in ("bert", "roberta", "xlm")}
    assert {"task", "soft", "hidden", "hidden/xlm/2", "weight/bert"} <= {row["term"] for row in results["scales"]}
    assert (results["skipped_rows"], results["targets"], results["best_epoch"]) == (0, "cache", 1)


def test_every_term_of_every_step_is_logged(mt_bert: tuple[DistillResult, Path]) -> None:
    steps = lines(mt_bert[1])
    assert [line["step"] for line in steps] == list(range(1, 9))  # 96 + 24 rows in batches of 16
    pairs = {f"hidden/{name}/{layer}" for name in ("bert", "roberta", "xlm") for layer in (1, 2)}
    soft = {f"{kind}/{name}" for kind in ("soft", "weight") for name in ("bert", "roberta", "xlm")}
    for line in steps:
        assert {"task", "soft", "hidden", "loss", "learning_rate"} | pairs | soft <= set(line)
        expected = line["task"] + line["soft"] + 0.1 * line["hidden"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
    assert "validation/accuracy" in lines(mt_bert[1], "epoch")[0]


def test_student_directory_has_card_and_record(mt_bert: tuple[DistillResult, Path], tiny_run: TinyRun) -> None:
    from kdcache.students.score import evaluate_model

    result, root = mt_bert
    assert "mt-bert" in (result.student / "README.md").read_text()
    found = evaluate_model(result.student, str(tiny_run.recipe().data.test))
    assert {name: value for name, value in found.items() if name != "rows"} == pytest.approx(
        result.scores["test"], abs=1e-5
    )
    assert not (root / "checkpoints" / "distill").exists()


def test_the_same_recipe_gives_the_same_weights(
    mt_bert: tuple[DistillResult, Path], tiny_run: TinyRun, tmp_path: Path
) -> None:
    assert same(run(tiny_run.recipe(), tiny_run.cache, tmp_path / "again"), mt_bert[0])
    assert not same(run(tiny_run.recipe("distill.seed=1"), tiny_run.cache, tmp_path / "other"), mt_bert[0])


def test_micro_batches_change_rounding_only(tiny_run: TinyRun, tmp_path: Path) -> None:
    run(tiny_run.recipe("distill.accumulation=4", "distill.dropout=0.0"), tiny_run.cache, tmp_path / "four")
    run(tiny_run.recipe("distill.dropout=0.0"), tiny_run.cache, tmp_path / "one")
    for four, one in zip(lines(tmp_path / "four"), lines(tmp_path / "one"), strict=True):
        assert four == pytest.approx(one, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    "overrides", [["distill.paper=true"], ["distill.method=kd"], ['student.head="shared"', "distill.method=kd"]]
)
def test_other_methods_and_heads(tiny_run: TinyRun, tmp_path: Path, overrides: list[str]) -> None:
    result = run(tiny_run.recipe(*overrides), tiny_run.cache, tmp_path)
    terms = set(lines(tmp_path)[0])
    assert ("hidden" in terms) == ("distill.paper=true" in overrides)
    assert set(result.scores) == {"validation", "test"}
    if 'student.head="shared"' in overrides:
        assert (result.student / "model.onnx").exists()


def test_fine_tune_needs_no_cache(tiny_run: TinyRun, tmp_path: Path) -> None:
    recipe = tiny_run.recipe("distill.method=fine-tune", f'student.init_from="{tiny_run.teachers / "bert"}"')
    result = run(recipe, None, tmp_path / "alone")
    assert result.results["teachers"] == {}
    assert set(lines(tmp_path / "alone")[0]) >= {"task", "loss"}
    assert "soft" not in lines(tmp_path / "alone")[0]
    with_cache = run(recipe, tiny_run.cache, tmp_path / "beside")
    assert with_cache.results["cache_identity"]
    assert len(lines(tmp_path / "beside")) == len(lines(tmp_path / "alone")) == 6  # transfer rows carry no label
    with pytest.raises(RecipeError, match="there is no cache"):
        run(tiny_run.recipe(f'student.init_from="{tiny_run.teachers / "bert"}"'), None, tmp_path / "without")


def test_free_choices(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Another student tokenizer and max_length, fewer teachers and layers, changed labels: no new dump."""
    other = make_model(tmp_path / "distilbert", "distilbert", depth=2)
    rows = reviews(184, seed=1)[:96]
    flipped = write_reviews(tmp_path / "flipped.tsv", [(text, 1 - label) for text, label in rows])
    recipe = tiny_run.recipe(
        f'student.init_from="{other}"', "student.layers=1", "student.max_length=16", 'distill.teachers=["xlm", "bert"]',
        f'data.train="{flipped}"', "data.transfer=[]",
    )  # fmt: skip
    result = run(recipe, tiny_run.cache, tmp_path / "run")
    assert list(result.results["teachers"]) == ["xlm", "bert"]
    assert result.results["layer_map"] == {"xlm": [4], "bert": [4]}
    assert all(0.5 < share <= 1.0 for share in result.results["coverage"].values())
    as_it_was = run(
        recipe.model_copy(update={"data": tiny_run.recipe("data.transfer=[]").data}), tiny_run.cache, tmp_path / "was"
    )
    assert lines(tmp_path / "run")[0]["task"] != lines(tmp_path / "was")[0]["task"]
    assert not same(result, as_it_was)


def test_layers_of_the_recipe_override_even_ones(tiny_run: TinyRun, tmp_path: Path) -> None:
    overrides = ["distill.teacher_layers={bert = [4, 2]}", 'distill.teachers=["bert"]']
    result = run(tiny_run.recipe(*overrides), tiny_run.cache, tmp_path)
    assert result.results["layer_map"] == {"bert": [4, 2]}


REFUSED: dict[str, tuple[list[str], type[KdcacheError], str]] = {
    "layer that is not stored": (
        ["distill.teacher_layers={bert = [1, 4]}"],
        MismatchError,
        "no hidden states of layer 1 .* it has layers: 2, 4",
    ),
    "even layers that are not stored": (["student.layers=4"], MismatchError, "no hidden states of layer 1, 3"),
    "wrong number of layers": (["distill.teacher_layers={bert = [4]}"], RecipeError, "gives 1 layers .* student has 2"),
    "layers of a teacher not used": (
        ["distill.teacher_layers={xlm = [2, 4]}", 'distill.teachers=["bert"]'],
        RecipeError,
        "which is not used",
    ),
    "teacher that is not there": (
        ['distill.teachers=["gpt"]'],
        MismatchError,
        "no teacher 'gpt'; it has: bert, roberta, xlm",
    ),
    "method that is not there": (["distill.method=mtbert"], RecipeError, "no distillation method 'mtbert'"),
    "more layers than there are": (["student.layers=9"], ModelError, "asks for 9 layers, but .* has 4"),
    "other labels": (['data.labels=["1", "0"]'], MismatchError, "the labels of the data are 1, 0"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_before_training(tiny_run: TinyRun, tmp_path: Path, case: str) -> None:
    overrides, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message) as caught:
        run(tiny_run.recipe(*overrides), tiny_run.cache, tmp_path)
    assert caught.value.hint
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(("stored", "feature"), [("pooled", "first"), ("first", "mean"), ("first", "tokens")])
def test_vectors_that_a_term_cannot_use_are_refused(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: str, feature: Feature
) -> None:
    cache = tiny_run.cache.with_name(f"cache-of-{stored}")
    dump_teachers(tiny_run.recipe(f"dump.tokens={stored}"), tiny_run.teachers, cache, progress=SilentProgress())
    method = Method("picky", "", "", (TaskLoss(), HiddenStates(feature)))
    monkeypatch.setattr("kdcache.distill.objective.find_method", lambda _name: method)
    with pytest.raises(
        MismatchError, match=r"'hidden' of method 'picky' needs .* for layer 2 of teacher 'bert'"
    ) as caught:
        run(tiny_run.recipe(), cache, tmp_path)
    assert "dump.tokens = 'all'" in caught.value.hint
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_student_without_a_layer_pair_is_refused(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = LayerMapping("nothing", lambda _teacher, layers, _draw: (None,) * layers)
    method = Method("lonely", "", "", (TaskLoss(), HiddenStates()), layer_map=nothing)
    monkeypatch.setattr("kdcache.distill.objective.find_method", lambda _name: method)
    with pytest.raises(RecipeError, match="method 'lonely' pairs no layer of a student with 2 layers"):
        run(tiny_run.recipe(), tiny_run.cache, tmp_path)


def test_text_that_the_cache_lacks(tiny_run: TinyRun, tmp_path: Path) -> None:
    rows = [*reviews(184, seed=1)[:96], ("an altogether new line", 1)]
    more = write_reviews(tmp_path / "more.tsv", rows)
    with pytest.raises(MismatchError, match="lacks 1 of the") as caught:
        run(tiny_run.recipe(f'data.train="{more}"'), tiny_run.cache, tmp_path / "refused")
    assert caught.value.exit_code == 4
    result = run(tiny_run.recipe(f'data.train="{more}"', "distill.missing=skip"), tiny_run.cache, tmp_path / "skipped")
    assert result.results["skipped_rows"] == 1


def test_other_teacher_weights_at_hand_are_refused(tiny_run: TinyRun, tmp_path: Path, copied: Copy) -> None:
    cache = copied(tiny_run.cache)
    families = {"bert": "bert", "roberta": "roberta", "xlm": "xlm-roberta"}
    make_teachers(cache.parent / "teachers", families, widths={"roberta": 24}, seed=5)  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match=r"teacher 'bert' .* differ in weights") as caught:
        run(tiny_run.recipe(), cache, tmp_path / "run")
    assert caught.value.exit_code == 4


def test_a_cache_alone_is_enough(tiny_run: TinyRun, tmp_path: Path, copied: Copy) -> None:
    """A colleague's cache: no data files, no teachers."""
    cache, student = copied(tiny_run.cache), make_model(tmp_path / "student", "bert", depth=2)
    gone = [f'data.{split}="/nowhere/{split}.tsv"' for split in ("train", "validation", "test")]
    result = run(tiny_run.recipe(*gone, "data.transfer=[]", f'student.init_from="{student}"'), cache, tmp_path / "run")
    assert result.results["data_from"] == "cache"
    parameters = load_teacher(tiny_run.teachers, "bert").model.parameters()
    found = result.results["teachers"]["bert"]
    assert found["parameters"] == sum(parameter.numel() for parameter in parameters)
    assert found["measured_on"] == "cpu, float32, torch"
    assert any("The dump measured the teachers' ms/text" in line for line in data_notes(result.results))
    assert set(result.scores) == {"validation", "test"}


def test_without_validation_the_last_epoch_is_kept(tiny_run: TinyRun, tmp_path: Path) -> None:
    data = tiny_run.recipe().data.model_copy(update={"validation": None})
    result = run(tiny_run.recipe("distill.epochs=2").model_copy(update={"data": data}), tiny_run.cache, tmp_path)
    assert result.results["best_epoch"] == 2
    assert set(result.scores) == {"test"}


class _Stopped(Exception):  # noqa: N818 - no error
    """Ends a training from inside."""


@pytest.mark.parametrize(
    ("overrides", "ratio"),
    [([], 10.0), (["distill.paper=true"], 1.0), (["distill.projection_learning_rate=3e-3"], 3.0)],
)
def test_the_projections_move_at_a_rate_of_their_own(
    tiny_run: TinyRun, tmp_path: Path, overrides: list[str], ratio: float
) -> None:
    """W moves ten times as far in a step as the student does, or as the recipe says.

    The first step of AdamW moves every number by the learning rate, whatever its gradient; weight decay is switched
    off.
    """
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    before: list[torch.Tensor] = []
    moved: dict[str, float] = {}

    def parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def remember(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        before.extend(parameter.detach().clone() for parameter in parameters(optimizer))

    def compare(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for was, parameter in zip(before, parameters(optimizer), strict=True):
            kind = "projections" if id(parameter) in projections else "student"
            moved[kind] = max(moved.get(kind, 0.0), float((parameter.detach() - was).abs().max()))
        raise _Stopped

    projections: set[int] = set()
    make = Training.model

    def model(self: Training, *earlier: Any) -> Any:
        made = make(self, *earlier)
        projections.update(id(parameter) for parameter in made.projections.parameters())
        return made

    hooks = [register_optimizer_step_pre_hook(remember), register_optimizer_step_post_hook(compare)]
    try:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(_Stopped):
            patch.setattr(Training, "model", model)
            run(tiny_run.recipe("distill.weight_decay=0.0", *overrides), tiny_run.cache, tmp_path)
    finally:
        for hook in hooks:
            hook.remove()
    assert moved["student"] > 0
    assert moved["projections"] / moved["student"] == pytest.approx(ratio, rel=0.01)


def test_the_best_epoch_is_what_is_saved_and_scored(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three epochs the second one: neither the first nor the last."""
    evaluate = DistillTask.evaluate
    weights_of: list[dict[str, torch.Tensor]] = []
    losses: list[float] = []

    def scored(self: DistillTask, epoch: int) -> dict[str, float]:
        found = evaluate(self, epoch)
        weights_of.append({name: tensor.clone() for name, tensor in self._student.network.state_dict().items()})
        losses.append(found["validation/loss"])
        return {**found, "score": (0.2, 0.9, 0.5)[epoch]}

    monkeypatch.setattr(DistillTask, "evaluate", scored)
    result = run(tiny_run.recipe("distill.epochs=3"), tiny_run.cache, tmp_path)
    assert result.results["best_epoch"] == 2
    saved = weights(result)
    assert all(torch.equal(saved[name], weights_of[1][name]) for name in saved)
    assert any(not torch.equal(saved[name], weights_of[2][name]) for name in saved)
    assert result.scores["validation"]["loss"] == pytest.approx(losses[1], rel=1e-6)


ONE_HUGE_STEP = [
    f"distill.{setting}" for setting in ("batch_size=300", "warmup=0.0", "schedule=constant", "learning_rate=1e30")
]


@pytest.mark.parametrize("lacking", [(), ("validation",), ("validation", "test")], ids=str)
def test_a_student_that_diverges_in_its_last_step_is_refused_and_not_saved(
    tiny_run: TinyRun, tmp_path: Path, lacking: tuple[str, ...]
) -> None:
    recipe = tiny_run.recipe(*ONE_HUGE_STEP)
    data = recipe.data.model_copy(update=dict.fromkeys(lacking))
    rows = {(): "32 of 32 validation", ("validation",): "32 of 32 test"}.get(lacking, "96 of 96 train")
    for _ in range(2):  # the same command again
        with pytest.raises(NonFiniteError, match=f"not finite after step 1.*: {rows} rows have logits") as caught:
            run(recipe.model_copy(update={"data": data}), tiny_run.cache, tmp_path)
        assert "Lower learning_rate" in caught.value.hint
    assert not (tmp_path / "results.json").exists()
    assert not (tmp_path / "student").exists()


def test_damage_is_found_before_the_rows_are_used(tiny_run: TinyRun, tmp_path: Path, copied: Copy) -> None:
    cache, student = copied(tiny_run.cache), make_model(tmp_path / "student", "bert", depth=2)
    damaged = max(
        (path for path in (cache / "teachers" / "xlm" / "hidden").rglob("*") if path.is_file()),
        key=lambda p: p.stat().st_size,
    )
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(DamageError) as caught:
        run(tiny_run.recipe(f'student.init_from="{student}"'), cache, tmp_path / "run")
    assert str(damaged.relative_to(cache)) in caught.value.message
    assert caught.value.exit_code == 3
    assert not (tmp_path / "run" / "student").exists()


def test_pairs_of_texts(tiny_run: TinyRun, tmp_path: Path) -> None:
    lines_of = [
        "first\tsecond\tlabel",
        *(f"{text}\tthe plot is {text.split()[1]}\t{label}" for text, label in reviews(48)),
    ]
    lines_of += ["the film is good\t\t1", "\tthe plot is bad\t0"]  # a column may be empty
    (tmp_path / "pairs.tsv").write_text("\n".join(lines_of) + "\n")
    student = make_model(tmp_path / "model", "bert", depth=1)
    recipe = tiny_run.recipe(
        "distill.method=fine-tune", f'student.init_from="{student}"', "student.layers=1", "data.transfer=[]",
        'data.text=["first", "second"]',
        *(f'data.{split}="{tmp_path / "pairs.tsv"}"' for split in ("train", "validation", "test")),
    )  # fmt: skip
    result = run(recipe, None, tmp_path / "run")
    assert result.results["text_columns"] == ["first", "second"]
    from kdcache.students.score import evaluate_model

    found = evaluate_model(result.student, str(tmp_path / "pairs.tsv"))
    assert found["accuracy"] == result.scores["test"]["accuracy"]


@pytest.mark.parametrize("targets", ["cache", "live", "none"])
def test_the_share_of_texts_that_the_student_cuts_is_in_the_results(
    tiny_run: TinyRun, tmp_path: Path, targets: str
) -> None:
    method = {"none": "fine-tune"}.get(targets, "kd")
    start = f'student.init_from="{tiny_run.teachers / "bert"}"'
    recipe = tiny_run.recipe("student.max_length=7", f"distill.method={method}", start)
    options = {"live_teachers": tiny_run.teachers} if targets == "live" else {}
    result = run(recipe, None if targets == "none" else tiny_run.cache, tmp_path / "run", **options)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(result.student)

    def share(*files: str) -> float:
        texts = [line.split("\t")[0] for file in files for line in Path(file).read_text().splitlines()[1:]]
        cut = [len(ids) > 7 for ids in tokenizer(texts)["input_ids"]]
        assert any(cut) and not all(cut)
        return sum(cut) / len(cut)

    data = recipe.data
    assert data.validation is not None and data.test is not None
    learned = [data.train] if targets == "none" else [data.train, *data.transfer]
    expected = {"train": share(*learned), "validation": share(data.validation), "test": share(data.test)}
    assert result.results["truncated"]["student"] == pytest.approx(expected)
    assert result.results["truncated"]["teachers"] == (
        {} if targets == "none" else dict.fromkeys(("bert", "roberta", "xlm"), 0.0)
    )
