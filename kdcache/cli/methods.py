"""``kdcache methods``: the distillation methods there are, and what each needs of a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

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


Name = Annotated[
    str | None, typer.Argument(help="Show this method with its formula; all where not given.", show_default=False)
]


def methods(name: Name = None, json: Json = False) -> None:  # noqa: ARG001  (its callback switches the output)
    """List the distillation methods, where they come from, and what each needs of a cache; or show one.

    Example: kdcache methods

    Example: kdcache methods ca-mkd

    Example: kdcache methods --json
    """
    from kdcache.methods.registry import all_methods, find_method, method_text

    if name is not None:
        method, text = _described(find_method(name)), method_text(name)
        out.document(method | {"text": text})
        out.text(f"{method['title']} ({method['source']})")
        out.text(f"Needs: {_needs(method)}. Compares: {_COMPARES[method['scope']]}.")
        out.text()
        for line in text.splitlines():
            out.text(line)
        return
    described = [_described(method) for method in all_methods()]
    out.document(described)
    columns = ("method", "title", "needs", "compares", "source")
    rows = [
        (method["name"], method["title"], _needs(method), _COMPARES[method["scope"]], method["source"])
        for method in described
    ]
    out.table(columns, rows)
    out.hint("Show one with: kdcache methods NAME. Choose one with: kdcache distill RECIPE --set distill.method=NAME")


def as_markdown() -> str:
    """All methods for the documentation: a table, and each method's own text."""
    from kdcache.methods.registry import all_methods, method_text

    lines = ["| `distill.method` | in short | needs | compares | source |", "|---|---|---|---|---|"]
    texts = []
    for method in all_methods():
        shown = _described(method)
        cells = (f"`{method.name}`", shown["note"], _needs(shown), _COMPARES[method.scope], shown["source"])
        lines.append(f"| {' | '.join(cells)} |")
        texts.append(f"#### {method.name}\n\n```text\n{method_text(method.name)}\n```\n")
    return "\n".join([*lines, "", *texts])


_COMPARES = {"row": "each row", "batch": "rows of a batch"}


def _described(method: Method) -> dict[str, Any]:
    """A method as data.

    ``hidden_states`` lists what its terms take: stored, tokens, first or mean. ``teacher_facts`` lists what its choice
    or weights of teachers depend on besides the batch.
    """
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
        "teacher_facts": list(method.reads),
        "scope": method.scope,
    }


def _needs(described: dict[str, Any]) -> str:
    names = [name for name in ("labels", "logits") if described[name]]
    hidden = [f"hidden states ({_VECTORS[kind]})" for kind in described["hidden_states"]]
    return ", ".join([*names, *hidden, *described["teacher_facts"]])
