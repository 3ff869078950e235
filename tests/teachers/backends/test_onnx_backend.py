import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.data.encoding import encode, pad, padding_id
from kdcache.errors import ModelError, NonFiniteError
from kdcache.teachers.backends import onnx_backend as onnx_export
from kdcache.teachers.backends import open_backend
from kdcache.teachers.backends.onnx_backend import OnnxBackend
from kdcache.teachers.bundle import load_teacher
from kdcache.teachers.fingerprints import fingerprint_teacher
from kdcache.teachers.teacher import Teacher
from kdcache.testing.architectures import ARCHITECTURES
from kdcache.testing.backends import TEXTS, BackendContract
from kdcache.testing.teacher_check import open_teacher, reference_logits


class TestOnnx(BackendContract):
    kind = "onnxruntime"

    @pytest.fixture(scope="class")
    @classmethod
    def teacher(cls, bundle: Path) -> Teacher:
        return load_teacher(bundle, "bert")


class TestOnnxWithAdapter(BackendContract):
    kind = "onnxruntime"

    @pytest.fixture(scope="class")
    @classmethod
    def teacher(cls, bundle: Path) -> Teacher:
        return load_teacher(bundle, "roberta")


class TestOnnxWithItsOwnHead(BackendContract):
    kind = "onnxruntime"

    @pytest.fixture(scope="class")
    @classmethod
    def teacher(cls, bundle: Path) -> Teacher:
        return load_teacher(bundle, "own")


def test_a_decoder_reads_the_last_token_of_each_text(tmp_path: Path) -> None:
    """A graph of fixed places would read those of the batch that it was traced with."""
    entry = ARCHITECTURES["Qwen2"]
    directory = entry.save(tmp_path / "model", "classifier")
    teacher = open_teacher(directory, "own")
    teacher.fingerprints = fingerprint_teacher(teacher.model, teacher.tokenizer)
    texts = [("the film is good and great",), (f"bad {entry.tokenizer().eos_token}",), ("the plot",)]
    encoded = encode(teacher.tokenizer, texts, teacher.max_length)
    backend = open_backend("onnxruntime", teacher, [1], precision="float32", work_dir=tmp_path)
    output = backend.run(pad(encoded, [0, 1, 2], 0), [1], True)
    np.testing.assert_allclose(output.logits.numpy(), reference_logits(directory, texts), atol=1e-5)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


def test_the_graph_is_kept_and_the_parity_recorded(bundle: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load_teacher(bundle, "distil")
    backend = open_backend("onnxruntime", teacher, [1], precision="float32", work_dir=kept)
    assert float(backend.record["max_abs_difference_to_torch"]) < 1e-5
    assert backend.record["providers"] == "CPUExecutionProvider" or "CUDA" in backend.record["providers"]
    json.dumps(dict(backend.record))
    monkeypatch.setattr(onnx_export, "_export", lambda *_: pytest.fail("exported again"))
    open_backend("onnxruntime", teacher, [0, 2], precision="float32", work_dir=kept)


def test_a_kept_graph_that_was_cut_short_is_exported_again(
    bundle: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load_teacher(bundle, "distil")
    graph = onnx_export.exported(teacher, precision="float32", work_dir=kept) / "model.onnx"
    whole, exports = graph.read_bytes(), list[str]()

    def export(_teacher: Teacher, precision: str, target: Path) -> None:
        exports.append(precision)
        target.write_bytes(whole)

    monkeypatch.setattr(onnx_export, "_export", export)  # a real one takes seconds, and gives the same graph
    graph.write_bytes(whole[:1000])
    backend = open_backend("onnxruntime", teacher, [1], precision="float32", work_dir=kept)
    assert exports == ["float32"]
    assert graph.read_bytes() == whole
    assert float(backend.record["max_abs_difference_to_torch"]) < 1e-5


def test_a_graph_of_other_weights_is_found_out(bundle: Path, kept: Path) -> None:
    teacher = load_teacher(bundle, "distil")
    onnx_export.exported(teacher, precision="float32", work_dir=kept)
    with torch.no_grad():
        next(teacher.model.parameters()).normal_()  # and the fingerprint stays: as if two teachers shared one
    with pytest.raises(ModelError, match="teacher 'distil' differs between ONNX Runtime and PyTorch by") as caught:
        open_backend("onnxruntime", teacher, [1], precision="float32", work_dir=kept)
    assert 'dump.backend = "torch"' in caught.value.hint


def test_a_teacher_of_nan_is_named(bundle: Path, kept: Path) -> None:
    teacher = load_teacher(bundle, "distil")
    with torch.no_grad():
        next(teacher.model.parameters()).fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="teacher 'distil'"):
        open_backend("onnxruntime", teacher, [1], precision="float32", work_dir=kept)


def test_a_teacher_that_cannot_be_exported_is_named_with_the_cure(bundle: Path, tmp_path: Path) -> None:
    teacher = load_teacher(bundle, "distil")

    class Untraceable(torch.nn.Module):
        def forward(self, *_: object, **__: object) -> object:
            raise RuntimeError("this model\nhas its own mind")

    teacher.model = Untraceable()  # type: ignore[assignment]
    with pytest.raises(
        ModelError, match=r"teacher 'distil' cannot be exported to ONNX: RuntimeError: this model$"
    ) as caught:
        open_backend("onnxruntime", teacher, [1], precision="float32", work_dir=tmp_path)
    assert 'dump.backend = "torch"' in caught.value.hint
    assert not list((tmp_path / "onnx").iterdir())


def test_half_precision(bundle: Path, kept: Path) -> None:
    teacher = load_teacher(bundle, "distil")
    backend = open_backend("onnxruntime", teacher, [2], precision="fp16", work_dir=kept)
    encoded = encode(teacher.tokenizer, TEXTS, teacher.max_length)
    inputs = pad(encoded, range(len(TEXTS)), int(teacher.tokenizer.pad_token_id))
    output = backend.run(inputs, [2], False)
    exact = open_backend("torch", teacher, [2], precision="float32", work_dir=kept).run(inputs, [2], False)
    assert output.hidden[2].dtype == torch.float32
    torch.testing.assert_close(output.hidden[2], exact.hidden[2].cpu(), atol=0.05, rtol=0.05)


def test_bound_outputs_are_those_that_a_session_returns(bundle: Path, kept: Path) -> None:
    """Tensors of torch that ONNX Runtime writes into; a GPU's states so stay there."""
    teacher = load_teacher(bundle, "distil")
    backend = open_backend("onnxruntime", teacher, [0, 2], precision="float32", work_dir=kept)
    encoded = encode(teacher.tokenizer, TEXTS, teacher.max_length)
    inputs = pad(encoded, range(len(TEXTS)), int(teacher.tokenizer.pad_token_id))
    output = backend.run(inputs, [2, 0], True)
    session = onnx_export._session(onnx_export.exported(teacher, precision="float32", work_dir=kept))
    given = {node.name: inputs[node.name].numpy() for node in session.get_inputs()}
    logits, pooled, last, first = session.run(["logits", "pooled", "hidden_2", "hidden_0"], given)
    valid = inputs["attention_mask"].bool().numpy()
    for found, expected in (
        (output.logits, logits),
        (output.pooled, pooled),
        (output.hidden[2], last[valid]),
        (output.hidden[0], first[valid]),
    ):
        assert found is not None
        np.testing.assert_array_equal(found.cpu().numpy(), expected)


def test_what_is_not_asked_for_is_not_bound(bundle: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load_teacher(bundle, "distil")
    backend = open_backend("onnxruntime", teacher, [2], precision="float32", work_dir=kept)
    bound = list[dict[str, tuple[int, ...]]]()
    run = OnnxBackend._bound

    def noting(self: OnnxBackend, inputs: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]) -> object:
        bound.append(dict(shapes))
        return run(self, inputs, shapes)

    monkeypatch.setattr(OnnxBackend, "_bound", noting)
    inputs = pad(encode(teacher.tokenizer, TEXTS, teacher.max_length), [0, 1], int(teacher.tokenizer.pad_token_id))
    backend.run(inputs, [2], False)
    tokens = inputs["input_ids"].shape[1]
    assert bound == [{"logits": (2, len(teacher.label_names)), "hidden_2": (2, tokens, teacher.width)}]


@pytest.mark.parametrize("name", ["distil", "own"])
def test_half_precision_with_a_float32_head(bundle: Path, kept: Path, name: str) -> None:
    teacher = load_teacher(bundle, name)
    layer = teacher.depth
    inputs = pad(encode(teacher.tokenizer, TEXTS, teacher.max_length), range(len(TEXTS)), padding_id(teacher.tokenizer))
    backend = open_backend("onnxruntime", teacher, [layer], precision="fp16+float32-head", work_dir=kept)
    output = backend.run(inputs, [layer], True)
    mask = inputs["attention_mask"].bool()
    states = torch.zeros(*mask.shape, teacher.width)
    states[mask] = output.hidden[layer].cpu()
    with torch.no_grad():
        if teacher.model.head is not None:
            logits, _ = teacher.model.head(states, inputs["attention_mask"])
        else:
            logits = teacher.model.encoder.classifier(states)
    # on a CPU, ONNX Runtime computes in float32 and may hand the head states that are not rounded yet
    torch.testing.assert_close(output.logits.cpu(), logits, rtol=3e-2, atol=3e-2)
    assert not torch.equal(output.logits.half().float(), output.logits)  # as the head in fp16 would give them


def test_bf16_is_refused_with_the_cure(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot run in bf16; it runs in float32 or fp16"):
        open_backend("onnxruntime", load_teacher(bundle, "distil"), [2], precision="bf16", work_dir=tmp_path)


def test_what_onnx_runtime_prints_is_no_result(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It prints to stdout where a library of CUDA is missing, and the teacher runs on the CPU."""
    import onnxruntime

    directory = onnx_export.exported(load_teacher(bundle, "distil"), precision="float32", work_dir=tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcublas.so"), raising=False)
    assert onnx_export._session(directory).get_providers() == ["CPUExecutionProvider"]
    said = capsys.readouterr()
    assert said.out == ""
    assert "Failed to load libcublas.so" in said.err
