"""The contract of a teacher backend, as a test class that every implementation inherits.

class TestMine(BackendContract):
    kind = "mine"
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from kdcache.data.encoding import EncodedTexts, encode, pad, padding_id
from kdcache.errors import ModelError
from kdcache.teachers.backends import TeacherBackend, open_backend
from kdcache.training.device import default_device

if TYPE_CHECKING:
    from kdcache.teachers.teacher import Teacher

TEXTS = [
    ("the film is good",),
    ("crème brûlée 🙂 and a long and winding story of a tired actor who never stops",),
    ("bad",),
    ("日本語 the plot feels moving",),
]


class BackendContract:
    """Inherit, set ``kind``, and give the fixtures ``teacher`` (a small one) and ``work_dir`` (for graphs)."""

    kind: str
    tolerance = 1e-5  # from torch in float32

    @pytest.fixture(scope="class")
    @classmethod
    def teacher(cls) -> Teacher:
        raise NotImplementedError(f"{cls.__name__} must give the fixture 'teacher'")

    @pytest.fixture(scope="class")
    @classmethod
    def work_dir(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return tmp_path_factory.mktemp("work")

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, teacher: Teacher, work_dir: Path) -> TeacherBackend:
        return open_backend(cls.kind, teacher, range(teacher.depth + 1), precision="float32", work_dir=work_dir)

    @pytest.fixture(scope="class")
    @classmethod
    def encoded(cls, teacher: Teacher) -> EncodedTexts:
        return encode(teacher.tokenizer, TEXTS, teacher.max_length)

    def test_it_says_what_it_is(self, backend: TeacherBackend) -> None:
        assert backend.name == self.kind
        assert backend.precision == "float32"
        assert backend.device in ("cpu", default_device().type)
        assert all(isinstance(value, str) for value in backend.record.values())

    def test_it_equals_the_model_itself(self, backend: TeacherBackend, teacher: Teacher, encoded: EncodedTexts) -> None:
        inputs = _inputs(teacher, encoded, range(len(TEXTS)))
        layers = [teacher.depth, 0]
        output = backend.run(inputs, layers, True)
        with torch.no_grad():
            device = next(
                teacher.model.parameters()
            ).device  # a backend may run this very model, so it must not be moved
            forward = teacher.model.eval()(
                {name: tensor.to(device) for name, tensor in inputs.items()}, hidden_states=True
            )
        valid = inputs["attention_mask"].bool()
        assert forward.hidden_states is not None
        assert list(output.hidden) == layers
        for layer in layers:
            assert output.hidden[layer].shape == (int(encoded.offsets[-1]), teacher.width)
            self._close(output.hidden[layer], forward.hidden_states[layer].cpu()[valid])
        self._close(output.logits, forward.logits)
        assert output.pooled is not None
        self._close(output.pooled, forward.pooled)
        assert {tensor.dtype for tensor in (output.logits, output.pooled, *output.hidden.values())} == {torch.float32}

    def test_only_what_is_asked_for_is_given(
        self, backend: TeacherBackend, teacher: Teacher, encoded: EncodedTexts
    ) -> None:
        output = backend.run(_inputs(teacher, encoded, [0]), [], False)
        assert not output.hidden
        assert output.pooled is None

    def test_padding_changes_nothing(self, backend: TeacherBackend, teacher: Teacher, encoded: EncodedTexts) -> None:
        together = backend.run(_inputs(teacher, encoded, range(len(TEXTS))), [2], False)
        for row in range(len(TEXTS)):
            alone = backend.run(_inputs(teacher, encoded, [row]), [2], False)
            self._close(together.logits[row : row + 1], alone.logits)
            self._close(together.hidden[2][encoded.offsets[row] : encoded.offsets[row + 1]], alone.hidden[2])

    def test_the_same_batch_gives_the_same_bits_whatever_is_asked_for(
        self, backend: TeacherBackend, teacher: Teacher, encoded: EncodedTexts
    ) -> None:
        inputs = _inputs(teacher, encoded, range(len(TEXTS)))
        everything, little = backend.run(inputs, [1, 2], True), backend.run(inputs, [2], False)
        assert torch.equal(everything.logits, little.logits)
        assert torch.equal(everything.hidden[2], little.hidden[2])

    def test_no_gradients(self, backend: TeacherBackend, teacher: Teacher, encoded: EncodedTexts) -> None:
        output = backend.run(_inputs(teacher, encoded, [0, 1]), [1], True)
        assert not output.logits.requires_grad
        assert not output.hidden[1].requires_grad

    def test_dropout_is_off_even_where_the_model_was_training(
        self, teacher: Teacher, encoded: EncodedTexts, work_dir: Path
    ) -> None:
        teacher = replace(teacher, model=copy.deepcopy(teacher.model).train())  # closing a backend may move its model
        backend = open_backend(self.kind, teacher, [1], precision="float32", work_dir=work_dir)
        inputs = _inputs(teacher, encoded, [0, 1])
        assert torch.equal(backend.run(inputs, [1], False).hidden[1], backend.run(inputs, [1], False).hidden[1])
        backend.close()

    def test_a_layer_that_does_not_exist(self, teacher: Teacher, work_dir: Path) -> None:
        with pytest.raises(ModelError, match=f"no layer {teacher.depth + 1}"):
            open_backend(self.kind, teacher, [teacher.depth + 1], precision="float32", work_dir=work_dir)

    def test_a_precision_that_does_not_exist(self, teacher: Teacher, work_dir: Path) -> None:
        with pytest.raises(ModelError, match="int3"):
            open_backend(self.kind, teacher, [1], precision="int3", work_dir=work_dir)

    def _close(self, found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found.cpu(), expected.cpu(), atol=self.tolerance, rtol=self.tolerance)


def _inputs(teacher: Teacher, encoded: EncodedTexts, rows: Sequence[int]) -> dict[str, Tensor]:
    return pad(encoded, list(rows), padding_id(teacher.tokenizer))
