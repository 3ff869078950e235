"""What sources of cached and of live targets have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdcache.loading.examples import join_examples
from kdcache.loading.order import Epochs
from kdcache.loading.parts import check_texts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kdcache.cache.reader import Cache
    from kdcache.loading.choice import TargetChoice
    from kdcache.loading.examples import ExamplesOf
    from kdcache.loading.order import BatchSettings
    from kdcache.loading.parts import Texts


class JoinedSource:
    """Examples joined to the texts of a cache, and the order of their epochs.

    Raises MismatchError where teachers, layers, splits or texts are not in the cache, RecipeError for layer maps of
    different lengths.
    """

    def __init__(
        self,
        cache: Cache,
        settings: BatchSettings,
        choice: TargetChoice,
        splits: Sequence[str],
        examples: ExamplesOf | None,
        texts: Texts | None,
    ) -> None:
        self.cache, self._texts, self._choice = cache, texts, choice
        self._examples_of = examples
        choice.check(cache)
        self.teachers, self.layer_map, self.layers_at = choice.teachers, choice.layer_map, choice.at_epoch
        self._examples = join_examples(
            cache,
            self._examples_of,
            splits,
            missing=settings.missing,
            hidden=bool(choice.layer_map),
            logits=choice.logits,
        )
        check_texts(cache, texts, self._examples)
        self.skipped = self._examples.skipped
        self.epochs = Epochs(self._examples.parts, settings, self._examples.logits_only)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch, the same in every process."""
        return self.epochs.steps
