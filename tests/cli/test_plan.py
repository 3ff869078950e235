"""``kdcache plan`` through the program, and its picture on the page of a run."""

from __future__ import annotations

import json

import pytest

from kdcache.cli.plan import size_of
from kdcache.errors import RecipeError
from tests.cli.commands import kdcache
from tests.cli.conftest import FinishedRun


def test_plan_prints_forms_and_recipe_lines_and_the_page_draws_them(copied: FinishedRun) -> None:
    said = copied.call("plan", "--budget", "2MB", "--set", "dump.layers=[2]", "--texts", "20")
    assert said.code == 0, said.err
    for expected in ("kept", "KL", "trellis 8", "recommended: ", "[dump]", "recipe"):
        assert expected in said.out
    assert kdcache("report", copied.root).code == 0
    page = (copied.root / "report.html").read_text()
    specs = json.loads(page.split('id="charts">')[1].split("</script>")[0])
    charts = [spec for spec in specs if "variance kept" in str(spec.get("layer"))]
    assert len(charts) == 3
    assert all(len(chart["data"]["values"]) > 4 for chart in charts)


def test_plan_as_json_and_a_budget_too_small(copied: FinishedRun) -> None:
    said = copied.call("plan", "--budget", "1kB", "--set", "dump.layers=[2]", "--json")
    assert said.code == 1
    assert "nothing fits into 1" in said.err
    assert said.document["recommendation"] is None
    assert said.document["layers"][0]["forms"][0].keys() >= {"bytes", "explained", "cosine", "relative_error", "kl"}


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("1.5 GiB", 3 << 29), ("500mb", 5 * 10**8), ("1e6", 10**6), ("7", 7), ("64K", 64_000)],
)
def test_sizes(text: str, size: int) -> None:
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "much", "0GB", "-3GB", "3 bananas"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="a size was expected"):
        size_of(text)
