"""Splits a labelled TSV file into a few rows with labels and the texts of all others, for recipes with few labels.

    python benchmarks/few_labels.py data/mind-titles/train.tsv --text title --rows 4000 --output-dir data/mind-few

Writes train.tsv (all columns) and rest.tsv (the text alone). Rows are chosen by the SHA-256 of their text, so the
choice does not depend on the order of the file, and the first 2,000 are part of the first 4,000.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="TSV with a header and without quoting")
    parser.add_argument("--text", required=True, help="column that is kept in rest.tsv")
    parser.add_argument("--rows", type=int, required=True, help="number of rows that keep their labels")
    parser.add_argument("--output-dir", type=Path, required=True)
    arguments = parser.parse_args()
    header, *rows = arguments.file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    column = header.split("\t").index(arguments.text)
    rows.sort(key=lambda row: hashlib.sha256(row.split("\t")[column].encode()).digest())
    texts = [row.split("\t")[column] for row in rows[arguments.rows :]]
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for name, lines in ("train.tsv", [header, *rows[: arguments.rows]]), ("rest.tsv", [arguments.text, *texts]):
        (arguments.output_dir / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
