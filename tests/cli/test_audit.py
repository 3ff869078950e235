"""``kdcache audit`` through the program.

0 where all agrees, 3 and the rows where not, 4 where there is nothing to compare.
"""

from __future__ import annotations

from kdcache.testing.teachers import make_teachers
from tests.cli.commands import kdcache
from tests.cli.conftest import FinishedRun


def test_audit_agrees_and_finds_other_teachers(finished: FinishedRun) -> None:
    cache = finished.root / "cache"
    said = kdcache("audit", cache, "--rows", "40")
    assert said.code == 0, said.err
    assert "agrees" in said.out and "differs" not in said.out
    document = kdcache("audit", cache, "--teachers", finished.root / "teachers", "--rows", "20", "--json").document
    assert document["agrees"] is True
    assert document["teachers"][0]["worst"].keys() >= {"logits", "tokens"}


def test_audit_leaves_with_3_and_names_the_rows(copied: FinishedRun) -> None:
    names = [path.name for path in (copied.root / "teachers").iterdir() if path.is_dir()]
    assert "bert" in names
    others = make_teachers(copied.root / "others", {"bert": "bert"})
    said = kdcache("audit", copied.root / "cache", "--teachers", others, "--rows", "20")
    assert said.code == 3
    assert "bert, weights: not the teacher of the cache" in said.out
    assert "not audited" in said.err
    none = make_teachers(copied.root / "none", {"other": "bert"})
    assert kdcache("audit", copied.root / "cache", "--teachers", none).code == 4
