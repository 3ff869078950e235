"""The pipeline file: TOML read into strict pydantic models.

    sections.py   the sections and keys, their types and defaults
    sweep.py      the section of a sweep, and the keys that may vary in one
    loading.py    file and ``--set`` overrides to a Recipe with absolute paths, back to TOML, and error messages

Unknown keys are errors that name the nearest key. Paths in a recipe are relative to its file; they are made absolute
here, so later stages need not know where the file is.
"""

from kdcache.recipe.loading import dump_toml, load_recipe, parse_recipe
from kdcache.recipe.sections import DATA_FILE_ENDINGS, DataSection, Recipe, TeacherSection
from kdcache.recipe.storage import DumpSection, StoredDtype
from kdcache.recipe.sweep import SearchSection, SweepSection
from kdcache.recipe.training import (
    BaselineSection,
    CofinetuneSection,
    DistillSection,
    OptimSection,
    StudentSection,
    WeightsSection,
)
from kdcache.recipe.values import Head, Precision, Projection

__all__ = [
    "DATA_FILE_ENDINGS",
    "BaselineSection",
    "CofinetuneSection",
    "DataSection",
    "DistillSection",
    "DumpSection",
    "Head",
    "OptimSection",
    "Precision",
    "Projection",
    "Recipe",
    "SearchSection",
    "StoredDtype",
    "StudentSection",
    "SweepSection",
    "TeacherSection",
    "WeightsSection",
    "dump_toml",
    "load_recipe",
    "parse_recipe",
]
