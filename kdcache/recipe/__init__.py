"""The pipeline file: TOML read into strict pydantic models.

    sections.py   the sections and keys, their types and defaults
    loading.py    file + ``--set`` overrides -> Recipe with absolute paths, and back to TOML
    messages.py   what pydantic found wrong, in the words of the recipe

Unknown keys are errors that name the nearest key; paths are relative to the recipe and made absolute here, so that no
later stage needs to know where the recipe lay.
"""

from kdcache.recipe.loading import dump_toml, load_recipe
from kdcache.recipe.sections import (
    DATA_FILE_ENDINGS,
    CofinetuneSection,
    DataSection,
    DistillSection,
    DumpSection,
    Head,
    OptimSection,
    Precision,
    Projection,
    Recipe,
    StoredDtype,
    StudentSection,
    TeacherSection,
    WeightsSection,
)

__all__ = [
    "DATA_FILE_ENDINGS",
    "CofinetuneSection",
    "DataSection",
    "DistillSection",
    "DumpSection",
    "Head",
    "OptimSection",
    "Precision",
    "Projection",
    "Recipe",
    "StoredDtype",
    "StudentSection",
    "TeacherSection",
    "WeightsSection",
    "dump_toml",
    "load_recipe",
]
