"""``kdcache export``: what is written, that it gives the student's logits, and that nothing is left of a refusal."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.data.encoding import encode, pad
from kdcache.data.task import load_task
from kdcache.distill.stage import distill
from kdcache.errors import ModelError
from kdcache.progress import SilentProgress
from kdcache.recipe import load_recipe
from kdcache.students import export as module
from kdcache.students.export import LOADING, ExportSettings, export_student
from kdcache.students.onnx_student import Forward, all_logits, in_torch, open_graph, parity, quantise
from kdcache.students.save import load_student, save_student, student_record
from kdcache.students.score import evaluate_model
from kdcache.testing.architectures import ARCHITECTURES
from kdcache.testing.tiny import make_model, reviews, write_reviews
from tests.cli.commands import kdcache
from tests.conftest import TinyRun

FILES = {
    "README.md", "config.json", "export.json", "model.onnx", "model_quantized.onnx", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def few() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdcache.students.onnx_student._REPEATS", 2)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, few: None) -> Path:  # noqa: ARG001
    """A finished run by hand: recipe, data, student with a record, results."""
    root = tmp_path_factory.mktemp("run")
    data = write_reviews(root / "train.tsv", reviews(80, seed=4))
    model = make_model(root / "model", "bert", classes=2, seed=3)
    student = replace(load_student(model), label_names=("bad", "good"), max_length=24)
    record = student_record(student, name="tiny", method="kd", text_columns=("sentence",), label_column="label")
    save_student(root / "student", student, record, "")
    (root / "recipe.toml").write_text(f"""\
name = "tiny"
licence = "MIT"
[data]
train = "{data}"
validation_fraction = 0.5
text = ["sentence"]
label = "label"
labels = ["bad", "good"]
max_length = 24
licence = "CC0-1.0"
[[teachers]]
name = "large"
model = "org/large"
licence = "Apache-2.0"
[student]
init_from = "org/base"
""")
    results = {
        "name": "tiny", "licence": "MIT", "method": "kd", "seed": 0, "cache_identity": "c" * 64,
        "scores": {"validation": {"accuracy": 0.5, "macro_f1": 0.5, "matthews": 0.0, "loss": 0.7}},
        "teachers": {"large": {"scores": {}}}, "student": {"head": "standard", "init_from": "org/base"},
        "rows": {"train": 40, "validation": 40}, "label_names": ["bad", "good"], "text_columns": ["sentence"],
        "max_length": 24,
    }  # fmt: skip
    (root / "results.json").write_text(json.dumps(results))
    return root


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    said = kdcache("export", run, "--to", "onnx", "--int8", "--json")
    assert said.code == 0, said.err
    assert said.document["directory"] == str(run / "onnx")
    return run / "onnx"


def test_the_directory_has_the_layout_of_optimum_and_no_path_of_this_machine(exported: Path, run: Path) -> None:
    assert {path.name for path in exported.iterdir()} == FILES
    config = json.loads((exported / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good"}
    for name in ("README.md", "export.json"):
        assert str(run) not in (exported / name).read_text()


def test_the_report_is_measured_on_the_validation_rows_of_the_run(exported: Path, run: Path) -> None:
    document = json.loads((exported / "export.json").read_text())
    assert document["rows"] == "validation of the run's data"
    torch_, onnx, int8 = document["variants"]
    assert [one["name"] for one in document["variants"]] == ["PyTorch", "ONNX", "ONNX int8"]
    assert onnx["parity"]["largest"] < 1e-5 and onnx["parity"]["changed"] == 0
    assert int8["parity"]["largest"] > 0 and int8["parity"]["rows"] == document["row_count"]
    assert int8["bytes"] < onnx["bytes"]
    assert torch_["bytes"] == (run / "student" / "model.safetensors").stat().st_size
    for one in document["variants"]:
        assert set(one["latency_ms"]) == {"1", "32"} and min(one["latency_ms"].values()) > 0
    data = load_task(load_recipe(run / "recipe.toml").data)
    rows = data.splits["validation"]
    lines = [
        f"{data.texts[bytes(one)][0]}\t{data.label_names[label]}"
        for one, label in zip(rows.text_ids, rows.labels, strict=True)
    ]
    file = run / "rows.tsv"
    file.write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    expected = evaluate_model(run / "student", str(file))
    assert torch_["scores"]["accuracy"] == pytest.approx(expected["accuracy"])
    assert onnx["scores"]["loss"] == pytest.approx(expected["loss"], abs=1e-5)


def test_the_printed_lines_run_and_give_the_students_predictions(exported: Path, run: Path) -> None:
    """The lines of card and page, as they are but for the directory; for both graphs, with texts of two lengths."""
    assert LOADING in (exported / "README.md").read_text()
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    assert LOADING in page
    assert len(LOADING.strip().splitlines()) <= 10
    student = load_student(run / "student")
    texts = [("a moving film",), ("dull from start to end",)]
    inputs = pad(encode(student.tokenizer, texts, student.max_length), [0, 1], int(student.tokenizer.pad_token_id))
    with torch.no_grad():
        expected = student.model(inputs).logits.numpy()
    for file, allowed in (("model.onnx", 1e-5), ("model_quantized.onnx", 0.1)):
        lines = LOADING.replace("path/to/this/directory", str(exported)).replace("model.onnx", file)
        printed = io.StringIO()
        variables: dict[str, Any] = {}
        with contextlib.redirect_stdout(printed):
            exec(lines, variables)
        found = variables["session"].run(["logits"], variables["inputs"])[0]
        np.testing.assert_allclose(found, expected, atol=allowed)
        assert printed.getvalue().strip() == str([student.label_names[one] for one in found.argmax(axis=1)])


def test_the_card_has_metadata_that_a_hub_reads(exported: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard((exported / "README.md").read_text())
    assert (card.data.license, card.data.base_model, card.data.library_name) == ("mit", "org/base", "onnx")
    assert set(card.data.tags) >= {"onnx", "int8", "kdcache"}
    (accuracy, *_) = card.data.eval_results
    assert (accuracy.metric_type, accuracy.metric_value, accuracy.dataset_split) == ("accuracy", 0.5, "validation")
    for part in ("large (org/large, Apache-2.0)", "c" * 64, "train.tsv (CC0-1.0): 40 train, 40 validation rows"):
        assert part in card.text
    assert "| ONNX int8 |" in card.text


@pytest.mark.parametrize("name", ["RoBERTa", "DistilBERT", "MPNet", "GPT-2"])
def test_other_families_export_with_int8(name: str, tmp_path: Path, few: None) -> None:  # noqa: ARG001
    """On the rows of a file, in batches of many lengths; a graph with fixed sizes or places would fail."""
    depth = next(key for key in ("num_hidden_layers", "n_layers", "n_layer") if key in ARCHITECTURES[name].settings)
    directory = ARCHITECTURES[name].save(
        tmp_path / "model", "classifier", **{depth: 1}
    )  # a block less is a second less
    rows = write_reviews(tmp_path / "rows.tsv", reviews(24, seed=2))
    settings = ExportSettings(int8=True, data=str(rows), text=["sentence"], label="label", int8_tolerance=1.0)
    report = export_student(directory, None, settings, progress=SilentProgress())
    assert report.directory == tmp_path / "model-onnx"
    assert report.variants[1].parity is not None and report.variants[1].parity.relative < 1e-5
    assert report.rows == "rows.tsv"
    tokenizer = load_student(directory).tokenizer
    lone = encode(tokenizer, [("the film is good",)], 32)  # alone, without padding
    (found,) = all_logits([open_graph(report.directory / "model.onnx")], lone, 0)
    with torch.no_grad():
        expected = load_student(directory).model(pad(lone, [0], 0)).logits
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_student_with_the_shared_head_exports_with_int8(tiny_run: TinyRun, tmp_path: Path, few: None) -> None:  # noqa: ARG001
    """Its attention pooling multiplies by a vector, which has no channels to quantise."""
    recipe = tiny_run.recipe("student.head=shared", "distill.method=fine-tune", "distill.epochs=1", "data.transfer=[]")
    student = distill(recipe, tiny_run.cache, tmp_path, progress=SilentProgress()).student
    rows = write_reviews(tmp_path / "rows.tsv", reviews(24, seed=2))
    settings = ExportSettings(int8=True, data=str(rows), text=["sentence"], label="label", int8_tolerance=1.0)
    report = export_student(student, None, settings, progress=SilentProgress())
    assert [variant.parity is not None for variant in report.variants] == [False, True, True]


def test_a_student_that_torch_cannot_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("data-dependent shapes\nand more")

    monkeypatch.setattr(torch.onnx, "export", fails)  # with XLNet it fails too, after a minute
    directory = make_model(tmp_path / "model", "bert", classes=2)
    with pytest.raises(ModelError, match="the student cannot be exported to ONNX: RuntimeError: data-") as caught:
        export_student(directory, tmp_path / "out", ExportSettings(), progress=SilentProgress())
    assert "docs/export.md" in caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("values", "int8", "message", "cure"),
    [
        ((3.0, 3.0), False, "ONNX differs from PyTorch by up to", "--tolerance"),
        ((np.nan, 3.0), False, "ONNX gives NaN or infinity", "PyTorch"),
        ((None, 90.0), True, "ONNX int8 differs from PyTorch: ", "--int8-tolerance"),
        ((None, np.nan), True, "ONNX int8 gives NaN or infinity", "without --int8"),
    ],
)
def test_a_graph_with_other_logits_is_refused_and_an_older_export_stays(
    values: tuple[float | None, float],
    int8: bool,
    message: str,
    cure: str,
    run: Path,
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    student = load_student(run / "student")

    def opened(path: Path) -> Forward:
        value = values[path.name == "model_quantized.onnx"]
        if value is None:
            return in_torch(student.model)
        wrong = np.array([[value, 0.0], [0.0, value]], np.float32)  # both classes, so that some predictions change
        return lambda inputs: wrong[np.arange(len(inputs["input_ids"])) % 2]

    monkeypatch.setattr(module, "export_onnx", lambda _, __, path, **___: path.write_bytes(b""))  # takes seconds
    monkeypatch.setattr(module, "quantise", lambda _, path: path.write_bytes(b""))
    monkeypatch.setattr(module, "open_graph", opened)
    said = kdcache("export", run, *(["--int8"] if int8 else []))
    assert said.code == 1
    assert message in said.err and "nothing was written" in said.err and cure in said.err.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before
    assert not list(run.glob(".onnx*"))


def test_parity_counts_what_changes() -> None:
    reference = np.array([[1.0, -4.0], [0.0, 0.5], [2.0, 2.5]], np.float32)
    ours = reference + np.array([[0.0, 0.2], [0.6, 0.0], [0.0, 0.0]], np.float32)
    found = parity(ours, reference)
    assert found.largest == pytest.approx(0.6) and found.relative == pytest.approx(0.15)
    assert (found.changed, found.rows) == (1, 3)
    assert parity(ours * np.nan, reference).relative == np.inf


def test_bad_input_is_one_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "recipe.toml").write_text("")
    for arguments, code, message in (
        ((tmp_path,), 2, "neither a run nor a student"),
        ((begun,), 2, "has no student yet"),
        ((run, "--to", "openvino"), 2, "OpenVINO reads model.onnx itself"),
        ((run, "--output-dir", tmp_path), 4, "is not an exported student"),
        ((run, "--data", tmp_path / "none.tsv", "--output-dir", tmp_path / "x"), 2, "there is no data file"),
        ((run / "model", "--data", run / "train.tsv"), 2, "no record of its text columns"),
    ):
        said = kdcache("export", *arguments)
        assert said.code == code, said.err
        assert message in said.err
        assert [line.split(":")[0] for line in said.err.splitlines()] == ["error", "hint"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["begun", "notes.txt"]


def test_rows_without_the_runs_data_are_named_synthetic(run: Path, tmp_path: Path) -> None:
    notes: list[str] = []

    class Notes(SilentProgress):
        def note(self, message: str) -> None:
            notes.append(message)

    student = load_student(run / "student")
    recipe = load_recipe(run / "recipe.toml", [f"data.train={tmp_path / 'gone.tsv'}"])
    place = replace(module._find(run), recipe=recipe)
    rows = module._rows(place, student, ExportSettings(), Notes())
    assert rows.name == "synthetic token ids" and rows.labels is None
    assert len(rows.encoded) == 64 and rows.encoded.lengths.max() <= student.max_length
    assert any("gone.tsv" in note for note in notes) and any("--data FILE" in note for note in notes)


def test_a_graph_without_matrix_products_is_not_quantised(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("input", "logits")]
    graph = helper.make_graph([helper.make_node("Identity", ["input"], ["logits"])], "g", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph), tmp_path / "a.onnx")
    with pytest.raises(ModelError, match="no matrix product"):
        quantise(tmp_path / "a.onnx", tmp_path / "b.onnx")
