"""Students of every architecture of the table: they work, or are refused in one line. None answers otherwise in a batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcache.testing.architectures import ARCHITECTURES
from kdcache.testing.student_check import student_verdict

REFUSED = {"T5": "encoder-decoder", "BART": "encoder-decoder", "Funnel": "funnel"}
WHOLE_ONLY = {"ALBERT": "share weights"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_as_a_student(name: str, tmp_path: Path) -> None:
    verdict = student_verdict(ARCHITECTURES[name], tmp_path)
    if name in REFUSED:
        assert verdict.whole is not None and REFUSED[name] in verdict.whole, verdict
    else:
        assert verdict.whole is None
    if name in WHOLE_ONLY:
        assert verdict.cut is not None and WHOLE_ONLY[name] in verdict.cut, verdict
    else:
        assert (verdict.cut is None) == verdict.works, verdict.cut
