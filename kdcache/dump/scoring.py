"""How well a teacher does on the validation rows of a cache, from its stored logits: for newcomers that bring no scores."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kdcache.cache import layout, tables
from kdcache.cache.digests import CheckedFiles
from kdcache.cache.ids import id_list
from kdcache.report.metrics import scores

if TYPE_CHECKING:
    from kdcache.cache.writer import CacheWriter

SPLIT = "validation"


def validation_scores(writer: CacheWriter, name: str) -> dict[str, float]:
    """``kdcache.report.metrics.scores`` of a teacher all of whose parts are written; empty without labelled validation rows."""
    contents = writer.contents
    split = contents.splits.get(SPLIT)
    if split is None:
        return {}
    files, spec = CheckedFiles(writer.root, contents.files), contents.teachers[name]
    classes = len(contents.task.label_names)
    ids, labels, _ = files.decode(split.file, lambda data: tables.decode_examples(data, split.examples, classes))
    wanted = id_list(ids)
    logits: dict[bytes, np.ndarray] = {}
    for part in writer.parts:
        rows = {text: row for row, text in enumerate(id_list(part.text_ids))}
        here = [text for text in wanted if text in rows]
        if here:
            decode = partial(tables.decode_outputs, rows=len(part.text_ids), classes=spec.target.shape[0], pooled=spec.pooled)
            outputs = files.decode(layout.outputs_file(name, part.name), decode)
            logits |= {text: np.array(outputs.logits[rows[text]]) for text in here}
    if not wanted or not all(text in logits for text in wanted):
        return {}
    found = scores(labels, np.stack([logits[text] for text in wanted]))
    return {metric: value for metric, value in found.items() if math.isfinite(value)}
