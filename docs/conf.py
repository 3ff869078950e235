"""Sphinx: MyST Markdown, the furo theme, nothing generated from code."""

project = "kdcache"
author = "the kdcache contributors"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "kdcache"
exclude_patterns = ["_build", "results-tables.md", "accuracy-against-bytes-table.md"]  # included in other pages
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository outside docs/
