"""Sphinx: MyST Markdown, the furo theme. generate.py makes the reference pages from the code when the site is built."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import generate  # noqa: E402 - beside this file

import kdcache  # noqa: E402

generate.write_pages(HERE)

project = "kdcache"
author = "the kdcache contributors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
html_theme = "furo"
html_title = f"kdcache {kdcache.__version__}"
exclude_patterns = [
    "_build",
    "results-tables.md",
    "accuracy-against-bytes-table.md",
    "methods-list.md",
]  # included in other pages
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
smartquotes = False  # "--flag" stays as it is
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository outside docs/
