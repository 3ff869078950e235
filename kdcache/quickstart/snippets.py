"""Rated movie-review snippets cut into train, validation, test and transfer files.

The source gives one snippet per review with the mean of many human ratings from -4 to 4. The label is the mean's sign;
snippets between -0.5 and 0.5, on which the raters did not agree, are left out. Which split a snippet goes to is decided
by a hash of its letters and digits alone, so that copies that differ in case or punctuation cannot lie in two splits,
and no library version or row order matters.
"""

from __future__ import annotations

import hashlib
import html
import re
from dataclasses import dataclass

from kdcache.errors import DamageError

MARGIN = 0.5
SPLITS = {"test": 3000, "validation": 500, "train": 1200, "transfer": 3000}


@dataclass(frozen=True)
class Snippet:
    """One review snippet and its mean rating in -4..4."""

    text: str
    rating: float

    @property
    def label(self) -> int:
        return int(self.rating > 0)


def parse(lines: str) -> list[Snippet]:
    """Rows of ``id <tab> mean rating <tab> snippet``; DamageError names the row that is not of that form."""
    snippets = []
    for number, line in enumerate(lines.splitlines(), start=1):
        fields = line.split("\t")
        try:
            _, rating, text = fields
            snippets.append(Snippet(" ".join(html.unescape(text).split()), float(rating)))
        except ValueError as error:
            raise DamageError(
                f"row {number} of the snippets has {len(fields)} fields; expected id, rating, text"
            ) from error
    return snippets


def split(snippets: list[Snippet], sizes: dict[str, int] = SPLITS) -> dict[str, list[Snippet]]:
    """Distinct snippets with a clear rating, in the order of their hashes, cut into consecutive splits."""
    clear = {_letters(snippet.text): snippet for snippet in snippets if abs(snippet.rating) >= MARGIN}
    ordered = [clear[key] for key in sorted(clear, key=_hash)]
    if sum(sizes.values()) > len(ordered):
        raise DamageError(
            f"there are {len(ordered)} snippets with a clear rating; expected at least {sum(sizes.values())}"
        )
    cut, start = {}, 0
    for name, size in sizes.items():
        cut[name] = ordered[start : start + size]
        start += size
    return cut


def to_tsv(snippets: list[Snippet], *, labelled: bool) -> str:
    """TSV with header, no quoting; the label column is absent where ``labelled`` is false."""
    if not labelled:
        return "".join(line + "\n" for line in ["sentence", *(snippet.text for snippet in snippets)])
    return "sentence\tlabel\n" + "".join(
        f"{snippet.text}\t{('negative', 'positive')[snippet.label]}\n" for snippet in snippets
    )


def _letters(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _hash(letters: str) -> bytes:
    return hashlib.blake2b(letters.encode(), digest_size=16, person=b"quickstart").digest()
