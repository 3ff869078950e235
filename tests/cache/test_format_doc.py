"""What docs/cache-format.md shows is what the code makes.

After a change of the format: ``python tests/cache/test_format_doc.py`` writes the examples again.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest

from kdcache.cache.ids import text_id
from kdcache.codecs.base import LayerSpec
from kdcache.testing.caches import Plan, dump, made_teacher, made_texts

PAGE = Path(__file__).parents[2] / "docs" / "cache-format.md"
PROVENANCE = {"command": "kdcache dump-teachers example.toml", "score": "0.91"}
ZARR = "teachers/bert/hidden/part-00000.zarr"


def examples(path: Path) -> list[str]:
    """The JSON blocks of the page, in their order."""
    teacher = made_teacher("bert", {2: LayerSpec("pca", 3, "int8")}, pooled=None)
    dump(path, Plan(made_texts(3, "train"), made_texts(1, "test"), (teacher,)), provenance=PROVENANCE)
    files = [f"{ZARR}/layer-02/zarr.json", f"{ZARR}/zarr.json", "manifest.json"]
    return [(path / file).read_text(encoding="utf-8").strip() for file in files]


def blocks(page: str) -> list[str]:
    return re.findall(r"```json\n(.*?)\n```", page, flags=re.DOTALL)


def test_examples_are_real(tmp_path: Path) -> None:
    assert blocks(PAGE.read_text(encoding="utf-8")) == examples(tmp_path / "cache")


@pytest.mark.parametrize("columns", [("a fine film",), ("crème", "日本")])
def test_ids_are_worked_out_right(columns: tuple[str, ...]) -> None:
    row = next(
        line for line in PAGE.read_text(encoding="utf-8").splitlines() if f"| `{'`, `'.join(columns)}` |" in line
    )
    cells = re.findall(r"`([0-9a-f]+)`", row)
    expected = [
        part for column in columns for part in (len(column.encode()).to_bytes(8, "little").hex(), column.encode().hex())
    ]
    assert cells == [*expected, text_id(columns).hex()]


def _update() -> None:
    page = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as directory:
        for old, new in zip(blocks(page), examples(Path(directory) / "cache"), strict=True):
            page = page.replace(f"```json\n{old}\n```", f"```json\n{new}\n```")
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    _update()
