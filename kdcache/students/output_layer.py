"""The output layer of a classifier that a student starts from, brought into the class order of the task.

Models say by ``id2label`` which class a row of their output layer is. Rows of the task's classes are kept, each in its
place. Rows of other classes, or of LABEL_0 … where it is not known which class that is, say nothing about the task: the
layer is drawn anew, as for a model without one.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdcache.data.labels import numbers_known
from kdcache.errors import ModelError
from kdcache.progress import listed_apart
from kdcache.teachers.network import run_network
from kdcache.teachers.teacher import class_order_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_INITIALISED = "_is_hf_initialized"  # on tensors and modules that transformers does not draw


def outputs_of_teacher(teachers_dir: Path, name: str) -> dict[int, str] | None:
    """The task's label of each output of a co-finetuned teacher; None unless it has a head of its own."""
    from kdcache.teachers.bundle import read_bundle

    bundle = read_bundle(teachers_dir)
    order = bundle.teachers[name].class_order
    return None if order is None else dict(zip(order, bundle.label_names, strict=True))


def settle_output_layer(
    network: PreTrainedModel,
    source: str,
    outputs: Mapping[Any, str],
    label_names: Sequence[str],
    absent: Collection[str],
    *,
    labels_declared: bool,
) -> None:
    """Bring the output layer of a loaded classifier into the order of ``label_names``, or draw it anew.

    Nothing is changed, and torch's generator not used, if the order is the task's or the layer was not loaded.

    Args:
        network: the classifier, whose config has the task's classes.
        source: its name in messages.
        outputs: the class of each output, as the checkpoint names it.
        label_names: the task's labels in class order.
        absent: names of the tensors that were not loaded.
        labels_declared: whether the order of ``label_names`` was, so that LABEL_0 is the first of them.

    Raises:
        ModelError: if the layer has another order and is not found.
    """
    order = _order(outputs, label_names, labels_declared=labels_declared)
    if order == list(range(len(label_names))):
        return
    found = _dimensions_of_classes(network)
    if found and all(name in absent for name in found):
        return
    if order is not None and found and _permuted(network, found, order):
        return
    if not _drawn(network, found):
        theirs, ours = listed_apart(tuple(str(outputs[key]) for key in sorted(outputs)), tuple(label_names))
        raise ModelError(
            f"'{source}' predicts {theirs}, the task's labels are {ours}, and its output layer was not found",
            "Set student.head = 'shared', or student.init_from to a model without classifier.",
        )


def _order(outputs: Mapping[Any, str], label_names: Sequence[str], *, labels_declared: bool) -> list[int] | None:
    """The output of each task label; None if they are other labels, or it is not known which is which."""
    if [str(outputs[key]) for key in sorted(outputs)] == list(label_names):
        return list(range(len(label_names)))
    try:
        order, generic = class_order_of("", outputs, label_names)
    except ModelError:
        return None
    return list(order) if not generic or numbers_known(label_names, declared=labels_declared) else None


def _dimensions_of_classes(network: PreTrainedModel) -> dict[str, list[int]]:
    """Names of the tensors that grow with the number of classes, with the dimensions that do."""
    shapes = []
    for more in (0, 1):
        config: Any = copy.deepcopy(network.config)
        config.num_labels += more
        with torch.device("meta"):
            shapes.append({name: tensor.shape for name, tensor in type(network)(config).state_dict().items()})
    pairs = {name: (shape, shapes[1].get(name, shape)) for name, shape in shapes[0].items()}
    return {
        name: [place for place, (less, more) in enumerate(zip(*pair, strict=True)) if less != more]
        for name, pair in pairs.items()
        if pair[0] != pair[1]
    }


@torch.no_grad()
def _permuted(network: PreTrainedModel, dimensions: Mapping[str, Sequence[int]], order: Sequence[int]) -> bool:
    """Give output ``order[k]`` the place ``k``; whether the logits of made-up ids are those of before, so ordered."""
    before, places = _logits(network), torch.tensor(order)
    tensors = network.state_dict()
    for name, own in dimensions.items():
        for dimension in own:
            tensors[name].copy_(tensors[name].index_select(dimension, places))
    after = _logits(network)
    if before is None or after is None or before.shape != after.shape:
        return False
    expected = before[:, places]
    return torch.allclose(after, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def _logits(network: PreTrainedModel) -> Tensor | None:
    """Logits [2, classes] of made-up ids; None if the network fails on them."""
    ids = 5 + torch.arange(12).reshape(2, 6) % 5
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    training = network.training
    network.eval()
    try:
        return run_network(network, inputs, hidden_states=False).logits
    except Exception:  # whatever a model raises; the trial of the student tells of it
        return None
    finally:
        network.train(training)


@torch.no_grad()
def _drawn(network: PreTrainedModel, names: Collection[str]) -> bool:
    """Draw the tensors of ``names`` by torch's generator, as transformers draws absent ones; whether that was done."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    before = {name: tensors[name].clone() for name in names}
    above = {name.rsplit(".", count)[0] for name in names for count in range(1, name.count(".") + 1)}
    modules = dict(network.named_modules())
    for name, item in (*modules.items(), *tensors.items()):
        setattr(item, _INITIALISED, name not in above and name not in names and name != "")
    network.initialize_weights()
    for module in modules.values():
        setattr(module, _INITIALISED, True)
    return any(not torch.equal(tensor, tensors[name]) for name, tensor in before.items())
