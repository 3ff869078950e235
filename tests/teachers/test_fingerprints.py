"""Fingerprints cover all that a teacher's outputs depend on, and nothing else."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kdcache.cache.spec import Fingerprints
from kdcache.data.encoding import encode, pad
from kdcache.teachers.bundle import load_teacher
from kdcache.teachers.fingerprints import fingerprint_teacher
from kdcache.teachers.head import SharedHead
from kdcache.teachers.teacher import Teacher, TeacherModel
from kdcache.testing.teachers import make_teachers


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    families = {"same": "bert", "wider": "roberta", "own": "bert"}
    return make_teachers(tmp_path_factory.mktemp("t"), families, widths={"wider": 24}, own_heads=["own"], depth=1)  # type: ignore[arg-type]


def outputs(teacher: Teacher) -> list[Tensor]:
    encoded = encode(teacher.tokenizer, [("the film is good",), ("bad, and long as well",)], teacher.max_length)
    with torch.no_grad():
        forward = teacher.model.eval()(pad(encoded, [0, 1], int(teacher.tokenizer.pad_token_id)), hidden_states=True)
    assert forward.hidden_states is not None
    mask = encoded.offsets[1:] - encoded.offsets[:-1]
    return [forward.logits, *(state[row, : mask[row]] for state in forward.hidden_states for row in range(2))]


def fingerprints(teacher: Teacher) -> Fingerprints:
    return fingerprint_teacher(teacher.model, teacher.tokenizer)


@pytest.mark.parametrize("name", ["same", "wider", "own"])
def test_every_tensor_that_changes_an_output_changes_a_fingerprint(directory: Path, name: str) -> None:
    teacher = load_teacher(directory, name)
    before, known = outputs(teacher), fingerprints(teacher)
    tensors = dict(teacher.model.named_parameters())
    assert any(key.startswith("adapter.") for key in tensors) == (name == "wider")
    generator, unchanged = torch.Generator().manual_seed(0), []
    for key, tensor in tensors.items():
        kept = tensor.detach().clone()
        tensor.data += torch.randn(tensor.shape, generator=generator)
        if all(torch.equal(one, other) for one, other in zip(before, outputs(teacher), strict=True)):
            unchanged.append(key)
        else:
            part = "head" if key.startswith(("adapter.", "head.", "encoder.classifier.")) else "weights"
            found = asdict(fingerprints(teacher))
            assert [field for field, value in asdict(known).items() if found[field] != value] == [part], key
        tensor.data.copy_(kept)
    assert fingerprints(teacher) == known
    assert not [
        key for key in unchanged if "key.bias" not in key
    ]  # a softmax does not see what adds the same to all keys


def test_pooling_and_the_order_of_classes_are_part_of_the_head(directory: Path) -> None:
    shared, own = load_teacher(directory, "same"), load_teacher(directory, "own")
    means = [SharedHead(16, 2, pooling) for pooling in ("mean", "cls")]
    means[1].load_state_dict(means[0].state_dict())  # no pooling of the two has weights
    heads = {
        fingerprint_teacher(TeacherModel(shared.model.encoder, None, head), shared.tokenizer).head for head in means
    }
    assert len(heads) == 2
    orders = [None, (0, 1), (1, 0)]
    models = [TeacherModel(own.model.encoder, None, None, order) for order in orders]
    assert len({fingerprint_teacher(model, own.tokenizer).head for model in models}) == 3
