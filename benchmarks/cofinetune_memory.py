"""Compares the peak memory of co-finetuning with the memory that it needs; prints JSON.

    python benchmarks/cofinetune_memory.py [--teachers 4x384,4x256,3x256] [--vocabulary 4000] [--batch 16] [--words 24]

Runs the stage itself (``kdcache.teachers.cofinetune``, including checkpoints, evaluation and saving) on teachers with
random weights: teacher by teacher, as kdcache does, and for comparison with one backward pass through the sum of all
losses.

    required   weights + gradients + both moments of AdamW of all teachers and the shared head (16 bytes per parameter)
               + the tensors that autograd saves for one batch of the largest teacher
    peak       the peak of the process, less the memory of the libraries (CUDA: the peak of allocated memory)
    ratio      peak / required; the claim is at most 1.2

On the CPU the peak is that of resident memory (Linux, VmHWM). glibc keeps freed blocks of up to 32 MB, so resident
memory exceeds the memory in use. Therefore ``peak_bytes`` is measured with MALLOC_MMAP_THRESHOLD_=262144, which returns
freed tensors to the system at once, and ``peak_bytes_default_malloc`` without it. Each measurement has its own process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

CLAIM = 1.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teachers", default="4x384,4x256,3x256", help="blocks x width of each")
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--words", type=int, default=24, help="per text")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--measure", choices=["teacher by teacher", "summed"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options)))
        return
    exact, default = {"MALLOC_MMAP_THRESHOLD_": "262144"}, dict[str, str]()
    ours = in_a_process("teacher by teacher", exact)
    keys = ("parameters", "state_bytes", "activation_bytes_of_largest", "required_bytes", "peak_bytes")
    required = ours["required_bytes"]
    report = {
        "machine": machine(),
        "teachers": options.teachers,
        "batch": options.batch,
        "accumulation": options.accumulation,
        **{key: ours[key] for key in keys},
        "ratio": round(ours["peak_bytes"] / required, 3),
        "claim": CLAIM,
        "holds": ours["peak_bytes"] <= CLAIM * required,
        "peak_bytes_default_malloc": in_a_process("teacher by teacher", default)["peak_bytes"],
        "peak_bytes_summed": in_a_process("summed", exact)["peak_bytes"],
    }
    print(json.dumps(report, indent=1))
    sys.exit(0 if report["holds"] else 1)


def in_a_process(kind: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """``measure`` with the same options, in its own process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", kind]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure one stage in this process."""
    import torch

    from kdcache.progress import SilentProgress
    from kdcache.teachers.cofinetune import cofinetune
    from kdcache.teachers.joint import CofinetuneTask
    from kdcache.teachers.teacher import be_quiet

    if options.measure == "summed":
        CofinetuneTask.losses = summed_losses(CofinetuneTask.losses)  # type: ignore[method-assign]
    kept: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        be_quiet()
        recipe = make_recipe(directory, options)
        count_saved_tensors(recipe, kept)
        warm_up(directory)
        before = start_counting()
        cofinetune(recipe, directory / "teachers", directory / "work", progress=SilentProgress())
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM") - before
    state = 16 * kept["parameters"]
    activations = {key: value for key, value in kept.items() if key != "parameters"}
    largest = max(activations.values())
    return {
        "parameters": kept["parameters"],
        "state_bytes": state,
        "activation_bytes_of_largest": largest,
        "required_bytes": state + largest,
        "peak_bytes": peak,
    }


def make_recipe(directory: Path, options: argparse.Namespace) -> Any:
    """Teachers with random weights, and texts of even length."""
    import torch
    from transformers import AutoConfig, AutoModel

    from kdcache.recipe import Recipe
    from kdcache.testing.tiny import WORDS, wordpiece_tokenizer

    tokenizer = wordpiece_tokenizer()
    teachers = []
    for number, shape in enumerate(options.teachers.split(",")):
        depth, width = (int(part) for part in shape.split("x"))
        config = AutoConfig.for_model(
            "bert", vocab_size=options.vocabulary, hidden_size=width,
            num_hidden_layers=depth, num_attention_heads=width // 64,
            intermediate_size=4 * width, max_position_embeddings=128,
        )  # fmt: skip
        place = directory / f"model-{number}"
        AutoModel.from_config(config, dtype=torch.float32, add_pooling_layer=False).save_pretrained(place)
        tokenizer.save_pretrained(place)
        teachers.append({"name": f"t{number}", "model": str(place)})
    rng = random.Random(0)
    rows = [
        f"{' '.join(rng.choices(WORDS[:40], k=options.words))}\t{number % 2}"
        for number in range(4 * options.batch + 16)
    ]
    for name, part in (("train", rows[16:]), ("dev", rows[:16])):
        (directory / f"{name}.tsv").write_text("sentence\tlabel\n" + "\n".join(part) + "\n")
    data = {
        "train": str(directory / "train.tsv"),
        "validation": str(directory / "dev.tsv"),
        "text": ["sentence"],
        "label": "label",
    }
    settings = {"epochs": 1, "batch_size": options.batch, "accumulation": options.accumulation, "checkpoint_steps": 2}
    return Recipe.model_validate({"name": "memory", "data": data, "teachers": teachers, "cofinetune": settings})


def count_saved_tensors(recipe: Any, kept: dict[str, int]) -> None:
    """Fill ``kept`` from a first batch of each teacher: bytes saved by autograd by name, and number of parameters."""
    import torch

    from kdcache.data.task import load_task
    from kdcache.teachers import joint
    from kdcache.teachers.head import SharedHead
    from kdcache.teachers.joint import CofinetuneTask, Labels
    from kdcache.teachers.sources import open_source, under_shared_head
    from kdcache.training.best_epoch import BestEpoch

    task = load_task(recipe.data)
    rows = joint.labelled_rows(task, "train")
    assert rows is not None
    sources = {section.name: open_source(section, 128, task.label_names) for section in recipe.teachers}
    head = SharedHead(max(source.width for source in sources.values()), 2)
    models = under_shared_head(sources, head)
    kept["parameters"] = sum(p.numel() for p in torch.nn.ModuleList(models.values()).parameters())
    size = recipe.cofinetune.batch_size
    for name, model in models.items():
        texts = {name: joint._encoded(sources[name], rows, None)}
        training = CofinetuneTask(
            {name: model}, texts, Labels(rows.labels, None), batch_size=size, accumulation=1, select_by="loss", seed=0,
            best=BestEpoch(Path(), Path(), {}), note=lambda message: None,  # noqa: ARG005
        )  # fmt: skip
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        seen: dict[int, int] = {}

        def note(tensor: Any, own: set[int] = own, seen: dict[int, int] = seen) -> Any:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        model.train()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            losses = list(training.losses(next(training.batches(0, 0))))
        kept[name] = sum(seen.values())
        del losses


def summed_losses(losses: Any) -> Any:
    """The sum of the losses of a step, in one graph."""

    def summed(self: Any, batch: Any) -> Iterator[tuple[Any, Mapping[str, Any]]]:
        found = list(losses(self, batch))
        yield sum(loss for loss, _ in found), {name: value for _, terms in found for name, value in terms.items()}

    return summed


def warm_up(directory: Path) -> None:
    """Train once, so that the libraries load their parts."""
    import gc

    from kdcache.progress import SilentProgress
    from kdcache.recipe import Recipe
    from kdcache.teachers.cofinetune import cofinetune
    from kdcache.testing.tiny import make_model

    data = {
        "train": str(directory / "dev.tsv"),
        "validation": str(directory / "dev.tsv"),
        "text": ["sentence"],
        "label": "label",
    }
    model = str(make_model(directory / "small", "bert", depth=1))
    settings = {"name": "small", "data": data | {"max_length": 32}, "teachers": [{"name": "small", "model": model}]}
    cofinetune(
        Recipe.model_validate(settings),
        directory / "small-teachers",
        directory / "small-work",
        progress=SilentProgress(),
    )
    gc.collect()


def start_counting() -> int:
    """Reset the peak; returns the resident bytes."""
    import ctypes

    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return 0
    ctypes.CDLL(None).malloc_trim(0)  # freed memory of the preparation must not hide later allocations
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(field: str) -> int:
    """Peak bytes of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def machine() -> str:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return f"{device}, {platform.machine()}, torch {torch.__version__}"


if __name__ == "__main__":
    main()
