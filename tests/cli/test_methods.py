"""``kdcache methods``, and unknown methods as every command refuses them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kdcache.cli.main import main
from kdcache.cli.methods import as_markdown
from kdcache.methods.registry import method_names


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    return int(left.value.code or 0)


def test_methods_are_listed_with_what_they_need(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("methods", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert tuple(rows) == method_names()
    assert (rows["mt-bert"]["logits"], rows["mt-bert"]["hidden_states"], rows["mt-bert"]["scope"]) == (
        True,
        ["stored"],
        "row",
    )
    assert (rows["kd"]["logits"], rows["kd"]["hidden_states"], rows["fine-tune"]["logits"]) == (True, [], False)
    assert call("methods") == 0
    said = capsys.readouterr().out
    assert "labels, logits, hidden states (as stored)" in said
    assert "arXiv 2106.01023" in said


def test_one_method_is_shown_with_its_formula(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("methods", "best-teacher") == 0
    said = capsys.readouterr().out
    assert "Needs: labels, logits, validation scores." in said
    assert "L = L_task + CE(softmax(z_b/T), softmax(z_s/T))" in said
    assert call("methods", "ca-mkd", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["name"], document["hidden_states"], document["teacher_facts"]) == ("ca-mkd", ["stored"], [])
    assert call("methods", "ca-mdk") == 2
    assert "'ca-mkd'" in capsys.readouterr().err


def test_the_page_of_methods_has_every_method_once() -> None:
    page = as_markdown()
    for name in method_names():
        assert page.count(f"| `{name}` |") == page.count(f"#### {name}\n") == 1
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert all(line.count(" | ") == 4 for line in rows if "---" not in line)


def test_what_cannot_be_cached_is_a_mistake_of_the_recipe(
    review_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("pipelines", "validate", str(review_recipe), "--set", "distill.method=theseus") == 2
    assert "method 'theseus' cannot learn from a cache: it runs the student's blocks" in capsys.readouterr().err


@pytest.mark.parametrize("command", [("pipelines", "validate"), ("distill",), ("run",)])
def test_an_unknown_method_is_refused_with_the_nearest(
    review_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    place = () if command[0] == "pipelines" else ("--output-dir", str(tmp_path))
    assert call(*command, str(review_recipe), *place, "--set", "distill.method=mtbert") == 2
    said = capsys.readouterr().err
    assert "no distillation method 'mtbert'; there are: " in said
    assert "'mt-bert'" in said


def test_names_are_found_without_torch() -> None:
    code = (
        "import sys; from kdcache.methods.registry import check_method; check_method('kd'); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
