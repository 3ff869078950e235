"""How long ``kdcache weigh`` takes, by rows and classes: the whole command in a process of its own.

    python benchmarks/weigh.py --rows 10000 100000 --classes 2 14

Made-up caches of three teachers with logits alone: two that know the label to different degrees and one that does not.
Prints JSON: wall and processor seconds and the weights that were found. The least of the repeats counts: other work on
the same cores makes a process slower, never faster.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import machine

KNOWS = (2.5, 1.5, 0.0)  # how much of the label is in the logits of each teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--classes", type=int, nargs="*", default=[2, 14])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    report: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["KDCACHE_HOME"] = str(Path(folder) / "home")
        for rows in arguments.rows:
            for classes in arguments.classes:
                cache = Path(folder) / f"{rows}-{classes}"
                write(cache, rows, classes)
                report[f"{rows} rows, {classes} classes"] = measured(cache, arguments.repeats)
    print(json.dumps(report, indent=1))


def write(path: Path, rows: int, classes: int) -> None:
    """A cache of ``rows`` validation texts."""
    from kdcache.cache.ids import id_array, text_id
    from kdcache.cache.spec import Fingerprints, Settings, TargetSpec, TaskSpec, TeacherSpec
    from kdcache.cache.tokens import Outputs
    from kdcache.cache.writer import open_writer
    from kdcache.files import use_disk
    from kdcache.testing.faults import UnsyncedDisk

    rng = np.random.default_rng(0)
    texts = {text_id((f"text {index}",)): (f"text {index}",) for index in range(rows)}
    label_of = dict(zip(texts, rng.integers(0, classes, rows).tolist(), strict=True))
    task = TaskSpec(("sentence",), tuple(str(label) for label in range(classes)))
    prints = Fingerprints(*("0" * 64,) * 4)
    with use_disk(UnsyncedDisk()), open_writer(path, task, Settings(0, 4096)) as writer:
        writer.add_texts({}, texts)
        for index, knows in enumerate(KNOWS):
            spec = TeacherSpec(
                f"teacher-{index}", "shared", prints, 2, 8, 32, "longest_first", "torch", "float32",
                TargetSpec(shape=(classes,)), None, 16, {},
            )  # fmt: skip
            for task_ in writer.declare_teacher(spec, "{}"):
                ids = task_.part.text_ids
                logits = rng.standard_normal((len(ids), classes), dtype=np.float32)
                labels = [label_of[text.tobytes()] for text in ids]
                logits[np.arange(len(ids)), labels] += knows
                writer.write_part(spec.name, task_.part, outputs=Outputs(3 * logits), tokens=None, hidden={})
        writer.write_examples("validation", id_array(texts), np.array(list(label_of.values())), None)
        writer.publish({})


def measured(cache: Path, repeats: int) -> dict[str, Any]:
    """The least wall and processor seconds of the command."""
    walls, processors = [], []
    for _ in range(repeats):
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        command = [sys.executable, "-m", "kdcache", "weigh", str(cache), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        walls.append(time.perf_counter() - began)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processors.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    teachers = json.loads(done.stdout)["teachers"]
    weights = [each["weight"] for each in teachers.values()]
    return {"wall, s": round(min(walls), 2), "processor, s": round(min(processors), 2), "weights": weights}


if __name__ == "__main__":
    main()
