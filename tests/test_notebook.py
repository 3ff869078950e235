"""The notebook of the documentation runs as it stands; its outputs are those of its cells.

``python tests/test_notebook.py`` writes the outputs into the notebook again.
"""

from __future__ import annotations

import ast
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parent.parent / "docs" / "examples" / "from_python.ipynb"


def results(document: Any) -> Iterator[tuple[Any, Any]]:
    """The code cells in order, each with the value of its last expression; None without one."""
    names: dict[str, Any] = {}
    for cell in (cell for cell in document["cells"] if cell["cell_type"] == "code"):
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, cell["id"], "exec"), names)
        assert last is None or isinstance(last, ast.Expr)
        yield cell, None if last is None else eval(compile(ast.Expression(last.value), cell["id"], "eval"), names)


def shown(value: Any) -> dict[str, list[str]]:
    """What Jupyter stores of a value: its repr, and its HTML if it has any."""
    text = {"text/plain": repr(value).splitlines(True)}
    html = getattr(value, "_repr_html_", None)
    return text if html is None else {"text/html": html().splitlines(True), **text}


def test_the_notebook_runs_and_shows_caches_and_runs(_few_texts_are_timed: None) -> None:
    kinds = {}
    for cell, value in results(json.loads(NOTEBOOK.read_text())):
        stored = [set(output["data"]) for output in cell["outputs"]]
        assert stored == ([] if value is None else [set(shown(value))]), cell["source"]
        kinds[type(value).__name__] = value
    assert {"Cache", "Run", "dict"} <= kinds.keys()
    assert repr(kinds["Run"]).endswith(")")
    assert "student, mt-bert" in kinds["Run"]._repr_html_()
    assert kinds["dict"]["rows"] == 32


def test_the_notebook_names_no_directory_of_a_machine() -> None:
    found = set(re.findall(r"/tmp/\w+", NOTEBOOK.read_text()))
    assert found <= {"/tmp/example"}


def write_outputs() -> None:
    """Run the notebook and keep the outputs."""
    document = json.loads(NOTEBOOK.read_text())
    for number, (cell, value) in enumerate(results(document), start=1):
        cell["execution_count"] = number
        data = {} if value is None else shown(value)
        output = {"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": data}
        cell["outputs"] = [output] if data else []
    text = json.dumps(document, indent=1, ensure_ascii=False)
    NOTEBOOK.write_text(re.sub(re.escape(tempfile.gettempdir()) + r"/\w+", "/tmp/example", text) + "\n")


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    write_outputs()
