"""What an installed kdcache must do outside of a checkout: every step of a tiny task, through the ``kdcache`` program.

``make release`` runs it with the Python of a clean environment that holds the wheel and nothing of this repository::

    cd /tmp && /path/to/environment/bin/python /path/to/checkout/tests/installed.py

It needs no network: models and texts are made on the spot. It takes about two minutes on two cores.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = Path(sys.executable).with_name("kdcache")
SECTIONS = """\
[cofinetune]
epochs = 1
batch_size = 16
learning_rate = 1e-3
[dump]
dim = 8
part_size = 32
[student]
init_from = "teacher:bert"
layers = 2
[distill]
epochs = 1
batch_size = 16
learning_rate = 1e-3
"""


def main() -> None:
    """All steps, each in a process of its own. Raises SystemExit with what failed."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        os.environ["KDCACHE_HOME"] = str(Path(directory, "home"))
        version = _is_installed()
        _expect(_kdcache("--version").strip() == version, f"kdcache --version is not {version}")
        _expect("mt-bert" in _kdcache("methods"), "kdcache methods lacks mt-bert")
        _kdcache("pipelines", "cp", "quickstart", "copied.toml")
        _expect(Path("copied.toml").is_file(), "kdcache pipelines cp wrote no recipe")
        _make_task()
        _kdcache("pipelines", "validate", "reviews.toml")
        _kdcache("dump-teachers", "reviews.toml", "--help")
        done = json.loads(_kdcache("run", "reviews.toml", "--json"))
        _expect(0 <= done["results"]["scores"]["test"]["accuracy"] <= 1, "kdcache run gave no score")
        _expect(Path("runs/reviews/report.html").stat().st_size > 100_000, "the page of the run is not complete")
        _kdcache("cache", "verify", "runs/reviews/cache")
        _kdcache("cache", "export", "runs/reviews/cache", "--to", "parquet", "--output-dir", "exported")
        _kdcache("evaluate", "runs/reviews/student", "--data", "test.tsv")
        _kdcache("weigh", "runs/reviews/cache")
        other = ("--set", "name=kd", "--set", "distill.method=kd")
        _kdcache("distill", "reviews.toml", "--cache", "runs/reviews/cache", *other)
        _kdcache("export", "runs/reviews", "--to", "onnx", "--int8", "--int8-tolerance", "1")
        print(f"kdcache {version} works in {sys.prefix}")


def _is_installed() -> str:
    """The version of the package that is imported. Refuses a checkout."""
    import kdcache

    place = Path(kdcache.__file__).resolve()
    _expect(ROOT not in place.parents, f"kdcache was imported from the checkout: {place}")
    installed = importlib.metadata.version("kdcache")
    _expect(kdcache.__version__ == installed, f"the package says {kdcache.__version__}, its metadata {installed}")
    return installed


def _make_task() -> None:
    from kdcache.testing.tiny import make_model, recipe_text, reviews, write_reviews

    rows = reviews(216, seed=1)
    for name, chosen in (("train", rows[:96]), ("dev", rows[96:160]), ("test", rows[160:192])):
        write_reviews(Path(f"{name}.tsv"), chosen)
    write_reviews(Path("more.tsv"), rows[192:], labelled=False)
    make_model(Path("models/bert"), "bert", seed=1)
    make_model(Path("models/roberta"), "roberta", width=24, seed=2)
    teachers, every = {"bert": "models/bert", "roberta": "models/roberta"}, ("train", "validation", "test", "transfer")
    Path("reviews.toml").write_text(recipe_text("reviews", teachers, SECTIONS, files=every), encoding="utf-8")


def _kdcache(*arguments: str) -> str:
    """What the program prints on stdout. Refuses any exit code but 0."""
    shown = f"kdcache {' '.join(arguments)}"
    print(f"$ {shown}", flush=True)
    done = subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, check=False)
    _expect(done.returncode == 0, f"{shown}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        sys.exit(f"failed: {otherwise}")


if __name__ == "__main__":
    main()
