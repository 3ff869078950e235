"""Methods by name: each module of this package declares one, except those in ``_OTHERS``.

No torch is imported until a method is loaded.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from typing import TYPE_CHECKING

import kdcache.methods
from kdcache.errors import RecipeError

if TYPE_CHECKING:
    from kdcache.methods.base import Method

_OTHERS = ("base", "losses", "registry", "parts")


def method_names() -> tuple[str, ...]:
    """The names of all methods, from the names of their files."""
    modules = (module.name for module in pkgutil.iter_modules(kdcache.methods.__path__))
    return tuple(name.replace("_", "-") for name in modules if name not in _OTHERS)


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        RecipeError: There is no such method. The message lists all methods, the hint the most similar name.
    """
    check_method(name)
    method: Method = importlib.import_module(f"kdcache.methods.{name.replace('-', '_')}").METHOD
    if method.name != name:
        raise ValueError(f"kdcache/methods/{name.replace('-', '_')}.py declares method '{method.name}', not '{name}'")
    return method


def check_method(name: str) -> None:
    """Raise RecipeError where there is no method of that name."""
    names = method_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"Did you mean distill.method = '{near[0]}'?" if near else "Set distill.method to one of these."
        raise RecipeError(f"there is no distillation method '{name}'; there are: {', '.join(names)}", hint)


def all_methods() -> tuple[Method, ...]:
    """Every method, in the order of their names."""
    return tuple(find_method(name) for name in method_names())
