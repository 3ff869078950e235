"""More texts without labels, made by rules from the texts of a task: masking, n-gram sampling, joining, and replacement
of words by a masked language model.

The rules are those of Tang et al. (arXiv 1903.12136, data augmentation) and of TinyBERT (arXiv 1909.10351, appendix A).
The teachers label the new texts, so a rule need not keep the label. A new text is a function of the seed, of its parent
and of the number of the pass over the parents: asking for more rows gives the same rows and then more.

A text of validation or test is never a parent, and a new text never equals one, nor one of train: texts are compared
without case and white space.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal

from kdcache.cache.ids import id_list
from kdcache.data.texts import has_text, seeded_keys
from kdcache.errors import DataError

if TYPE_CHECKING:
    from kdcache.data.task import TaskData
    from kdcache.progress import Progress

Text = tuple[str, ...]
Source = Literal["train", "transfer"]
# One replacement of words per (words, generator); the new words, or None where nothing was replaced.
Replace = Callable[[Sequence[tuple[list[str], random.Random]]], list[list[str] | None]]

_BLOCK = 256  # attempts that a masked language model gets at once; part of what the rows depend on


@dataclass(frozen=True)
class AugmentSettings:
    """How texts are made; the defaults are those of the papers. Recorded with the rows."""

    rows: int
    seed: int = 0
    sources: tuple[Source, ...] = ("train",)
    mask_token: str = "[MASK]"
    mask: float = 0.1  # share of words that are masked
    ngram: float = 0.25  # share of texts that are cut to some words in a row
    longest: int = 5  # words of an n-gram
    join: float = 0.1  # share of texts that are two texts, one after the other; not for pairs
    model: float = 0.5  # share of the other texts whose words a masked language model replaces, if there is one


@dataclass(frozen=True)
class NewText:
    """A row of the output. ``parents``: the text ids that it was made from."""

    text: Text
    parents: tuple[bytes, ...]
    rule: str  # such as "mask+ngram"


@dataclass
class Augmented:
    """The rows, in the order in which they were made, and what became of the other attempts."""

    rows: list[NewText] = field(default_factory=list)
    attempts: int = 0
    rejected: Counter[str] = field(default_factory=Counter)  # reason -> attempts
    seconds: float = 0.0

    @property
    def kept(self) -> float:
        """Share of the attempts that gave a row."""
        return len(self.rows) / self.attempts if self.attempts else 0.0


@dataclass(frozen=True)
class _Attempt:
    parents: tuple[bytes, ...]
    words: tuple[list[str], ...]  # per column
    rule: str
    columns: tuple[int, ...]  # that are changed
    generator: random.Random
    by_model: bool = False


def augment(task: TaskData, settings: AugmentSettings, replace: Replace | None, progress: Progress) -> Augmented:
    """Make ``settings.rows`` new texts, or fewer if a whole pass over the parents gives none.

    Args:
        task: texts and splits.
        settings: rules, shares and seed.
        replace: a masked language model's replacement of words; None without one.
        progress: is advanced by the rows.

    Raises:
        DataError: no text of the sources may be used.
    """
    started, found = time.perf_counter(), Augmented()
    parents = parents_of(task, settings)
    used = {key(text) for text in _texts(task, ("train", "validation", "test", *settings.sources))}
    progress.start("augment", settings.rows, "texts")
    for number in itertools.count():
        before = len(found.rows)
        for block in _blocks(_attempts(task, parents, settings, number, replace is not None)):
            _take(found, _replaced(block, replace), used, settings.rows, progress)
            if len(found.rows) == settings.rows:
                break
        if len(found.rows) in (before, settings.rows):
            break
    progress.finish()
    found.seconds = time.perf_counter() - started
    return found


def parents_of(task: TaskData, settings: AugmentSettings) -> list[bytes]:
    """Ids of the texts that may be used, in seeded order: none that validation or test has too."""
    evaluation = {key(text) for text in _texts(task, ("validation", "test"))}
    ids = dict.fromkeys(
        identity for split in settings.sources if split in task.splits for identity in _ids(task, split)
    )
    usable = [identity for identity in ids if key(task.texts[identity]) not in evaluation]
    if not usable:
        raise DataError(
            f"none of the {len(ids):,} texts of {' and '.join(settings.sources)} may be used: all are in validation or "
            "test",
            "Name other texts in data.train, or add --from transfer.",
        )
    return [identity for _, identity in sorted(zip(seeded_keys(usable, settings.seed, "augment"), usable, strict=True))]


def key(text: Text) -> Text:
    """A text without case and white space, for comparisons."""
    return tuple(" ".join(column.casefold().split()) for column in text)


def _texts(task: TaskData, splits: Sequence[str]) -> Iterator[Text]:
    for split in splits:
        if split in task.splits:
            yield from (task.texts[identity] for identity in _ids(task, split))


def _ids(task: TaskData, split: str) -> list[bytes]:
    return id_list(task.splits[split].text_ids)


def _attempts(
    task: TaskData, parents: Sequence[bytes], settings: AugmentSettings, number: int, with_model: bool
) -> Iterator[_Attempt]:
    """One attempt per parent in pass ``number``."""
    for parent in parents:
        state = blake2b(parent + number.to_bytes(8, "little"), digest_size=16, key=settings.seed.to_bytes(8, "little"))
        generator = random.Random(int.from_bytes(state.digest(), "little"))
        words = tuple(column.split() for column in task.texts[parent])
        if len(words) == 1 and generator.random() < settings.join:
            other = parents[generator.randrange(len(parents))]
            joined = (words[0] + task.texts[other][0].split(),)
            yield _Attempt((parent, other), joined, "join", (), generator)
            continue
        columns = ((0,), (1,), (0, 1))[generator.randrange(3)] if len(words) == 2 else (0,)
        if with_model and generator.random() < settings.model:
            yield _Attempt((parent,), words, "mlm", columns, generator, by_model=True)
            continue
        yield _by_rules(parent, words, columns, generator, settings)


def _by_rules(
    parent: bytes,
    words: tuple[list[str], ...],
    columns: tuple[int, ...],
    generator: random.Random,
    settings: AugmentSettings,
) -> _Attempt:
    """Masking, then an n-gram of the result."""
    made, rules = list(words), set()
    for column in columns:
        drawn = [generator.random() < settings.mask for _ in made[column]]
        if any(drawn):
            rules.add("mask")
            pairs = zip(made[column], drawn, strict=True)
            made[column] = [settings.mask_token if masked else word for word, masked in pairs]
    if generator.random() < settings.ngram:
        for column in columns:
            length = generator.randint(1, settings.longest)
            if length < len(made[column]):
                rules.add("ngram")
                first = generator.randrange(len(made[column]) - length + 1)
                made[column] = made[column][first : first + length]
    made = [[] if all(word == settings.mask_token for word in column) else column for column in made]
    rule = "+".join(name for name in ("mask", "ngram") if name in rules)
    return _Attempt((parent,), tuple(made), rule, columns, generator)


def _blocks(attempts: Iterator[_Attempt]) -> Iterator[list[_Attempt]]:
    while block := list(itertools.islice(attempts, _BLOCK)):
        yield block


def _replaced(block: Sequence[_Attempt], replace: Replace | None) -> Iterator[_Attempt]:
    """The attempts, with the words that the model gives to those that are its own."""
    asked = [(attempt, column) for attempt in block if attempt.by_model for column in attempt.columns]
    given = replace([(attempt.words[column], attempt.generator) for attempt, column in asked]) if replace else []
    answers = {(id(attempt), column): new for (attempt, column), new in zip(asked, given, strict=True)}
    for attempt in block:
        if not attempt.by_model:
            yield attempt
            continue
        new = [answers.get((id(attempt), place)) for place in range(len(attempt.words))]
        words = tuple(old if made is None else made for old, made in zip(attempt.words, new, strict=True))
        rule = attempt.rule if any(new) else ""
        yield _Attempt(attempt.parents, words, rule, attempt.columns, attempt.generator)


def _take(found: Augmented, attempts: Iterator[_Attempt], used: set[Text], rows: int, progress: Progress) -> None:
    """Keep the attempts that gave a new text, up to ``rows`` in all."""
    before = len(found.rows)
    for attempt in attempts:
        if len(found.rows) == rows:
            break
        found.attempts += 1
        text = tuple(" ".join(words) for words in attempt.words)
        compared = key(text)
        if not attempt.rule:
            found.rejected["unchanged"] += 1
        elif not has_text(text):
            found.rejected["no word left"] += 1
        elif compared in used:
            found.rejected["equal to another text"] += 1
        else:
            used.add(compared)
            found.rows.append(NewText(text, attempt.parents, attempt.rule))
    progress.advance(len(found.rows) - before)
