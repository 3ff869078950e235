"""Fills the tables of docs/gpu.md, in pieces: what a GPU does with a student's step, the dump and co-finetuning.

    python benchmarks/gpu.py            # again and again, until it says that nothing is left
    python benchmarks/gpu.py --quick    # the same programs with tiny models; the figures mean nothing
    python benchmarks/gpu.py --page     # only write the page again from the results

A call ends after ``--minutes``. Each piece appends one line to ``--results``; pieces that are there are not run again.
Models have usual sizes (three teachers of 12 layers x 768, students of 6 and 3) and random weights, so nothing is
downloaded. The models and the cache are in ``--work``; where they are missing they are made again.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import gpu_page
import pieces
from gpu_material import WORDS_OF_TEXTS
from pieces import HERE, Piece

FILLED = "--set dump.tokens_per_batch=16384"  # enough to fill a large GPU
STEPS = "--contenders fine-tune memory cached live --counts 3 --free-running"
OPTIONS = {  # each against the steps of the student with 6 layers, tf32 against float32
    "compile": "--set distill.compile=true",
    "adamw": "--set distill.fused_adamw=false",
    "float32": "--set distill.precision=float32",
    "float32 with tf32": "--set distill.precision=float32 --set distill.tf32=true",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models, few steps; also without a GPU")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--to", type=Path, default=HERE.parent / "docs" / "gpu.md")
    pieces.arguments(parser, HERE / "measured" / "gpu.jsonl")
    given = parser.parse_args()
    left = 0 if given.page else pieces.run(planned(given.work, quick=given.quick), given)
    gpu_page.write(given.results, given.to)
    print(f"{left} pieces are left: run the same command again" if left else given.to)


def planned(work: Path, *, quick: bool) -> list[Piece]:
    """All pieces, in the order in which one needs the other."""
    recipe, run = work / "material" / "recipe.toml", work / "gpu"
    teachers, cache = run / "teachers", run / "cache"
    sizes = "--width 16 --depth 2 --rows 48 --words 6 --batch 16 --vocabulary 512" if quick else ""
    kdcache = f"-m kdcache {{}} {shlex.quote(str(recipe))} --output-dir {shlex.quote(str(work))}"
    made = [
        _piece("material", f"{HERE / 'gpu_material.py'} --to {work / 'material'} {sizes}", makes=recipe),
        _piece("teachers", kdcache.format("cofinetune") + " --json", makes=teachers / "teachers.json"),
        _piece("cache", kdcache.format("dump-teachers") + " --json", makes=cache / "manifest.json"),
    ]
    return [*made, *(_quick if quick else _usual)(recipe, teachers, cache)]


def _usual(recipe: Path, teachers: Path, cache: Path) -> list[Piece]:
    steps, dump = f"{HERE / 'steps.py'} {recipe} --teachers {teachers} --cache {cache}", _dump(recipe, teachers)
    found = [
        _piece(f"steps, {layers} layers", f"{steps} {STEPS} --set student.layers={layers} --steps 40 --rounds 5")
        for layers in (6, 3)
    ]
    for name, settings in OPTIONS.items():
        only = "--contenders fine-tune cached --counts 3 --free-running --steps 40 --rounds 5"
        found.append(_piece(f"options, {name}", f"{steps} {only} {settings}"))
    found += [
        dump(f"torch, {precision}, int8", f"--set dump.precision={precision}")
        for precision in ("float32", "bf16", "fp16")
    ]
    found.append(dump("torch, bf16, int8, compiled", "--set dump.compile=true"))
    found.append(dump("torch, bf16, float32 at full width", "--set dump.projection=none --set dump.dtype=float32"))
    found.append(dump("torch, bf16, trellis 96", "--set dump.dtype=trellis --set dump.bytes=96"))
    for words in WORDS_OF_TEXTS:
        path = recipe.parent.resolve() / f"train-{words}.tsv"
        found.append(dump(f"torch, bf16, int8, {words} words", f"--set data.train={path}"))
    found += [
        dump(f"onnxruntime, {precision}, int8", f"--set dump.precision={precision}", "onnxruntime")
        for precision in ("float32", "fp16")
    ]
    return [*found, _piece("cofinetune", f"{HERE / 'cofinetune.py'} {recipe} --rows 512 --rounds 2")]


def _quick(recipe: Path, teachers: Path, cache: Path) -> list[Piece]:
    steps = f"{HERE / 'steps.py'} {recipe} --teachers {teachers} --cache {cache}"
    dump = _dump(recipe, teachers, "--texts 16 --rounds 1")
    return [
        _piece("steps, 2 layers", f"{steps} {STEPS} --steps 1 --rounds 1"),
        dump("torch, bf16, int8", ""),
        dump("torch, bf16, int8, compiled", "--set dump.compile=true"),
        _piece("cofinetune", f"{HERE / 'cofinetune.py'} {recipe} --rows 8 --rounds 1"),
    ]


class _dump:  # noqa: N801 - makes pieces, as _piece does
    """Makes pieces that measure one teacher's dump; all three have the same size."""

    def __init__(self, recipe: Path, teachers: Path, size: str = f"--texts 4096 --rounds 5 {FILLED}") -> None:
        self._begin = f"{HERE / 'dump.py'} {recipe} --teachers {teachers} --only bert {size}"

    def __call__(self, name: str, settings: str, backend: str = "torch") -> Piece:
        return _piece(f"dump, {name}", f"{self._begin} --backends {backend} {settings}")


def _piece(name: str, words: str, makes: Path | None = None) -> Piece:
    return Piece(name, [sys.executable, *shlex.split(words)], makes=makes)


if __name__ == "__main__":
    main()
