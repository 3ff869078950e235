"""Makes what ``gpu.py`` measures with: models of usual sizes with random weights, made-up texts, and a recipe.

    python benchmarks/gpu_material.py --to runs/gpu/material

Speed does not depend on the weights, and so no model has to be downloaded. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from kdcache.testing.tiny import WORDS, Family, make_model

FAMILIES: tuple[Family, ...] = ("bert", "roberta", "xlm-roberta")
BATCH = 128  # texts of a student's step
POSITIONS = 514
WORDS_OF_TEXTS = (16, 64, 256)  # besides those of train.tsv

RECIPE = """\
name = "gpu"
[data]
train = "train.tsv"
validation = "dev.tsv"
text = ["sentence"]
label = "label"
max_length = {max_length}
{teachers}
[cofinetune]
epochs = 1
batch_size = 32
precision = "bf16"
[dump]
layers = {layers}
dim = {dim}
precision = "bf16"
tokens_per_batch = "auto"
[student]
init_from = "teacher:bert"
layers = {students}
[distill]
epochs = 1
batch_size = {batch}
learning_rate = 1e-4
precision = "bf16"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--rows", type=int, default=16384, help="texts of train.tsv")
    parser.add_argument("--words", type=int, default=24, help="of a text of train.tsv, on average")
    parser.add_argument("--vocabulary", type=int, default=30522, help="rows of the embeddings; texts use some hundred")
    parser.add_argument("--batch", type=int, default=BATCH)
    given = parser.parse_args()
    given.to.mkdir(parents=True, exist_ok=True)
    heads = max(2, given.width // 64)
    for seed, family in enumerate(FAMILIES):
        make_model(
            given.to / family, family, width=given.width, depth=given.depth, seed=seed, num_attention_heads=heads,
            intermediate_size=4 * given.width, max_position_embeddings=POSITIONS, vocab_size=given.vocabulary,
        )  # fmt: skip
    texts(given.to / "train.tsv", given.rows, given.words, 0)
    texts(given.to / "dev.tsv", max(16, given.rows // 64), given.words, 1)
    for words in WORDS_OF_TEXTS:
        texts(given.to / f"train-{words}.tsv", max(16, given.rows // 4), words, words)
    teachers = "".join(f'[[teachers]]\nname = "{name}"\nmodel = "{name}"\n' for name in FAMILIES)
    layers = list(range(given.depth // 6 or 1, given.depth + 1, given.depth // 6 or 1))
    dim = min(128, given.width)
    recipe = RECIPE.format(
        max_length=POSITIONS - 2, teachers=teachers, layers=layers, dim=dim, students=len(layers), batch=given.batch
    )
    (given.to / "recipe.toml").write_text(recipe, encoding="utf-8")  # last: it says that everything is there
    json.dump({"width": given.width, "depth": given.depth, "rows": given.rows, "layers": layers}, sys.stdout)


def texts(path: Path, rows: int, words: int, seed: int) -> None:
    """Labelled lines of about ``words`` words, from half to one and a half times as many."""
    generator = random.Random(seed)
    lines: dict[str, int] = {}
    while len(lines) < rows:
        count = generator.randint(max(1, words // 2), words + words // 2)
        lines[" ".join(generator.choices(WORDS, k=count))] = generator.randrange(2)
    body = [f"{text}\t{label}" for text, label in lines.items()]
    path.write_text("\n".join(["sentence\tlabel", *body]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
