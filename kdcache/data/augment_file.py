"""The file of ``kdcache augment``: its rows, and what they were made with.

Parquet holds the settings in its metadata (key ``kdcache.augment``); beside JSON lines they are in ``FILE.meta.json``.
The bytes depend on the data, the settings and the versions only.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache import __version__
from kdcache.data.augment import Augmented, AugmentSettings, augment
from kdcache.data.task import load_task
from kdcache.errors import MismatchError, RecipeError
from kdcache.files import absolute, make_directory, replace_file

if TYPE_CHECKING:
    from kdcache.progress import Progress
    from kdcache.recipe import DataSection

OWN_COLUMNS = ("parent", "rule", "seed")
METADATA = b"kdcache.augment"


@dataclass(frozen=True)
class AugmentedFile:
    """What was written, and how it went."""

    path: Path
    made: Augmented
    settings: Mapping[str, Any]

    def report(self) -> dict[str, Any]:
        """For JSON."""
        made = self.made
        return {
            "file": str(self.path),
            "rows": len(made.rows),
            "attempts": made.attempts,
            "kept": made.kept,
            "rejected": dict(sorted(made.rejected.items())),
            "seconds": made.seconds,
            "texts_per_second": len(made.rows) / made.seconds if made.seconds else 0.0,
            "settings": dict(self.settings),
        }


def make_file(
    section: DataSection,
    settings: AugmentSettings,
    path: Path,
    *,
    mlm: str | None = None,
    mlm_words: Mapping[str, Any],
    replace: bool = False,
    progress: Progress,
) -> AugmentedFile:
    """Make texts from the data of a recipe and write them to ``path``.

    Args:
        section: the data; its transfer texts are read only if they are a source, and never from ``path``.
        settings: rules, shares and seed.
        path: a .parquet or .jsonl file.
        mlm: hub name or directory of a masked language model.
        mlm_words: its ``words`` (share that is replaced) and ``candidates``.
        replace: whether another file may be replaced.
        progress: is told what happens.

    Raises:
        RecipeError: the file's ending is not known, or a text column has the name of an own column.
        MismatchError: the file is there and has other contents.
    """
    if path.suffix not in (".parquet", ".jsonl"):
        raise RecipeError(f"--output is '{path}'; a .parquet or .jsonl file was expected", "Such as augmented.parquet.")
    clash = [name for name in section.text if name in OWN_COLUMNS]
    if clash:
        raise RecipeError(
            f"the text column '{clash[0]}' has the name of a column that augment writes: {', '.join(OWN_COLUMNS)}",
            "Rename the column in the data files and in data.text.",
        )
    others = [source for source in section.transfer if Path(source) != absolute(path)]
    transfer = others if "transfer" in settings.sources else []
    task = load_task(section.model_copy(update={"transfer": transfer}))
    described: dict[str, Any] = {**asdict(settings), "versions": _versions(mlm is not None)}
    model = None
    if mlm is not None:
        from kdcache.data.masked_lm import MaskedLanguageModel

        model = MaskedLanguageModel(mlm, share=mlm_words["words"], candidates=mlm_words["candidates"])
        described["mlm"] = {"weights": model.fingerprint, **mlm_words}
    made = augment(task, settings, model, progress)
    _write(path, made, section.text, described, replace=replace)
    return AugmentedFile(path, made, described)


def _write(path: Path, made: Augmented, columns: list[str], described: Mapping[str, Any], *, replace: bool) -> None:
    rows = [
        {
            **dict(zip(columns, row.text, strict=True)),
            "parent": "+".join(parent.hex() for parent in row.parents),
            "rule": row.rule,
            "seed": described["seed"],
        }
        for row in made.rows
    ]
    metadata = json.dumps(described, sort_keys=True, indent=1)
    if path.suffix == ".jsonl":
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        files = {path: lines.encode(), path.with_name(f"{path.name}.meta.json"): metadata.encode() + b"\n"}
    else:
        files = {path: _parquet(rows, [*columns, *OWN_COLUMNS], metadata)}
    if path.exists() and path.read_bytes() != files[path] and not replace:
        raise MismatchError(
            f"'{path}' exists and has other contents", "Give another --output, or replace it with --replace."
        )
    make_directory(path.parent)
    for place, contents in files.items():
        replace_file(place, contents)


def _parquet(rows: list[dict[str, Any]], columns: list[str], metadata: str) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    types = {name: pa.int64() if name == "seed" else pa.string() for name in columns}
    schema = pa.schema(list(types.items()), metadata={METADATA: metadata.encode()})
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, compression="zstd")
    return buffer.getvalue()


def _versions(with_model: bool) -> dict[str, str]:
    packages = ("pyarrow", *(("torch", "transformers", "tokenizers") if with_model else ()))
    return {"kdcache": __version__} | {name: version(name) for name in packages}
