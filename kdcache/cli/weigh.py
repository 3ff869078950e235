"""``kdcache weigh``: a temperature and a weight for each teacher of a cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcache.cli.options import CacheReference, Json, RemoteUrl, find_cache
from kdcache.cli.output import out

if TYPE_CHECKING:
    from kdcache.cache.reader import Cache
    from kdcache.distill.weigh import Quality, Weighing


def weigh(
    cache: CacheReference,
    split: Annotated[str, typer.Option(metavar="SPLIT", help="Whose labelled texts the fit uses.")] = "validation",
    seed: Annotated[int, typer.Option(min=0, help="Of the folds of the cross-validation.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the result as [distill] keys of a recipe (TOML).", show_default=False),
    ] = None,
    remote: RemoteUrl = None,
    json: Json = False,  # noqa: ARG001  (its callback switches the output)
) -> None:
    """Fit a temperature and a weight for each teacher to its cached logits of labelled texts; no teacher runs.

    NLL: nats per row. ECE: calibration error. All scores but the raw ones are of rows that the fit did not see.

    Example: kdcache weigh runs/sst2/cache

    Example: kdcache weigh sst2-3t --split validation --output weights.toml
    """
    from kdcache.cache.reader import open_cache
    from kdcache.progress import SilentProgress

    found = find_cache(cache, remote)
    if isinstance(found, Path):
        made = _weighed(open_cache(found), split, seed)
    else:
        with found.read(SilentProgress()) as opened:
            made = _weighed(opened, split, seed)
    if output is not None:
        _write(output, made, cache)
    out.document(made.as_dict())
    _show(made)
    out.hint('Use it with: kdcache distill RECIPE --set distill.teacher_weights="fitted"')


def _weighed(cache: Cache, split: str, seed: int) -> Weighing:
    from kdcache.distill.weigh import labelled_logits, weigh

    names = tuple(cache.teachers)
    return weigh(labelled_logits(cache, names, split, seed=seed), names, cache.task.label_names, split)


def _write(path: Path, made: Weighing, cache: str) -> None:
    import tomli_w

    from kdcache.files import replace_file

    origin = f"# Fitted to {made.rows} rows of '{made.split}' by: kdcache weigh {cache}\n"
    replace_file(path, (origin + tomli_w.dumps({"distill": made.settings()})).encode())


def _show(made: Weighing) -> None:
    columns = ("", "accuracy", "NLL", "ECE", "temperature", "NLL at it", "ECE at it", "weight", "NLL without")
    rows: list[tuple[Any, ...]] = []
    for name, each in made.teachers.items():
        scaled = (each.temperature, each.calibrated.nll, each.calibrated.calibration_error)
        lost = None if each.loss_without is None else f"{each.loss_without:+.4f} ± {each.standard_error:.4f}"
        rows.append((f"teacher {name}", *_raw(each.raw), *scaled, each.weight, lost))
    rows.append(("their mean", *_raw(made.mean), None, None, None, None, None))
    fitted = made.fitted
    rows.append(("fitted mixture", fitted.accuracy, None, None, None, fitted.nll, fitted.calibration_error, None, None))
    out.table(columns, rows)
    out.text()
    kinds = [(str(kind), nll, "chosen" if kind == made.kind else "") for kind, nll in made.kinds.items()]
    out.table((f"mixtures of {made.rows} rows", "held-out NLL", ""), kinds)
    if made.mixture.class_weights is not None:
        out.text()
        shares = made.mixture.class_weights.tolist()
        named = [(f"teacher {name}", *own) for name, own in zip(made.teachers, shares, strict=True)]
        out.table(("weight where predicted:", *made.label_names), named)
    out.text()
    if made.leave_out:
        out.text(f"Leave out: {', '.join(made.leave_out)}. The held-out NLL does not rise without.")
    elif len(made.teachers) > 1:
        out.text("No teacher can be left out: without any of them the held-out NLL rises.")


def _raw(quality: Quality) -> tuple[float, float, float]:
    return quality.accuracy, quality.nll, quality.calibration_error
