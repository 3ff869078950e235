"""``kdcache methods``: the distillation methods there are, and what each needs of a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kdcache.cli.options import Json
from kdcache.cli.output import out

if TYPE_CHECKING:
    from kdcache.methods.base import Method

_VECTORS = {  # of hidden states, by what a term needs
    "stored": "as stored",
    "tokens": "tokens",
    "first": "first token",
    "mean": "mean of tokens",
}


def methods(json: Json = False) -> None:  # noqa: ARG001  (its callback switches the output)
    """List the distillation methods, where they come from, and what each needs of a cache.

    Example: kdcache methods

    Example: kdcache methods --json
    """
    from kdcache.methods.registry import all_methods

    described = [_described(method) for method in all_methods()]
    out.document(described)
    columns = ("method", "title", "needs", "compares", "source")
    rows = [
        (method["name"], method["title"], _needs(method), _COMPARES[method["scope"]], method["source"])
        for method in described
    ]
    out.table(columns, rows)
    out.hint("Choose one with: kdcache distill RECIPE --set distill.method=NAME")


_COMPARES = {"row": "each row", "batch": "rows of a batch"}


def _described(method: Method) -> dict[str, Any]:
    """A method as data; ``hidden_states`` lists what its terms take: stored, tokens, first or mean."""
    needs = [term.needs for term in method.terms]
    hidden = sorted({need.hidden for need in needs if need.hidden is not None})
    return {
        "name": method.name,
        "title": method.title,
        "source": method.source,
        "note": method.note,
        "logits": any(need.logits for need in needs),
        "hidden_states": hidden,
        "labels": any(need.labels for need in needs),
        "scope": method.scope,
    }


def _needs(described: dict[str, Any]) -> str:
    names = [name for name in ("labels", "logits") if described[name]]
    hidden = [f"hidden states ({_VECTORS[kind]})" for kind in described["hidden_states"]]
    return ", ".join([*names, *hidden])
