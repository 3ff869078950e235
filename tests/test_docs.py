"""The pages: links lead somewhere, commands and recipe keys exist, the reference has everything, the tutorial runs."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import kdcache
from kdcache.cli.guard import EXIT_CODES
from kdcache.recipe import Recipe, parse_recipe
from kdcache.testing.tiny import make_model, reviews
from tests.cli.commands import Said
from tests.cli.commands import kdcache as call

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@cache
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every page by its path from the root, the generated ones too."""
    made = tmp_path_factory.mktemp("docs")
    generator().write_pages(made)
    written = [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]
    found = {str(page.relative_to(ROOT)): page for page in written if "_build" not in page.parts}
    found |= {f"docs/{page.relative_to(made)}": page for page in made.rglob("*.md")}
    return {name: page.read_text(encoding="utf-8") for name, page in sorted(found.items())}


def without_code(text: str) -> str:
    return re.sub(r"(?ms)^( *)```.*?^\1```$", "", text)


def slugs(text: str) -> set[str]:
    """The anchors of a page, as MyST and code hosts make them."""
    found = set()
    for title in re.findall(r"(?m)^#{1,6} (.+)$", without_code(text)):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).replace("`", "").lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return found


def test_every_link_leads_somewhere(pages: dict[str, str]) -> None:
    broken = []
    for name, text in pages.items():
        prose = re.sub(r"`[^`\n]*`", "", without_code(text))
        for target in re.findall(r"\]\(([^)\s]+)\)", prose):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            other = str((ROOT / name).parent.joinpath(path).resolve().relative_to(ROOT)) if path else name
            there = other in pages or (ROOT / other).exists()
            if not there or (anchor and other in pages and anchor not in slugs(pages[other])):
                broken.append(f"{name}: {target}")
    assert broken == []


SITES = (  # looked at when they came in; Sphinx's linkcheck fetches them, with a network (CONTRIBUTING.md)
    r"https://arxiv\.org/abs/\d\d(0[1-9]|1[0-2])\.\d{5}",
    r"https://keepachangelog\.com/en/1\.1\.0/",
    r"https://semver\.org/spec/v2\.0\.0\.html",
    r"https://mutmut\.readthedocs\.io",
)


def test_links_to_other_sites_have_the_form_of_known_ones(pages: dict[str, str]) -> None:
    links = {
        (name, link)
        for name, text in pages.items()
        for link in re.findall(r"\]\(([a-z]+:[^)\s]*)\)|<(https?:[^>\s]*)>", without_code(text))
        for link in link
        if link
    }
    assert sum("arxiv.org" in link for _, link in links) >= 3
    assert sorted(each for each in links if not any(re.fullmatch(site, each[1]) for site in SITES)) == []


def test_every_page_is_in_a_table_of_contents(pages: dict[str, str]) -> None:
    listed = set(
        re.findall(
            r"(?m)^([a-z][\w/-]*)$", "".join(re.findall(r"```\{toctree\}(.*?)```", pages["docs/index.md"], re.S))
        )
    )
    included = {"index", *(Path(name).stem for name in re.findall(r"```\{include\} (\S+)", "".join(pages.values())))}
    found = {name.removeprefix("docs/").removesuffix(".md") for name in pages if name.startswith("docs/")}
    assert {name for name in found if not name.startswith("decisions/0")} - included == listed


def commands() -> dict[str, set[str]]:
    """Command -> its options, without those that --help hides."""
    shown = {
        name: [parameter for parameter in command.params if not parameter.hidden]
        for name, command in generator().all_commands()
    }
    return {
        name: {option for parameter in found for option in parameter.opts if option.startswith("-")}
        for name, found in shown.items()
    }


def shell_blocks(text: str) -> str:
    return "".join(re.findall(r"(?ms)^ *```(?:sh|bash)\n.*?^ *```\n", text))


def called(text: str) -> Iterator[list[str]]:
    """The ``kdcache`` commands in the shell blocks, the ``$`` lines and the code of a page, as words."""
    lines = [
        *shell_blocks(text).replace("\\\n", " ").splitlines(),
        *re.findall(r"(?m)^    (?:\$ )?(kdcache .*)$", text.replace("\\\n", " ")),
    ]
    lines += re.findall(r"`(kdcache [^`\n]+)`", without_code(text))
    for line in (re.split(r"\s#", line)[0] for line in lines):
        found = re.search(r"(?:^|[ /])kdcache( .*)?$", line.replace("…", "").strip())
        if found and not line.lstrip().startswith("#") and "pip install" not in line:
            yield ["kdcache", *shlex.split(found[1] or "", comments=True)]


def problems_of(words: list[str], known: dict[str, set[str]]) -> str | None:
    """What the program would not understand; None if it understands all of it."""
    name, rest = words[0], words[1:]
    groups = {known_name.rsplit(" ", 1)[0] for known_name in known if " " in known_name}
    while rest and (f"{name} {rest[0]}" in known or f"{name} {rest[0]}" in groups):
        name = f"{name} {rest.pop(0)}"
    if name in {*groups, "kdcache"} and rest and re.fullmatch(r"[a-z][a-z-]*", rest[0]):
        return f"there is no command '{name} {rest[0]}'"
    options = known.get(name, set()) | {"--help"}
    unknown = [word for word in rest if word.startswith("--") and word.split("=")[0] not in options]
    return f"{name} has no {', '.join(unknown)}" if unknown else None


def test_every_command_in_the_pages_exists(pages: dict[str, str]) -> None:
    known, wrong, seen = commands(), [], 0
    for name, text in pages.items():
        if name == "CHANGELOG.md":
            continue  # it also tells what there was
        for words in called(text):
            seen += 1
            problem = problems_of(words, known)
            if problem:
                wrong.append(f"{name}: {shlex.join(words)}: {problem}")
    assert wrong == []
    assert seen > 150


def test_a_wrong_command_would_be_found() -> None:
    known = commands()
    (words,) = called("```sh\nkdcache cache pusch runs/sst2/cache\n```\n")
    assert problems_of(words, known) == "there is no command 'kdcache cache pusch'"
    assert problems_of(["kdcache", "destill", "x.toml"], known) == "there is no command 'kdcache destill'"
    assert problems_of(["kdcache", "distill", "x.toml", "--sett", "a=1"], known) == "kdcache distill has no --sett"


RECIPE: dict[str, Any] = {
    "name": "task",
    "data": {"train": "train.tsv", "text": ["sentence"], "label": "label"},
    "teachers": [{"name": "bert", "model": "bert"}],
    "student": {"init_from": "small"},
}


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {key for key in below.keys() & above.keys() if isinstance(below[key], dict) and isinstance(above[key], dict)}
    return {**below, **above, **{key: merged(below[key], above[key]) for key in both}}


def test_every_key_in_the_pages_exists(pages: dict[str, str]) -> None:
    seen = 0
    for name, text in pages.items():
        blocks = re.findall(r"(?ms)^( *)```toml\n(.*?)^\1```$", text)
        blocks += [("    ", block) for block in re.findall(r"(?m)(?:^    \[.*\n(?:^(?:    .*)?\n)+)", text)]
        for indent, block in blocks:
            document = tomllib.loads("\n".join(line.removeprefix(indent) for line in block.splitlines()))
            recipe = merged(RECIPE, document)
            origin = recipe["student"]["init_from"]
            if origin.startswith("teacher:"):
                recipe["teachers"] = [*recipe["teachers"], {"name": origin.removeprefix("teacher:"), "model": "m"}]
                recipe["teachers"] = list({teacher["name"]: teacher for teacher in recipe["teachers"]}.values())
            assert Recipe.model_validate(recipe, strict=True), name
            seen += 1
    assert seen > 10


def test_the_reference_has_every_command_and_every_option(pages: dict[str, str]) -> None:
    page = pages["docs/reference/commands.md"]
    for name, options in commands().items():
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert all(option in section for option in options), name
        assert len(section.splitlines()[1]) > 20, name  # what it does
        assert name == "kdcache" or f"```sh\n{name}" in section, name
    assert not re.findall(r"(?m)^\| `[^`]+` \|  \|$", page)  # an option without help


def test_the_reference_has_every_key_with_its_meaning(pages: dict[str, str]) -> None:
    page = pages["docs/reference/recipe.md"]
    rows = {}
    for table in generator().TABLES:
        for key, kind, default, meaning in generator().keys_of(table):
            assert meaning, f"{table.header} {key}: write a comment beside the key in kdcache/recipe"
            assert kind, key
            rows[table.header, key] = (kind, default)
    shown = {table.model for table in generator().TABLES}
    assert models_in(Recipe) <= shown
    assert rows["[data]", "train"] == ("text", "required")
    assert rows["[distill]", "learning_rate"] == ("number > 0", "`5e-05`")
    assert rows["[distill]", "window"] == ('whole number ≥ 1 or `"all"`', "")
    assert ("[distill]", "epochs") not in rows  # it is one of the keys of both trainings
    assert "| `epochs` | whole number ≥ 1 | `3` |" in page
    assert parse_recipe('name = "a"\n[data]\ntrain = "t.tsv"\ntext = "x"\nlabel = "y"', Path("a.toml"))


def models_in(model: Any) -> set[Any]:
    """The section of a recipe and those in it."""
    found = {model}
    for field in model.model_fields.values():
        for inner in re.findall(r"kdcache\.recipe\.(\w+)\.(\w+)", str(field.annotation)):
            section = getattr(importlib.import_module(f"kdcache.recipe.{inner[0]}"), inner[1])
            found |= models_in(section)
    return found


def test_the_reference_has_every_error_and_exit_code(pages: dict[str, str]) -> None:
    page = pages["docs/reference/errors.md"]
    for error in generator().error_classes():
        assert re.search(rf"\| `{error.__name__}` \| .+ \| {error.exit_code} \| .{{20,}} \|", page), error
    for code, meaning in EXIT_CODES.items():
        assert f"| {code} | {meaning} |" in page
        assert f"| {code} | {meaning} |" in pages["docs/concepts.md"]
        assert str(code) in call("--help").out.split("Exit codes:")[1].split()


def test_the_reference_has_all_that_kdcache_exports(pages: dict[str, str]) -> None:
    page = pages["docs/reference/python.md"]
    for name in set(kdcache.__all__) - {"__version__", "losses", "distill"}:
        assert re.search(rf"auto(function|class):: kdcache\.{name}\n", page), name
    assert "autofunction:: kdcache.api.distill\n" in page
    for values in generator().python_values().values():
        assert all(value.__doc__ for value in values.values())


def test_comments_of_keys_are_read_where_they_are() -> None:
    comments = generator().key_comments
    recipe = generator().training
    assert comments(recipe.OptimSection)["warmup"] == "share of all optimizer steps"  # beside
    assert comments(recipe.DistillSection)["hidden_direction"] == "of the W_ij"  # in a value of several lines
    assert comments(generator().storage.DumpSection)["per_layer"].startswith("what differs in some layers")  # above
    assert comments(recipe.StageSection)["epochs"] == ""


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _few_texts_are_timed: None) -> None:
    """Its commands as they stand; teachers of the hub are replaced by tiny ones in directories."""
    monkeypatch.chdir(tmp_path)
    rows = reviews(150, seed=3)
    names = ("negative", "positive")
    for file, chosen in (("train.csv", rows[:90]), ("test.csv", rows[90:130])):
        lines = [f'"{text}",{names[label]}' for text, label in chosen]
        Path(file).write_text("\n".join(["sentence,label", *lines]) + "\n")
    Path("more.csv").write_text("\n".join(["sentence", *(f'"{text}"' for text, _ in rows[130:])]) + "\n")
    make_model(tmp_path / "bert", "bert", depth=2, seed=1)
    make_model(tmp_path / "roberta", "roberta", depth=2, seed=2)
    (tmp_path / "remote").mkdir()
    monkeypatch.setenv("KDCACHE_REMOTE", str(tmp_path / "remote"))
    done = []
    for words in called(shell_blocks((DOCS / "tutorial.md").read_text())):
        if words[1] == "export":
            continue  # ten seconds; tests/students/test_export.py
        arguments = words[1:]
        if words[1] == "init":
            arguments += ["--teacher", "bert", "--teacher", "roberta", "--yes"]
        said: Said = call(*arguments)
        assert said.code == 0, f"{shlex.join(words)}\n{said.err}"
        done.append(words[1])
        if words[1] == "init":
            quick = Path("reviews.toml").read_text()
            Path("reviews.toml").write_text(re.sub(r"(?m)^epochs = \d+", "epochs = 1", quick))
    assert done[:3] == ["init", "pipelines", "cofinetune"]
    assert Path("runs/reviews/report.html").is_file()
    assert Path("runs/reviews-seed1/student/model.safetensors").is_file()
