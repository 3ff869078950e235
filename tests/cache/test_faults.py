"""Dying at every step of the disk, and a disk that is full at every step.

The rerun ends where an undisturbed run ends.
"""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kdcache.cache.reader import open_cache
from kdcache.cache.verify import unreferenced, verify
from kdcache.codecs.base import LayerSpec
from kdcache.errors import StorageError
from kdcache.files import use_disk, write_file
from kdcache.testing.caches import LAYERS, Plan, dump, made_plan, made_teacher, made_texts
from kdcache.testing.faults import Died, count_steps, counting_disk, dying_disk, failing_disk, flip_bit, run_with_fault

SMALL = made_plan(5, 2, ["bert"])
GROWN = Plan(
    SMALL.train | made_texts(2, "more") | dict(list(SMALL.test.items())[:1]),
    SMALL.test,
    (
        made_teacher("bert", {**LAYERS, 3: LayerSpec("random", 2, "float16")}),
        made_teacher("electra", {1: LayerSpec("pca", 2, "int8")}),
    ),
)


def steps_of(path: Path, plan: Plan) -> int:
    disk = counting_disk()
    with use_disk(disk):
        dump(path, plan)
    return len(disk.steps)


def kill_everywhere(tmp_path: Path, before: Plan | None, plan: Plan, every: int = 1) -> None:
    """Die at every step of the dump that leads from ``before`` to ``plan``.

    The rerun must end like an undisturbed run.
    """
    start, whole = tmp_path / "start", tmp_path / "whole"
    old = dump(start, before).identity if before else None
    if before:
        shutil.copytree(start, whole)
    steps = steps_of(whole, plan)
    expected = open_cache(whole).identity
    leftovers = unreferenced(whole)
    assert steps > 20
    for step in range(1, steps + 1, every):
        path = tmp_path / "killed"
        if before:
            shutil.copytree(start, path)
        with use_disk(dying_disk(step)), pytest.raises(Died):
            dump(path, plan)
        if before:  # what was published stays readable
            assert open_cache(path).identity in (old, expected)
            assert step % 5 or verify(path) == []
        assert dump(path, plan).identity == expected, f"step {step}"
        assert unreferenced(path) == leftovers
        assert step % 5 or verify(path) == []
        shutil.rmtree(path)


def test_a_first_dump_survives_death_at_every_step(tmp_path: Path) -> None:
    kill_everywhere(tmp_path, None, SMALL)


def test_a_growing_dump_survives_death_at_every_step(tmp_path: Path) -> None:
    kill_everywhere(tmp_path, SMALL, GROWN)


def test_two_deaths_in_a_row(tmp_path: Path) -> None:
    expected = dump(tmp_path / "whole", SMALL).identity
    for first, second in [(30, 3), (60, 40), (90, 10), (100, 25)]:
        path = tmp_path / f"killed-{first}"
        for step in (first, second):
            with use_disk(dying_disk(step)), pytest.raises(Died):
                dump(path, SMALL)
        assert dump(path, SMALL).identity == expected


def test_a_process_that_is_killed_at_any_moment(tmp_path: Path) -> None:
    plan = made_plan(120, 40)
    expected = dump(tmp_path / "whole", plan).identity
    code = (
        "import sys; from pathlib import Path; from kdcache.testing.caches import *; print('on', flush=True); "
        "dump(Path(sys.argv[1]), made_plan(120, 40))"
    )
    for moment in (0.002, 0.05, 0.15):
        command = [sys.executable, "-c", code, str(tmp_path / "killed")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "on\n"
            time.sleep(moment)
            process.kill()
        assert dump(tmp_path / "killed", plan).identity == expected
        assert verify(tmp_path / "killed") == []
        shutil.rmtree(tmp_path / "killed")


def test_a_command_line_runs_with_a_faulty_disk(pristine: Path, tmp_path: Path) -> None:
    assert count_steps(["cache", "info", str(pristine)], tmp_path / "steps.txt") == []
    done = run_with_fault(["cache", "verify", str(pristine)], die_at=1)
    assert done.returncode == 0, done.stderr


def test_a_full_disk_at_every_step_loses_nothing(tmp_path: Path) -> None:
    steps = steps_of(tmp_path / "whole", SMALL)
    expected = open_cache(tmp_path / "whole").identity
    for step in range(1, steps + 1, 2):
        path = tmp_path / "full"
        with use_disk(failing_disk(step)), pytest.raises(StorageError, match="No space left on device") as caught:
            dump(path, SMALL)
        assert "Free some space" in caught.value.hint
        assert dump(path, SMALL).identity == expected, f"step {step}"
        shutil.rmtree(path)


def test_a_disk_that_fails_once_leaves_no_temporary_file(tmp_path: Path) -> None:
    with use_disk(failing_disk(2, errno.EIO, once=True)), pytest.raises(StorageError, match="Input/output error"):
        write_file(tmp_path / "file", b"content")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_repair_goes_on(tmp_path: Path) -> None:
    start = tmp_path / "start"
    identity = dump(start, SMALL).identity
    for name in ("outputs/part-00000.arrow", "hidden/part-00001.zarr/layer-04/c/0/0", "basis/layer-02.safetensors"):
        flip_bit(start / "teachers/bert" / name)
    flip_bit(start / "texts/part-00000.arrow")
    disk = counting_disk()
    shutil.copytree(start, tmp_path / "whole")
    with use_disk(disk):
        assert dump(tmp_path / "whole", SMALL, repair=True).identity == identity
    for step in range(1, len(disk.steps) + 1):
        path = tmp_path / "killed"
        shutil.copytree(start, path)
        with use_disk(dying_disk(step)), pytest.raises(Died):
            dump(path, SMALL, repair=True)
        assert dump(path, SMALL, repair=True).identity == identity, f"step {step}"
        assert verify(path) == []
        shutil.rmtree(path)


def test_damage_to_a_dump_under_way_is_repaired(tmp_path: Path) -> None:
    expected = dump(tmp_path / "whole", SMALL).identity
    steps = counting_disk()
    with use_disk(steps):
        dump(tmp_path / "count", SMALL)
    late = next(
        index for index, step in enumerate(steps.steps) if step.endswith("cache/manifest.json") or "manifest" in step
    )
    with use_disk(dying_disk(late)), pytest.raises(Died):
        dump(tmp_path / "c", SMALL)
    flip_bit(tmp_path / "c/teachers/bert/outputs/part-00001.arrow")
    flip_bit(tmp_path / "c/text/part-00000.arrow")
    assert dump(tmp_path / "c", SMALL, repair=True).identity == expected
    assert verify(tmp_path / "c") == []


@pytest.mark.parametrize(
    "change", [lambda data: data[:-9], lambda data: data.replace(b'"texts":4', b'"texts":3'), lambda _: b""]
)
def test_a_damaged_commit_record_is_named(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    from kdcache.cache.writer import open_writer
    from kdcache.errors import DamageError

    with open_writer(tmp_path / "c", SMALL.task, SMALL.settings) as writer:
        writer.add_texts(SMALL.train, SMALL.test)
    record = tmp_path / "c/.dump/parts/part-00000.json"
    record.write_bytes(change(record.read_bytes()))
    with pytest.raises(DamageError, match=r"part-00000\.json' is damaged"):
        dump(tmp_path / "c", replace(SMALL, teachers=()))
