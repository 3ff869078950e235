"""Pipelines: listed, copied, checked; in a checkout and in an installed wheel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdcache.cli import pipelines
from kdcache.recipe import load_recipe
from tests.cli.commands import kdcache

NAMES = ["mind-few", "mind", "quickstart", "rte", "sst2-ablations", "sst2-alone", "sst2-transfer", "sst2"]


def test_ls() -> None:
    said = kdcache("pipelines", "ls", "--json")
    assert [entry["name"] for entry in json.loads(said.out)] == NAMES
    assert all(len(entry["about"]) > 30 for entry in json.loads(said.out))


@pytest.mark.parametrize("name", NAMES)
def test_every_pipeline_is_valid_and_says_what_it_does_needs_costs_and_reached(name: str) -> None:
    path = pipelines.folder() / f"{name}.toml"
    recipe = load_recipe(path)
    assert recipe.name == name
    assert len(recipe.teachers) >= 2
    assert recipe.student is not None
    comments = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#")).lower()
    for word in ("does", "needs", "costs", "reached"):
        assert word in comments


def test_the_ablations_are_those_of_the_paper_on_the_cache_of_sst2_transfer() -> None:
    path = pipelines.folder() / "sst2-ablations.toml"
    recipe, plain = load_recipe(path), load_recipe(pipelines.folder() / "sst2-transfer.toml", ["data.transfer=[]"])
    assert recipe.sweep is not None
    assert recipe.data == plain.data.model_copy(update={"transfer_rows": recipe.data.transfer_rows})
    same = ("teachers", "cofinetune", "dump", "student")
    assert all(getattr(recipe, section) == getattr(plain, section) for section in same)
    cells = [load_recipe(path, [], cell).distill for cell in recipe.sweep.settings()]
    assert [cells[0].method, cells[1]] == ["fine-tune", recipe.distill]
    losses = [(cell.weights.task, cell.weights.soft, cell.weights.hidden) for cell in cells]
    assert losses[2:5] == [(0, 1, 0.1), (1, 0, 0.1), (1, 1, 0)]
    fewer = [cell for cell in cells if cell.teachers is not None]
    assert [len(cell.teachers or ()) for cell in fewer] == [1, 1, 1, 2, 2, 2]
    assert len({tuple(cell.teachers or ()) for cell in fewer}) == 6
    assert {cell.weights.soft * len(cell.teachers or ()) for cell in fewer} == {float(len(recipe.teachers))}
    assert cells[-1].teacher_weights == "fitted"
    alone = load_recipe(pipelines.folder() / "sst2-alone.toml")
    assert alone.data == recipe.data
    assert [(each.name, each.head) for each in alone.teachers] == [(each.name, "own") for each in recipe.teachers]
    assert (alone.dump, alone.student, alone.distill) == (recipe.dump, recipe.student, recipe.distill)
    assert f"# Costs:  {len(cells) * len(recipe.sweep.seeds)} students" in path.read_text()


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ('{"distill.methods"=["kd"]}', "unknown key 'distill.methods'"),
        ('{"distill.method"=["kd", "nd"]}', "no distillation method 'nd'"),
    ],
)
def test_validate_checks_the_cells_of_a_sweep(grid: str, message: str) -> None:
    said = kdcache("pipelines", "validate", pipelines.folder() / "sst2.toml", "--set", f"sweep.grid={grid}")
    assert said.code == 2
    assert message in said.err


def test_cp_and_validate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert kdcache("pipelines", "cp", "sst2").out == "sst2.toml\n"
    assert kdcache("pipelines", "cp", "sst2", tmp_path / "mine.toml").code == 0
    assert (tmp_path / "mine.toml").read_text() == (pipelines.folder() / "sst2.toml").read_text()
    said = kdcache("pipelines", "validate", "mine.toml", "--set", "distill.seed=3", "--json")
    assert json.loads(said.out)["recipe"]["distill"]["seed"] == 3
    assert kdcache("pipelines", "validate", "mine.toml").out.startswith("mine.toml is valid: 'sst2', teachers: ")


def test_cp_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "sst2.toml").write_text("mine")
    said = kdcache("pipelines", "cp", "sst2", tmp_path)
    assert said.code == 2
    assert "exists already" in said.err
    assert (tmp_path / "sst2.toml").read_text() == "mine"


@pytest.mark.parametrize("command", ["cp", "prepare"])
def test_an_unknown_pipeline_names_those_there_are(command: str) -> None:
    said = kdcache("pipelines", command, "sst3")
    assert said.code == 2
    assert ("quickstart" in said.err) is True


def test_an_installed_wheel_carries_the_pipelines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``pyproject.toml`` promises hatch, in the place where ``folder`` looks first."""
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {"pipelines": "kdcache/pipelines"}
    package = tmp_path / "kdcache" / "cli"
    package.mkdir(parents=True)
    (tmp_path / "kdcache" / "pipelines").mkdir()
    monkeypatch.setattr(pipelines, "__file__", str(package / "pipelines.py"))
    assert pipelines.folder() == tmp_path / "kdcache" / "pipelines"
