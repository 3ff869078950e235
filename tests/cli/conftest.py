"""A finished run of the tiny review task, made once through the command line; tests that change something copy it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.commands import Said, kdcache


@dataclass(frozen=True)
class FinishedRun:
    """``runs`` is the output directory, ``root`` the run in it; ``said`` is what ``kdcache run`` printed."""

    recipe: Path
    runs: Path
    said: Said

    @property
    def root(self) -> Path:
        return self.runs / "reviews"

    def call(self, command: str, *arguments: object) -> Said:
        """A command on the recipe of the run."""
        return kdcache(command, self.recipe, "--output-dir", self.runs, *arguments)


@pytest.fixture(scope="session")
def finished(review_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    runs = tmp_path_factory.mktemp("runs")
    said = kdcache("run", review_recipe, "--output-dir", runs)
    assert said.code == 0, said.err
    return FinishedRun(review_recipe, runs, said)


@pytest.fixture
def copied(finished: FinishedRun, tmp_path: Path) -> FinishedRun:
    """The finished run in a place of its own."""
    shutil.copytree(finished.runs, tmp_path / "runs")
    return FinishedRun(finished.recipe, tmp_path / "runs", finished.said)
