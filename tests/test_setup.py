"""What is said in several places is said alike: README, Dockerfile, Makefile, CI, constraints."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from kdcache import __version__
from kdcache.cache.manifest import read_manifest
from kdcache.dump.stage import dump_teachers
from kdcache.progress import SilentProgress
from tests.conftest import TinyRun

ROOT = Path(__file__).parent.parent


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def readme_steps() -> list[str]:
    """The commands of the code block that follows the heading 'Installation'."""
    block = re.search(r"## Installation\n.*?```sh\n(.*?)```", text("README.md"), re.DOTALL)
    assert block is not None
    return [line for line in block.group(1).splitlines() if line and not line.startswith("#")]


def test_the_dockerfile_installs_as_the_readme_says() -> None:
    steps = [line.removeprefix("RUN ") for line in text("Dockerfile").splitlines() if line.startswith("RUN ")]
    assert steps == readme_steps()


def test_the_makefile_installs_as_the_readme_says() -> None:
    recipe = re.search(r"^\$\(VENV\)/\.kdcache:.*?\n\n", text("Makefile"), re.DOTALL | re.MULTILINE)
    assert recipe is not None
    steps = [line.strip() for line in recipe.group().splitlines()[1:] if not line.strip().startswith("@")]
    spelled = [
        step.replace("$(RUN)", ".venv/bin").replace("$(VENV)", ".venv").replace("$(PYTHON)", "python3").strip()
        for step in steps
    ]
    assert [step for step in spelled if step] == readme_steps()


def test_ci_runs_what_the_readme_tells_contributors() -> None:
    commands = [line for line in text(".ci/run").splitlines() if line and not line.startswith(("#", "set", "cd"))]
    assert commands == ["make check test"]
    assert "make check test" in text("README.md")


def test_every_dependency_is_pinned_and_within_its_bounds() -> None:
    project = tomllib.loads(text("pyproject.toml"))
    pins = {}
    for line in text("constraints.txt").splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[_plain(name)] = version
    extras = project["project"]["optional-dependencies"].values()
    named = [*project["project"]["dependencies"], *(entry for extra in extras for entry in extra)]
    named += [entry for group in project["dependency-groups"].values() for entry in group]
    for requirement in named:
        match = re.match(r"([A-Za-z0-9-]+)(>=|==)([\d.]+)", requirement)
        assert match is not None, requirement
        assert _plain(match[1]) in pins, requirement
        pinned, bound = _numbers(pins[_plain(match[1])]), _numbers(match[3])
        assert pinned == bound if match[2] == "==" else pinned >= bound, requirement
    assert pins["torch"] == "2.13.0"


def test_versions_and_dates_agree() -> None:
    assert tomllib.loads(text("pyproject.toml"))["project"]["version"] == __version__
    released = re.search(r"^## \[([\d.]+)\] - (\d{4}-\d\d-\d\d)$", text("CHANGELOG.md"), re.MULTILINE)
    assert released is not None
    cited = re.search(r'^version: (.+)\ndate-released: "(.+)"$', text("CITATION.cff"), re.MULTILINE)
    assert cited is not None
    assert released.groups() == cited.groups() == (__version__, released[2])


def test_no_identity_depends_on_the_version(tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dump by another version has the same identity; its provenance says which version made it."""
    for module in ("kdcache", "kdcache.dump.provenance"):
        monkeypatch.setattr(f"{module}.__version__", "9.9.9")
    dump_teachers(tiny_run.recipe(), tiny_run.teachers, tmp_path / "cache", progress=SilentProgress())
    made, before = read_manifest(tmp_path / "cache"), read_manifest(tiny_run.cache)
    assert made.identity == before.identity
    assert made.provenance != before.provenance


@pytest.mark.parametrize("target", ["setup", "demo", "test", "check", "docs", "release"])
def test_the_makefile_has_the_target(target: str) -> None:
    assert re.search(rf"^{target}:", text("Makefile"), re.MULTILINE)


def test_the_changelog_opens_with_what_is_not_released() -> None:
    assert "\n## [Unreleased]\n" in text("CHANGELOG.md")


def test_the_licence_is_apache_2() -> None:
    assert "Apache License" in text("LICENSE")
    assert "Version 2.0, January 2004" in text("LICENSE")


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
