"""Sphinx: MyST Markdown, the furo theme. Only the list of methods is generated from code, when the pages are built."""

from pathlib import Path

from kdcache.cli.methods import as_markdown

(Path(__file__).parent / "methods-list.md").write_text(as_markdown(), encoding="utf-8")

project = "kdcache"
author = "the kdcache contributors"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "kdcache"
exclude_patterns = [
    "_build",
    "results-tables.md",
    "accuracy-against-bytes-table.md",
    "methods-list.md",
]  # included in other pages
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository outside docs/
