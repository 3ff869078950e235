"""``kdcache augment``: more texts without labels, made from the recipe's texts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdcache.cli.options import RUNS, Json, OutputDir, RecipeFile, Settings, open_job
from kdcache.cli.output import out
from kdcache.errors import RecipeError
from kdcache.progress import format_rate, format_share

if TYPE_CHECKING:
    from kdcache.data.augment import Source
    from kdcache.recipe import Recipe


def augment(
    recipe: RecipeFile,
    rows: Annotated[int, typer.Option(min=1, help="Texts to make.", show_default=False)],
    settings: Settings = None,
    output_dir: OutputDir = RUNS,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Other seeds give other texts.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A .parquet or .jsonl file; default: augmented.parquet in the run.", show_default=False
        ),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option("--from", metavar="SPLIT", help="train (default) or transfer; repeatable.", show_default=False),
    ] = None,
    mask: Annotated[float, typer.Option(min=0, max=1, help="Share of words that are masked.")] = 0.1,
    ngram: Annotated[float, typer.Option(min=0, max=1, help="Share of texts cut to some words in a row.")] = 0.25,
    longest: Annotated[int, typer.Option(min=1, help="Words of an n-gram at most.")] = 5,
    join: Annotated[float, typer.Option(min=0, max=1, help="Share of texts that join two; not for pairs.")] = 0.1,
    mask_token: Annotated[
        str | None, typer.Option(help="Default: that of the student's tokenizer.", show_default=False)
    ] = None,
    mlm: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Masked language model that replaces words.", show_default=False),
    ] = None,
    mlm_texts: Annotated[float, typer.Option(min=0, max=1, help="Share of texts that --mlm changes.")] = 0.5,
    mlm_words: Annotated[float, typer.Option(min=0, max=1, help="Share of their words that it replaces.")] = 0.4,
    mlm_candidates: Annotated[int, typer.Option(min=1, help="Most probable words of which one is drawn.")] = 15,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a file made with other settings.")] = False,
    json: Json = False,  # noqa: ARG001  (its callback switches the output)
) -> None:
    """Make texts without labels for data.transfer: masked words, n-grams, joined texts, words of a language model.

    No text is made from, or equal to, a text of validation or test. The same recipe, seed and versions give the same
    bytes. Each row names its parents, rule and seed.

    Example: kdcache augment sst2.toml --rows 50000 --seed 0 --output data/augmented.parquet

    Example: kdcache augment sst2.toml --rows 50000 --mlm google-bert/bert-base-uncased
    """
    from kdcache.data.augment import AugmentSettings
    from kdcache.data.augment_file import make_file

    job = open_job(recipe, settings, output_dir)
    target = output or job.run.root / "augmented.parquet"
    chosen = AugmentSettings(
        rows=rows,
        seed=seed,
        sources=_sources(source),
        mask_token=mask_token or _mask_token(job.recipe, needed=mask > 0),
        mask=mask,
        ngram=ngram,
        longest=longest,
        join=join,
        model=mlm_texts,
    )
    words = {"words": mlm_words, "candidates": mlm_candidates}
    made = make_file(job.recipe.data, chosen, target, mlm=mlm, mlm_words=words, replace=replace, progress=job.progress)
    _show(made.report(), rows, target)


def _show(report: Mapping[str, Any], rows: int, target: Path) -> None:
    out.document(report)
    out.text(str(target))
    shown = ", ".join(f"{count:,} {reason}" for reason, count in report["rejected"].items()) or "none rejected"
    out.note(f"{report['rows']:,} texts, {format_rate(report['texts_per_second'])} texts/s")
    out.note(f"{format_share(report['kept'])} of {report['attempts']:,} attempts kept ({shown})")
    if report["rows"] < rows:
        out.note(f"no more than {report['rows']:,} of {rows:,} different texts could be made")
    out.hint(f'Use it with data.transfer = ["{target}"], then dump the teachers.')


def _sources(named: list[str] | None) -> tuple[Source, ...]:
    known: dict[str, Source] = {"train": "train", "transfer": "transfer"}
    for name in named or ():
        if name not in known:
            raise RecipeError(
                f"--from is '{name}'; train or transfer was expected", "Validation and test texts are never used."
            )
    return tuple(dict.fromkeys(known[name] for name in named or ["train"]))


def _mask_token(recipe: Recipe, *, needed: bool) -> str:
    """The mask token of the student's tokenizer, which the other tokenizers read as ordinary characters."""
    from kdcache.data.encoding import load_tokenizer

    student: Any = recipe.student
    cure = "Name the mask token with --mask-token, such as '[MASK]', or use --mask 0."
    if not needed:
        return ""
    if student is None:
        raise RecipeError(f"recipe '{recipe.name}' has no [student] section, whose tokenizer has a mask token", cure)
    origin = student.tokenizer or student.init_from
    if origin.startswith("teacher:"):
        origin = recipe.teacher(origin.removeprefix("teacher:")).model
    token = load_tokenizer(origin, trust_remote_code=student.trust_remote_code).mask_token
    if token is None:
        raise RecipeError(f"the tokenizer of '{origin}' has no mask token", cure)
    return str(token)
