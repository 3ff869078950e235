"""The table of docs/models.md: which architectures work as teachers and as students, measured on tiny random models.

    python -m kdcache.testing.models_page docs/models.md

writes the table again between the two marks of the page.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kdcache.testing.architectures import ARCHITECTURES
from kdcache.testing.student_check import student_verdict
from kdcache.testing.teacher_check import TeacherVerdict, teacher_verdict

BEGIN, END = "<!-- table -->", "<!-- end of table -->"
_HEADER = (
    "model",
    "kind",
    "teacher, own head",
    "teacher, shared head",
    "either padding side",
    "alone against batched",
    "student",
)


def teacher_column(verdict: TeacherVerdict) -> str:
    """The cells of both heads and of the padding side."""
    cells = ["works" if refusal is None else "refused" for refusal in (verdict.own, verdict.shared)]
    return " | ".join([*cells, ("same" if verdict.sides < 1e-5 else "differs") if verdict.works else "–"])


def rows() -> Iterator[tuple[str, ...]]:
    """The cells of every architecture; only the largest difference depends on rounding."""
    for name, architecture in ARCHITECTURES.items():
        with tempfile.TemporaryDirectory() as place:
            verdict = teacher_verdict(architecture, Path(place) / "teacher")
            student = student_verdict(architecture, Path(place) / "student")
        difference = f"{verdict.difference:.0e}" if verdict.works else "–"
        yield name, architecture.kind, teacher_column(verdict), difference, student.word


def table() -> str:
    """The whole table in Markdown."""
    lines = [_HEADER, ("---",) * len(_HEADER), *rows()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Write the table into the page that is the only argument."""
    page = Path(sys.argv[1])
    head, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    page.write_text(f"{head}{BEGIN}\n\n{table()}\n\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
