from pathlib import Path

import pytest
import torch

from kdcache.data.encoding import encode, pad
from kdcache.errors import ModelError
from kdcache.teachers.backends import open_backend
from kdcache.teachers.bundle import load_teacher
from kdcache.teachers.teacher import Teacher
from kdcache.testing.backends import TEXTS, BackendContract


class TestTorch(BackendContract):
    kind = "torch"

    @pytest.fixture(scope="class")
    @classmethod
    def teacher(cls, bundle: Path) -> Teacher:
        return load_teacher(bundle, "bert")


class TestTorchWithAdapter(BackendContract):
    kind = "torch"

    @pytest.fixture(scope="class")
    @classmethod
    def teacher(cls, bundle: Path) -> Teacher:
        return load_teacher(bundle, "roberta")


class TestTorchWithItsOwnHead(BackendContract):
    kind = "torch"

    @pytest.fixture(scope="class")
    @classmethod
    def teacher(cls, bundle: Path) -> Teacher:
        return load_teacher(bundle, "own")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_give_float32_that_is_near(bundle: Path, tmp_path: Path, precision: str) -> None:
    teacher = load_teacher(bundle, "bert")
    encoded = encode(teacher.tokenizer, TEXTS, teacher.max_length)
    inputs = pad(encoded, range(len(TEXTS)), int(teacher.tokenizer.pad_token_id))
    exact = open_backend("torch", teacher, [2], precision="float32", work_dir=tmp_path).run(inputs, [2], False)
    rough = open_backend("torch", teacher, [2], precision=precision, work_dir=tmp_path).run(inputs, [2], False)
    assert rough.hidden[2].dtype == rough.logits.dtype == torch.float32
    torch.testing.assert_close(rough.hidden[2], exact.hidden[2], atol=0.1, rtol=0.1)
    assert not torch.equal(rough.hidden[2], exact.hidden[2])


def test_an_unknown_backend(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no teacher backend 'tpu'"):
        open_backend("tpu", load_teacher(bundle, "bert"), [1], precision="float32", work_dir=tmp_path)
