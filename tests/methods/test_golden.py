"""The losses of three steps as kdcache 0.1.0 computed them, and the names under which it saved what it trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.distill.objective import DistillationModel, objective_settings
from kdcache.loading.targets import Batch, Hidden, Targets
from kdcache.methods.base import Pair
from kdcache.recipe import DistillSection, StudentSection
from kdcache.students.build import build_student
from kdcache.testing.tiny import make_model

DIMS: dict[Pair, int] = {(0, 1): 3, (0, 2): 3, (1, 1): 4, (1, 2): 4}
VARIANCES: dict[Pair, float] = {(0, 1): 0.5, (0, 2): 2.0, (1, 1): 1.0, (1, 2): 3.0}
COVERED = {0: [0, 1, 2, 5, 6, 10, 16, 20, 25, 26], 1: [0, 1, 5, 11, 12, 15, 21, 29]}
BLOCKS = ["projections.matrices.layer1", "projections.matrices.layer2"]
MATRICES = [f"projections.matrices.layer{layer}-teacher{teacher}" for layer in (1, 2) for teacher in (0, 1)]

GOLDEN: dict[str, tuple[dict[str, Any], list[float], list[str]]] = {
    "mt-bert": ({}, [1.7987327575683594, 1.7864389419555664, 1.754590630531311], BLOCKS),
    "mt-bert, paper": ({"paper": True}, [9.703510284423828, 6.287559509277344, 4.668826103210449], MATRICES),
    "mt-bert, T = 2": (
        {"temperature": 2.0, "t_squared": True},
        [4.8493170738220215, 4.833467960357666, 4.79155969619751],
        BLOCKS,
    ),
    "kd": ({"method": "kd"}, [1.3863873481750488, 1.3804984092712402, 1.3687565326690674], []),
    "kd, T = 2": (
        {"method": "kd", "temperature": 2.0, "t_squared": True},
        [3.4656782150268555, 3.460036516189575, 3.4476842880249023],
        [],
    ),
    "fine-tune": ({"method": "fine-tune"}, [0.6934449076652527, 0.688998818397522, 0.6787705421447754], []),
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("golden") / "bert", "bert", depth=2)


def batch() -> Batch:
    generator, hidden = torch.Generator().manual_seed(0), {}
    for index, positions in COVERED.items():
        place = torch.tensor(positions)
        for layer in (1, 2):
            values = torch.randn(len(positions), DIMS[index, layer], generator=generator)
            hidden[index, layer] = Hidden(values, None, None, None, None, place)
    ids = torch.randint(5, 100, (6, 5), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones(6, 5, dtype=torch.long)}
    logits = 2 * torch.randn(2, 6, 2, generator=generator)
    labels = torch.tensor([0, 1, -1, 1, -1, 0])
    return Batch(inputs, labels, np.zeros((6, 16), np.uint8), Targets(("a", "b"), logits, hidden))


@pytest.mark.parametrize("case", GOLDEN)
def test_losses_and_names_are_those_of_version_0_1_0(model_path: Path, case: str) -> None:
    keys, expected, names = GOLDEN[case]
    settings = objective_settings(DistillSection(**keys))
    section = StudentSection(init_from=str(model_path))
    student = build_student(section, ("0", "1"), max_length=16, seed=0, dropout=0.0).model
    dims = DIMS if settings.needs_hidden else {}
    model = DistillationModel(
        student, settings, ("a", "b"), dims=dims, variances=lambda _epoch: VARIANCES, seed=0
    ).train()
    saved = list(model.state_dict())
    assert saved == [f"student.{name}" for name in student.state_dict()] + names
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(3):
        loss, _ = model(batch(), model.counts([batch()]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-6)
