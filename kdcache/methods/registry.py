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

_ON_POLICY = "it learns from texts that the student generates, and a cache holds teacher outputs for fixed texts"
_ONLINE = "its teachers are trained together with the student, and a cache holds outputs of finished teachers"
_META = "it trains the teacher on the student's progress, and a cache holds outputs of a fixed teacher"
_REPLACED = "it runs the student's blocks between the teacher's, so the teacher must run in every step"
_ATTENTION = "it compares attention distributions or values, and a cache holds hidden states and logits"
_NOT_CACHED = {  # names of methods of the literature -> why a cache cannot give what they learn from
    "theseus": _REPLACED,  # BERT-of-Theseus, arXiv 2002.02925
    "bert-of-theseus": _REPLACED,
    "gkd": _ON_POLICY,  # generalised KD, arXiv 2306.13649
    "on-policy": _ON_POLICY,
    "minillm": _ON_POLICY,  # arXiv 2306.08543
    "imitkd": _ON_POLICY,  # arXiv 2009.07253
    "dml": _ONLINE,  # deep mutual learning, arXiv 1706.00384
    "mutual": _ONLINE,
    "one": _ONLINE,  # on-the-fly native ensemble, arXiv 1806.04606
    "online": _ONLINE,
    "codistillation": _ONLINE,  # arXiv 1804.03235
    "metadistil": _META,  # arXiv 2106.04570
    "meta": _META,
    "ikd": _META,  # interactive KD, arXiv 2109.04641
    "minilm": _ATTENTION,  # arXiv 2002.10957 and 2012.15828
    "minilmv2": _ATTENTION,
    "mobilebert": _ATTENTION,  # arXiv 2004.02984
}


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


def method_text(name: str) -> str:
    """What the method's file says about it: its formula, and what differs from the publication."""
    find_method(name)
    return (importlib.import_module(f"kdcache.methods.{name.replace('-', '_')}").__doc__ or "").strip()


def check_method(name: str) -> None:
    """Raise RecipeError where there is no method of that name, with the reason if a cache rules it out.

    Methods of the literature that a cache rules out are known in any case, with "_" or "-".
    """
    names, usual = method_names(), name.lower().replace("_", "-")
    if name not in names and usual in _NOT_CACHED:
        raise RecipeError(
            f"method '{name}' cannot learn from a cache: {_NOT_CACHED[usual]}",
            "Choose one of: " + ", ".join(names) + ".",
        )
    if name not in names:
        near = difflib.get_close_matches(usual, names, n=1, cutoff=0.5)
        hint = f"Did you mean distill.method = '{near[0]}'?" if near else "Set distill.method to one of these."
        raise RecipeError(f"there is no distillation method '{name}'; there are: {', '.join(names)}", hint)


def all_methods() -> tuple[Method, ...]:
    """Every method, in the order of their names."""
    return tuple(find_method(name) for name in method_names())
