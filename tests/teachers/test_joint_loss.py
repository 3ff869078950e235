"""L_cf teacher by teacher: the gradient is that of the summed loss (MT-BERT, section 3.1)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from kdcache.data.encoding import encode, load_tokenizer, pad
from kdcache.report.metrics import scores
from kdcache.teachers.head import SharedHead, new_adapter
from kdcache.teachers.joint import MEAN, CofinetuneTask, Labels, TeacherTexts, score_teachers
from kdcache.teachers.teacher import TeacherModel, load_encoder
from kdcache.testing.tiny import reviews
from kdcache.training.best_epoch import BestEpoch
from kdcache.training.predict import predict

ROWS = 11


@pytest.fixture
def task(tiny_models: dict[str, Path]) -> CofinetuneTask:
    return make_task(tiny_models, accumulation=1)


def make_task(tiny_models: dict[str, Path], *, accumulation: int) -> CofinetuneTask:
    """Three tokenizers, three widths (two adapters), float64, no dropout; the rows differ in length."""
    torch.manual_seed(0)
    texts = [(text,) for text, _ in reviews(ROWS, seed=5)]
    labels = np.array([label for _, label in reviews(ROWS, seed=5)])
    head = SharedHead(24, 2).double()
    models, encoded = {}, {}
    for name, path in tiny_models.items():
        encoder = load_encoder(str(path))
        adapter = new_adapter(encoder.config.hidden_size, 24)
        models[name] = TeacherModel(encoder.double(), adapter.double() if adapter else None, head).eval()
        tokenizer = load_tokenizer(str(path))
        encoded[name] = TeacherTexts(encode(tokenizer, texts, 32), None, tokenizer.pad_token_id)
    return CofinetuneTask(
        models,
        encoded,
        Labels(labels, None),
        batch_size=ROWS,
        accumulation=accumulation,
        select_by="accuracy",
        seed=0,
        best=BestEpoch(Path(), Path(), {}),
        note=lambda message: None,  # noqa: ARG005
    )


def summed_loss(task: CofinetuneTask, rows: np.ndarray) -> torch.Tensor:
    """sum_i CE(y, softmax(z_i)) in one graph, every batch padded as a whole."""
    total = torch.zeros((), dtype=torch.float64)
    labels = torch.from_numpy(task._labels.train[rows])
    for name, model in task._models.items():
        texts = task._texts[name]
        total = total + functional.cross_entropy(model(pad(texts.train, rows, texts.pad_token_id)).logits, labels)
    return total


def gradients(task: CofinetuneTask) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in task.model.named_parameters() if p.grad is not None}
    task.model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("accumulation", [1, 3, ROWS])
def test_the_gradient_is_that_of_the_summed_loss(tiny_models: dict[str, Path], accumulation: int) -> None:
    task = make_task(tiny_models, accumulation=accumulation)
    rows = next(task.batches(0, 0))
    expected_loss = summed_loss(task, rows)
    expected_loss.backward()
    expected = gradients(task)
    total = 0.0
    for loss, _ in task.losses(rows):
        loss.backward()
        total += loss.item()
    found = gradients(task)
    assert total == pytest.approx(expected_loss.item(), rel=1e-12)
    assert found.keys() == expected.keys()
    assert any(name.startswith("0.adapter") for name in found)
    assert any("head" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_one_teachers_graph_is_gone_before_the_next_runs(task: CofinetuneTask) -> None:
    order = []
    for name, model in task._models.items():
        model.register_forward_pre_hook(lambda *_, name=name: order.append(f"forward {name}"))
    for loss, terms in task.losses(next(task.batches(0, 0))):
        loss.backward()
        order.append(f"backward {next(iter(terms)).removeprefix('ce.')}")
    names = list(task._models)
    assert order == [f"{what} {name}" for name in names for what in ("forward", "backward")]


def test_batches_are_a_function_of_seed_epoch_and_step(tiny_models: dict[str, Path]) -> None:
    task = make_task(tiny_models, accumulation=1)
    task._batch_size = 4
    whole = list(task.batches(1, 0))
    assert [len(batch) for batch in whole] == [4, 4, 3]
    assert sorted(np.concatenate(whole)) == list(range(ROWS))
    assert all(np.array_equal(*pair) for pair in zip(task.batches(1, 1), whole[1:], strict=True))
    assert not np.array_equal(np.concatenate(list(task.batches(2, 0))), np.concatenate(whole))


def test_predictions_come_back_in_order_whatever_the_lengths(task: CofinetuneTask) -> None:
    name, model = next(iter(task._models.items()))
    texts = task._texts[name]
    found = predict(model, texts.train, texts.pad_token_id)
    for row in range(ROWS):
        alone = model(pad(texts.train, [row], texts.pad_token_id)).logits
        np.testing.assert_allclose(found[row], alone[0].detach().numpy(), rtol=1e-5)


def test_the_mean_is_that_of_probabilities() -> None:
    labels = np.array([0, 1, 1])
    one = np.array([[2.0, 0.0], [0.0, 0.1], [5.0, 0.0]], dtype=np.float32)
    two = np.array([[0.0, 1.0], [0.0, 3.0], [0.0, 4.0]], dtype=np.float32)
    found = score_teachers({"one": one, "two": two}, labels)

    def softmax(values: np.ndarray) -> np.ndarray:
        powers = np.exp(values.astype(np.float64))
        return powers / powers.sum(axis=1, keepdims=True)

    mean = (softmax(one) + softmax(two)) / 2
    assert found["one"] == scores(labels, one)
    assert found[MEAN]["loss"] == pytest.approx(-np.log(mean[np.arange(3), labels]).mean())
    assert found[MEAN]["accuracy"] == pytest.approx((mean.argmax(axis=1) == labels).mean())
