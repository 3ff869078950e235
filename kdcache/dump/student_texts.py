"""How many texts a student truncates: shown in a plan, before anything is dumped or trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcache.data.encoding import count_tokens, load_tokenizer, truncation_note
from kdcache.errors import KdcacheError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdcache.dump.specs import PreparedTeacher
    from kdcache.recipe import Recipe, StudentSection

_TEACHER_PREFIX = "teacher:"


@dataclass(frozen=True)
class TruncationPlan:
    """``truncated`` of ``texts`` (train and transfer) exceed ``max_length`` tokens; ``reason`` if that is unknown."""

    texts: int
    truncated: int
    max_length: int
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The JSON document."""
        known = None if self.reason else self.truncated
        return {"texts": self.texts, "texts_truncated": known, "max_length": self.max_length}

    def lines(self, reader: str = "student") -> list[str]:
        """Text for the terminal; empty if nothing is truncated."""
        if self.reason:
            return [f"{reader}: how many texts it truncates is not known: {self.reason}"]
        return truncation_note(reader, self.truncated, self.texts, self.max_length)


def student_truncation(
    recipe: Recipe, teachers_dir: Path, teachers: Sequence[PreparedTeacher], texts: Sequence[tuple[str, ...]]
) -> TruncationPlan | None:
    """Tokenise ``texts`` for the recipe's student; None without a student.

    A missing tokenizer is only reported: the dump does not need it.
    """
    section = recipe.student
    if section is None:
        return None
    max_length = section.max_length or recipe.data.max_length
    try:
        _, cut = count_tokens(_tokenizer(section, teachers_dir, teachers), texts, max_length)
    except KdcacheError as error:
        return TruncationPlan(len(texts), 0, max_length, error.message)
    return TruncationPlan(len(texts), cut, max_length)


def _tokenizer(
    section: StudentSection, teachers_dir: Path, teachers: Sequence[PreparedTeacher]
) -> PreTrainedTokenizerBase:
    origin = section.tokenizer or section.init_from or ""
    name = origin.removeprefix(_TEACHER_PREFIX)
    if name == origin:
        return load_tokenizer(origin)
    known = {teacher.name: teacher.tokenizer for teacher in teachers}
    return known[name] if name in known else load_tokenizer(str(teachers_dir / name))
