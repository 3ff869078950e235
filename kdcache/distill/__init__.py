"""The distill stage: it brings loader, method and student together, trains, and writes the results.

``kdcache.distill(recipe)`` runs it: the package is callable, because it has the name of the function that users expect
(docs/decisions/0033). The function is ``kdcache.api.distill``, which documents its arguments.
"""

import importlib
import sys
from types import ModuleType
from typing import Any


class _Distill(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Train the student of a recipe; see ``kdcache.api.distill``."""
        return importlib.import_module("kdcache.api").distill(*arguments, **options)  # late: it imports this package


sys.modules[__name__].__class__ = _Distill
