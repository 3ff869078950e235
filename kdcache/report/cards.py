"""The model card of a student: what it is, how it was made, what it scores, how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kdcache.progress import listed
from kdcache.report.table import markdown, result_rows, table

_IDENTIFIER = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9.+-]*"
)  # an SPDX identifier; longer licences are prose, which YAML would misread
_LOAD = """\
## Use

```python
from transformers import pipeline

classify = pipeline("text-classification", "path/to/this/directory")
```
"""
_LOAD_SHARED = """\
## Use

This student has the teachers' shared head, which transformers does not know: load it with
`kdcache evaluate path/to/this/directory --data FILE`, or run `model.onnx` with any ONNX runtime.
"""


def model_card(results: Mapping[str, Any]) -> str:
    """Markdown with the metadata that model hubs read, from the contents of ``results.json``.

    What is absent there is left out.
    """
    licence = results.get("licence")
    head = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-classification",
        "tags:",
        "- knowledge-distillation",
        "- kdcache",
    ]
    head += [f"license: {str(licence).lower()}"] if _IDENTIFIER.fullmatch(str(licence or "")) else []
    columns, rows = table(result_rows(results))
    facts = {
        "Method": results.get("method"),
        "Teachers": ", ".join(results.get("teachers", {})) or "none",
        "Started from": results.get("student", {}).get("init_from"),
        "Text columns": ", ".join(results.get("text_columns", [])),
        "Labels": listed(results.get("label_names", []), most=50) if results.get("label_names") else "",
        "Longest input": f"{results['max_length']} tokens" if results.get("max_length") else None,
        "Seed": results.get("seed"),
        "Cache": results.get("cache_identity"),
        "Licence": licence,
    }
    lines = [f"- {key}: {value}" for key, value in facts.items() if value not in (None, "")]
    shared = results.get("student", {}).get("head") == "shared"
    parts = [
        "\n".join([*head, "---"]),
        f"# {results.get('name', 'student')}",
        "A text classifier distilled with kdcache: its teachers ran once, and it learned from what they said.",
        "\n".join(lines),
        "## Scores\n\n" + markdown(columns, rows).rstrip(),
        (_LOAD_SHARED if shared else _LOAD).rstrip(),
    ]
    return "\n\n".join(parts) + "\n"
