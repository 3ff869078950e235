"""Teachers beside a cache: loaded and measured once per process, as long as their files stay as they are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdcache.cache.reader import open_cache
from kdcache.distill.teachers_at_hand import check_teachers, teachers_beside
from kdcache.errors import MismatchError
from kdcache.teachers import bundle
from kdcache.testing.teachers import make_teachers
from tests.conftest import TinyRun

TEXTS = [("the film is good",), ("the plot is bad",)]


def test_a_process_loads_a_teacher_once_until_its_files_change(
    tiny_run: TinyRun, copied: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers, cache, loaded = copied(tiny_run.teachers), open_cache(tiny_run.cache), []
    load = bundle.load_teacher

    def counting(directory: Path, name: str, *args: Any, **options: Any) -> Any:
        loaded.append(name)
        return load(directory, name, *args, **options)

    monkeypatch.setattr(bundle, "load_teacher", counting)
    first = check_teachers(teachers, cache, ["bert", "xlm"], TEXTS)
    assert check_teachers(teachers, cache, ["xlm", "bert"], TEXTS) == first
    assert loaded == ["bert", "xlm"]
    config = teachers / "bert" / "tokenizer_config.json"
    os.utime(config, ns=(0, 0))
    check_teachers(teachers, cache, ["bert", "xlm"], TEXTS)
    assert loaded == ["bert", "xlm", "bert"]
    weights = teachers / "xlm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    with pytest.raises(MismatchError, match="xlm"):
        check_teachers(teachers, cache, ["xlm"], TEXTS)


def test_another_teacher_is_refused_every_time(tiny_run: TinyRun, tmp_path: Path) -> None:
    other = make_teachers(tmp_path / "other", {"bert": "bert"}, seed=5)
    cache = open_cache(tiny_run.cache)
    assert check_teachers(tiny_run.teachers, cache, ["bert"], TEXTS)["bert"].parameters > 0
    for _ in range(2):
        with pytest.raises(MismatchError, match=r"is not the one of cache .* they differ in weights"):
            check_teachers(other, cache, ["bert"], TEXTS)


def test_a_student_of_a_sweep_finds_the_teachers_of_its_run(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "reviews"
    student = run / "sweep" / "0123456789ab-s0"
    student.mkdir(parents=True)
    (run / "teachers").symlink_to(tiny_run.teachers)
    assert teachers_beside(None, student) == run / "teachers"
    assert teachers_beside(None, run) == run / "teachers"
    assert teachers_beside(None, run / "sweep" / "something-else") is None
