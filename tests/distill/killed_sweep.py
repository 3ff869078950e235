"""Runs a sweep undisturbed, and once more in processes that are killed at random moments; compares the two tables.

    python tests/distill/killed_sweep.py --output DIR                       # 24 students, five kills, its own tiny task
    python tests/distill/killed_sweep.py --output DIR --recipe RECIPE --cache CACHE --cells 2 --seeds 2 --kills 3

A moment is an optimizer step of any student, or a system step of writing (``kdcache.testing.killing``). Prints a JSON
line: how the processes ended, and whether the tables are the same in all but times. Exit code 1 if they are not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from threads, and one thread repeats exactly

from kdcache.cli.main import main as kdcache
from kdcache.distill.stage import DistillTask
from kdcache.testing.killing import run_child

RATES = [1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 2e-3, 3e-3]


def main() -> int:
    """Exit code 0 if the killed sweep ends with the table of the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--cells", type=int, default=8, help=f"learning rates, at most {len(RATES)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    import_all()
    recipe, cache = (options.recipe, options.cache) if options.recipe else tiny_task(options.output / "task")
    settings = [f'sweep.grid={{"distill.learning_rate"={RATES[: options.cells]}}}']
    settings += [f"sweep.seeds={list(range(options.seeds))}", "sweep.select_by=loss", "distill.checkpoint_steps=3"]
    whole, cut = options.output / "whole", options.output / "killed"
    statuses = [run(recipe, cache, whole, settings, "end")]
    students = options.cells * options.seeds
    points = moments(options.kills, students, random.Random(options.seed))
    statuses += [run(recipe, cache, cut, settings, point) for point in points]
    statuses.append(run(recipe, cache, cut, settings, "end"))
    same = table(whole) == table(cut)
    killed = sum(status != 0 for status in statuses[1:-1])
    report = {"students": students, "moments": points, "killed": killed, "same_table": same, "statuses": statuses}
    print(json.dumps(report))
    return 0 if same and statuses[0] == statuses[-1] == 0 and killed == options.kills else 1


def moments(count: int, students: int, rng: random.Random) -> list[str]:
    """Points before the end of the sweep: a student has 8 steps and more than 30 system steps of writing."""
    share = max(1, students // (count + 1))
    return [
        f"step:{rng.randint(1, 8 * share)}" if rng.random() < 0.5 else f"disk:{rng.randint(1, 30 * share)}"
        for _ in range(count)
    ]


def run(recipe: Path, cache: Path, output: Path, settings: Sequence[str], point: str) -> int:
    """The status of a child that runs ``kdcache sweep`` and dies at ``point``."""
    arguments = ["sweep", recipe, "--cache", cache, "--output-dir", output]
    arguments += [argument for setting in settings for argument in ("--set", setting)]

    def action() -> None:
        with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):
            kdcache([str(argument) for argument in arguments])

    return run_child(action, DistillTask, point)


def table(output: Path) -> dict[str, Any]:
    """sweep.json without times."""
    (path,) = output.glob("*/sweep/sweep.json")
    return {key: value for key, value in json.loads(path.read_text()).items() if key != "cost"}


def tiny_task(directory: Path) -> tuple[Path, Path]:
    """A recipe and a cache of two tiny teachers, made on the spot."""
    from kdcache.dump.stage import dump_teachers
    from kdcache.progress import SilentProgress
    from kdcache.recipe import load_recipe
    from kdcache.testing.teachers import make_teachers
    from kdcache.testing.tiny import reviews, write_reviews

    directory.mkdir(parents=True, exist_ok=True)
    rows = reviews(184, seed=1)
    for name, first, last in (("train", 0, 96), ("dev", 96, 128), ("test", 128, 160)):
        write_reviews(directory / f"{name}.tsv", rows[first:last])
    write_reviews(directory / "more.tsv", rows[160:], labelled=False)
    teachers = make_teachers(directory / "teachers", {"bert": "bert", "roberta": "roberta"}, widths={"roberta": 24})
    tables = "".join(f'[[teachers]]\nname = "{name}"\nmodel = "{teachers / name}"\n' for name in ("bert", "roberta"))
    recipe = directory / "recipe.toml"
    recipe.write_text(RECIPE + tables)
    cache = directory / "cache"
    if not (cache / "manifest.json").exists():
        dump_teachers(load_recipe(recipe), teachers, cache, progress=SilentProgress())
    return recipe, cache


RECIPE = """\
name = "reviews"
[data]
train = "train.tsv"
validation = "dev.tsv"
test = "test.tsv"
transfer = ["more.tsv"]
text = ["sentence"]
label = "label"
max_length = 32
[dump]
dim = 8
part_size = 32
sample_texts = 64
[student]
init_from = "teacher:bert"
layers = 2
[distill]
epochs = 1
batch_size = 16
window = 2
"""


def import_all() -> None:
    """What children would each import for themselves."""
    import accelerate
    import zarr
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_MAPPING, BertConfig, RobertaConfig

    assert accelerate
    assert zarr
    assert MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[BertConfig]
    assert [MODEL_MAPPING[kind] for kind in (BertConfig, RobertaConfig)]


if __name__ == "__main__":
    sys.exit(main())
