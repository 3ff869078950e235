"""Co-finetuning that is interrupted, in this process and by SIGKILL, ends with the weights of an undisturbed one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kdcache.progress import SilentProgress
from kdcache.teachers.cofinetune import cofinetune

if TYPE_CHECKING:
    from kdcache.recipe import Recipe


class Interrupting(SilentProgress):
    """Ctrl-C after so many optimizer steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, count: int, *, bytes_done: int = 0, **values: float) -> None:
        self.left -= 1 if "loss" in values else 0
        if self.left == 0:
            raise KeyboardInterrupt


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    return {}


@pytest.mark.parametrize("after", [1, 3, 5, 6, 9, 12])
def test_interrupted_training_continues_to_the_same_bytes(
    after: int, recipe: Recipe, tmp_path: Path, undisturbed: dict[str, dict[str, bytes]]
) -> None:
    if not undisturbed:
        cofinetune(recipe, tmp_path / "whole", tmp_path / "whole-work", progress=SilentProgress())
        undisturbed["teachers"] = files(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        cofinetune(recipe, tmp_path / "teachers", tmp_path / "work", progress=Interrupting(after))
    assert not (tmp_path / "teachers" / "teachers.json").exists()
    cofinetune(recipe, tmp_path / "teachers", tmp_path / "work", progress=SilentProgress())
    assert files(tmp_path / "teachers") == undisturbed["teachers"]
