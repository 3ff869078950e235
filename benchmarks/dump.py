"""Measures the overhead of a dump: rows per second, compared with a bare forward loop over the same batches.

    python benchmarks/dump.py quickstart/quickstart.toml --teachers runs/quickstart/teachers --texts 2048

For each teacher and backend the two are interleaved. `bare` runs the model over the length-sorted batches and reads
only the logits. `dump` does the work of `kdcache dump-teachers` for the same texts, into a new cache with bases. The
pass that fits the bases is timed separately, and so is the writer thread, which overlaps with the next part. Storing
overlaps with the next forward pass if a core is free, so the ratio of CPU times is reported besides that of wall times.
onnxruntime is measured if it is installed; its export is not timed. ``--only`` takes some of the recipe's teachers.
Prints JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from measure import machine, ratio, rounds, summary

from kdcache.cache.spec import PART_SIZE, Settings
from kdcache.cache.writer import CacheWriter, open_writer
from kdcache.data.task import load_task
from kdcache.dump import run as dump_run
from kdcache.dump.engine import fit_bases
from kdcache.dump.run import open_teacher, run_teacher, text_batches
from kdcache.dump.specs import PreparedTeacher, Texts, prepare_teachers, scopes, task_spec
from kdcache.progress import SilentProgress
from kdcache.recipe import Recipe, load_recipe
from kdcache.teachers.bundle import read_bundle

if TYPE_CHECKING:
    from kdcache.dump.engine import TextBatches
    from kdcache.teachers.backends import TeacherBackend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--teachers", type=Path, required=True, help="directory of the co-finetuned teachers")
    parser.add_argument("--texts", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", metavar="TEACHER")
    parser.add_argument("--backends", nargs="*", default=["torch", "onnxruntime"])
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"machine": machine(), "recipe": arguments.recipe, "texts": arguments.texts}
    for backend in arguments.backends:
        sizes = f"dump.part_size={max(1, arguments.texts // 4)}"
        recipe = load_recipe(arguments.recipe, [*arguments.overrides, f"dump.backend={backend}", sizes])
        if arguments.only:
            kept = [teacher for teacher in recipe.teachers if teacher.name in arguments.only]
            recipe = recipe.model_copy(update={"teachers": kept})
        report[backend] = measure_backend(recipe, arguments)
    if {"torch", "onnxruntime"} <= report.keys():
        report["onnxruntime / torch, rows per second of the bare loop"] = {
            name: report["onnxruntime"][name]["bare, rows per second"]["median"]
            / found["bare, rows per second"]["median"]
            for name, found in report["torch"].items()
        }
    json.dump(report, sys.stdout, indent=2)
    print()


def measure_backend(recipe: Recipe, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every teacher of the recipe through one backend."""
    task = load_task(recipe.data)
    bundle = read_bundle(arguments.teachers)
    texts = dict(list(scopes(task).full.items())[: arguments.texts])
    found = {}
    for teacher in prepare_teachers(recipe, bundle, arguments.teachers, len(task.label_names)):
        print(f"{recipe.dump.backend}: {teacher.name}", file=sys.stderr, flush=True)
        settings = Settings(recipe.dump.seed, recipe.dump.part_size or PART_SIZE)
        with (
            tempfile.TemporaryDirectory() as folder,
            open_writer(Path(folder) / "cache", task_spec(task), settings) as writer,
        ):
            writer.add_texts(texts, {})
            writer.declare_teacher(teacher.spec, teacher.tokenizer_json)
            with open_teacher(teacher, arguments.teachers) as backend:
                contest = Contest(writer, teacher, backend, recipe, arguments.teachers, texts)
                found[teacher.name] = contest.run(arguments.rounds)
    return found


class Contest:
    """The bare loop and the dump of one teacher, over the same parts."""

    def __init__(
        self,
        writer: CacheWriter,
        teacher: PreparedTeacher,
        backend: TeacherBackend,
        recipe: Recipe,
        teachers_dir: Path,
        texts: Texts,
    ) -> None:
        self.teacher, self.backend = teacher, backend
        self.teachers_dir, self.texts = teachers_dir, texts
        self.layers = tuple(teacher.spec.layers)
        self.tokens_per_batch = recipe.dump.shared_batch_tokens
        self.parts = [(part, writer.texts_of(part)) for part in writer.parts]
        self.writer = writer
        self.writing: list[float] = []
        self.processor: dict[str, list[float]] = {"bare": [], "dump": []}

    def run(self, count: int) -> dict[str, Any]:
        texts = sum(len(part) for _, part in self.parts)
        began = time.perf_counter()
        bases = self.fit()
        fitting = time.perf_counter() - began
        self.writer.write_bases(self.teacher.name, bases)
        self.bare()  # warm-up
        self.processor["bare"].clear()
        taken = rounds({"bare": self.bare, "dump": lambda: self.dump(bases)}, count)
        rates = {name: [texts / seconds for seconds in values] for name, values in taken.items()}
        return {
            **{f"{name}, rows per second": summary(values) for name, values in rates.items()},
            "time of the dump / time of the bare loop": ratio(taken["dump"], taken["bare"]),
            "processor time of the dump / of the bare loop": ratio(self.processor["dump"], self.processor["bare"]),
            "writing / time of the dump": ratio(self.writing, taken["dump"]),
            "fitting the bases, s": fitting,
        }

    def fit(self) -> dict[int, Any]:
        part, texts = self.parts[0]
        batches = self.batches(texts, part.text_ids)
        return fit_bases(batches, self.backend, self.teacher.spec.layers, self.teacher.seed, lambda _: None)

    def bare(self) -> float:
        """Tokenisation and forward passes, until the logits are computed."""
        began, processor = time.perf_counter(), time.process_time()
        for part, texts in self.parts:
            for _, output in self.batches(texts, part.text_ids).run(self.backend, self.layers):
                output.logits.cpu()
        self.processor["bare"].append(time.process_time() - processor)
        return time.perf_counter() - began

    def dump(self, bases: dict[int, Any]) -> float:
        """What ``kdcache dump-teachers`` does for a teacher that is loaded and has its bases."""
        name, seconds = self.teacher.name, [0.0]
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as patches:
            writer = patches.enter_context(
                open_writer(Path(folder) / "cache", self.writer.contents.task, self.writer.contents.settings)
            )
            writer.add_texts(self.texts, {})
            missing = writer.declare_teacher(self.teacher.spec, self.teacher.tokenizer_json)
            writer.write_bases(name, bases)
            patches.enter_context(mock.patch.object(dump_run, "measured_record", lambda *_: {}))  # of seconds
            patches.enter_context(mock.patch.object(writer, "write_part", timed(writer.write_part, seconds)))
            began, processor = time.perf_counter(), time.process_time()
            run_teacher(
                writer, self.teacher, missing, self.teachers_dir, self.tokens_per_batch, SilentProgress(),
                lambda *_: contextlib.nullcontext(self.backend),
            )  # fmt: skip
            taken = time.perf_counter() - began
            self.processor["dump"].append(time.process_time() - processor)
        self.writing.append(seconds[0])
        return taken

    def batches(self, texts: Any, text_ids: Any) -> TextBatches:
        return text_batches(self.teacher, texts, text_ids, self.tokens_per_batch)


def timed(action: Callable[..., int], seconds: list[float]) -> Callable[..., int]:
    """``action``, which adds the time that it takes to the one number of ``seconds``."""

    def run(*arguments: Any, **named: Any) -> int:
        began = time.perf_counter()
        try:
            return action(*arguments, **named)
        finally:
            seconds[0] += time.perf_counter() - began

    return run


if __name__ == "__main__":
    main()
