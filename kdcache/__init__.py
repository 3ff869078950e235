"""kdcache: multi-teacher distillation from a cache; the teachers run only once.

The stages of a recipe as functions (docs/python.md)::

    run = kdcache.run("sst2.toml")    # all of them
    run.scores["test"]["accuracy"]
    # one more student from the cache, in a run directory of its own
    kdcache.distill("sst2.toml", {"distill.seed": 1, "name": "sst2-seed1"}, cache="runs/sst2/cache")

In your own training loop (docs/examples)::

    cache = kdcache.open_cache("runs/sst2/cache")
    batches = kdcache.loader(cache, tokenizer, batch_size=32, max_length=128)
    soft = kdcache.losses.DistillationLoss(temperature=2.0)

Attributes are imported on first use: ``import kdcache`` and the cache commands import no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcache.api import Run, cofinetune, dump_teachers, evaluate, open_run, run, weigh
    from kdcache.cache.reader import open_cache
    from kdcache.loading.cached import loader
    from kdcache.methods import losses
    from kdcache.recipe import load_recipe

__version__ = "0.2.0"
__all__ = [
    "Run",
    "__version__",
    "cofinetune",
    "distill",
    "dump_teachers",
    "evaluate",
    "load_recipe",
    "loader",
    "losses",
    "open_cache",
    "open_run",
    "run",
    "weigh",
]

_STAGES = ("Run", "cofinetune", "dump_teachers", "evaluate", "open_run", "run", "weigh")
_LAZY = {
    **{name: ("kdcache.api", name) for name in _STAGES},
    "distill": ("kdcache.distill", None),  # a package that is callable
    "load_recipe": ("kdcache.recipe", "load_recipe"),
    "open_cache": ("kdcache.cache.reader", "open_cache"),
    "loader": ("kdcache.loading.cached", "loader"),
    "losses": ("kdcache.methods.losses", None),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kdcache' has no attribute '{name}'; it has: {', '.join(__all__)}")
    module, attribute = _LAZY[name]
    imported = importlib.import_module(module)
    value = imported if attribute is None else getattr(imported, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
