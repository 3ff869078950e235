"""Modules held by different processes: gradients, norms, the order of parameters, and checkpoints in pieces."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdcache.errors import DamageError
from kdcache.training import checkpoints
from kdcache.training.apart import Apart
from kdcache.training.best_epoch import BestEpoch
from kdcache.training.optim import adamw
from kdcache.training.processes import Processes
from kdcache.training.settings import LoopSettings
from tests.training.threads import in_threads

CPU = torch.device("cpu")
SETTINGS = LoopSettings(
    epochs=1, learning_rate=0.1, lr_by_prefix={"1.encoder.": 0.3, "1.adapter.": 0.3}, decay_by_prefix=True
)
HOLDERS = st.lists(st.integers(0, 2), min_size=3, max_size=5).filter(lambda ranks: set(ranks) == {0, 1, 2})


class Module(nn.Module):
    """A teacher as far as the names and the order of its parameters go."""

    def __init__(self, head: nn.Module, *, adapter: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
        self.adapter = nn.Linear(3, 4, bias=False) if adapter else None
        self.head = head


def whole_model(modules: int) -> nn.ModuleDict:
    """Modules with gradients; every third parameter has none."""
    torch.manual_seed(0)
    head = nn.Linear(4, 2)
    model = nn.ModuleDict({str(number): Module(head, adapter=number % 2 == 1) for number in range(modules)})
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = None if number % 3 == 2 else torch.randn(parameter.shape)
    return model


def held(whole: nn.ModuleDict, ranks: list[int], own: Processes) -> tuple[nn.ModuleDict, list[nn.Parameter]]:
    """The part of the ``whole`` model that a process holds, and the shared head: with its share of that gradient."""
    part = nn.ModuleDict({name: one for name, one in copy.deepcopy(whole).items() if ranks[int(name)] == own.rank})
    for name, parameter in part.named_parameters():
        gradient = whole.get_parameter(name).grad  # a deep copy has none
        parameter.grad = None if gradient is None else gradient.clone()
    shared = list(cast("Module", next(iter(part.values()))).head.parameters())
    for parameter in shared:
        if parameter.grad is not None:
            parameter.grad *= (1 + own.rank) / sum(range(1, own.world + 1))
    return part, shared


def accelerator(scaler: torch.amp.GradScaler | None = None, optimizer: Any = None) -> Any:
    return SimpleNamespace(scaler=scaler, unscale_gradients=lambda: scaler.unscale_(optimizer) if scaler else None)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: one.grad for name, one in model.named_parameters(remove_duplicate=False) if one.grad is not None}


@settings(max_examples=12)
@given(ranks=HOLDERS, longest=st.sampled_from([0.5, 100.0]))
def test_gradients_are_summed_and_clipped_as_those_of_one_process(ranks: list[int], longest: float) -> None:
    one = whole_model(len(ranks))
    before = whole_model(len(ranks))
    norm = nn.utils.clip_grad_norm_(one.parameters(), longest)

    def step(own: Processes) -> tuple[float, dict[str, Tensor], dict[str, float], bool]:
        model, shared = held(before, ranks, own)
        apart = Apart(own, model, shared, SETTINGS, CPU)
        sums, due = apart.add({"loss": 1.0 + own.rank, "ce": torch.tensor(2.0)}, due=own.first)
        found = apart.clip(accelerator(), longest)
        return float(found), gradients(model), {name: float(value) for name, value in sums.items()}, due

    every: dict[str, Tensor] = {}
    for found, own, sums, due in in_threads(3, step):
        assert found == pytest.approx(float(norm), rel=1e-5)
        assert sums == {"loss": 6.0, "ce": 6.0}
        assert due
        every |= own
    torch.testing.assert_close(every, gradients(one))


@settings(max_examples=12)
@given(ranks=HOLDERS)
def test_parameters_have_the_names_and_the_order_of_one_process(ranks: list[int]) -> None:
    one = whole_model(len(ranks))
    names = {id(parameter): name for name, parameter in one.named_parameters()}
    optimizer = adamw(one.named_parameters(), 0.1, 0.01, SETTINGS.lr_by_prefix, decay_by_prefix=True)
    expected = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    for apart in in_threads(3, lambda own: Apart(own, *held(one, ranks, own), SETTINGS, CPU)):
        assert apart.order == expected
        for name, in_whole in apart.names.items():
            assert torch.equal(one.get_parameter(name), one.get_parameter(in_whole))
            assert in_whole in expected


@pytest.mark.parametrize("bad", [None, 0, 1])
def test_an_infinite_gradient_of_one_process_skips_the_step_of_all(bad: int | None) -> None:
    """fp16's scaler looks only at the gradients that its process holds. ``bad``: the process with an infinite one."""
    one = whole_model(2)
    unclipped = whole_model(2)
    norm = nn.utils.clip_grad_norm_(one.parameters(), 0.5)

    def step(own: Processes) -> tuple[bool, float, float]:
        model, shared = held(unclipped, [0, 1], own)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        scaler.scale(torch.ones(1))
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad *= 2.0**10
        if own.rank == bad:
            cast("Any", model[str(own.rank)]).encoder[0].weight.grad[0, 0] = torch.inf
        apart = Apart(own, model, shared, SETTINGS, CPU)
        apart.add({"loss": 0.0}, due=False)
        found = apart.clip(accelerator(scaler, optimizer), 0.5)
        scaler.step(optimizer)
        scaler.update()
        stayed = all(map(torch.equal, before, model.parameters()))
        return stayed, scaler.get_scale(), float(found)

    for stayed, scale, found in in_threads(2, step):
        assert stayed == (bad is not None)
        assert scale == (2.0**10 if bad is None else 2.0**9)
        if bad is None:
            assert found == pytest.approx(float(norm), rel=1e-5)


def pieces(own: Processes, directory: Path, step: int, fails: int | None = None) -> None:
    content = {"model": {f"{own.rank}.weight": torch.full((2,), float(step))}, "optimizer": {f"{own.rank}.weight": 7}}
    if own.rank == fails:
        content["model"] = cast("Any", _Unsavable())
    checkpoints.save_pieces(
        directory, {"rest": {"step": step}}, content, step=step, identity={"data": "a"}, processes=own
    )


class _Unsavable:
    def __reduce__(self) -> str:
        raise OSError("No space left")


def test_a_checkpoint_in_pieces_is_there_when_all_are(tmp_path: Path) -> None:
    in_threads(2, lambda own: pieces(own, tmp_path, 3))
    with pytest.raises((OSError, RuntimeError)):
        in_threads(2, lambda own: pieces(own, tmp_path, 5, fails=1), seconds=0.2)
    saved = checkpoints.open_latest(tmp_path, identity={"data": "a"})
    assert saved is not None
    assert saved.read("rest") == {"step": 3}
    assert (saved.keys, saved.pieces) == (["rest"], ["piece-0000", "piece-0001"])
    in_threads(2, lambda own: pieces(own, tmp_path, 6))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000006"]


def test_a_process_reads_the_pieces_of_its_modules_and_no_others(tmp_path: Path) -> None:
    in_threads(3, lambda own: pieces(own, tmp_path, 3))
    saved = checkpoints.open_step(tmp_path, 3)
    names = [f"{rank}.weight" for rank in range(3)]
    for wanted in itertools.chain.from_iterable(itertools.combinations(names, size) for size in (1, 2, 3)):
        for rank in range(4):
            found = saved.read_pieces({"model": wanted, "optimizer": wanted}, rank)
            assert found["model"].keys() == set(wanted)
            assert found["optimizer"] == dict.fromkeys(wanted, 7)
    (saved.path / "piece-0000.pt").unlink()
    assert saved.read_pieces({"model": {"1.weight"}}, 1)["model"].keys() == {"1.weight"}
    with pytest.raises(DamageError, match=r"piece-0000\.pt"):
        saved.read_pieces({"model": {"0.weight"}}, 1)


def test_the_best_weights_are_found_in_pieces_and_whole(tmp_path: Path) -> None:
    best = BestEpoch(tmp_path, tmp_path, {})
    weights = {f"{rank}.weight": torch.full((2,), float(rank)) for rank in range(2)}

    def keep(own: Processes) -> None:
        name = f"{own.rank}.weight"
        best.keep_pieces(0, {"metrics": {}}, {"model": {name: weights[name]}}, own)

    in_threads(2, keep)
    best.keep(1, {"model": weights, "metrics": {}})
    for mark in (0, 1):
        for names in (["1.weight"], ["0.weight", "1.weight"]):
            found = best.model(mark, names, 0)
            assert {name: tensor.tolist() for name, tensor in found.items()} == {
                name: weights[name].tolist() for name in names
            }
    (tmp_path / "step-00000001" / "piece-0001.pt").write_bytes(b"")
    with pytest.raises(DamageError) as caught:
        best.model(0, ["1.weight"], 0)
    assert "The weights of the best epoch are lost" in caught.value.hint
