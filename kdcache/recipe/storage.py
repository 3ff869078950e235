"""What a recipe stores of each teacher: ``[dump]``, and what differs in single layers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from kdcache.errors import MismatchError
from kdcache.recipe.values import (
    Count,
    LayerNumbers,
    Positive,
    Precision,
    Projection,
    Section,
    Seed,
    TokenSelection,
    WhichLayer,
)


def _storage_format(spelling: str) -> str:
    from kdcache.codecs.registry import storage_formats, stored_name

    try:
        return stored_name(spelling)
    except MismatchError as error:
        titles = [f"'{known.title}'" for known in storage_formats().values()]
        expected = f"{', '.join(titles[:-1])} or {titles[-1]}"
        raise PydanticCustomError("literal_error", "{expected} was expected", {"expected": expected}) from error


StoredDtype = Annotated[str, AfterValidator(_storage_format)]  # a name of kdcache.codecs.registry


class StoredSection(Section):
    """How a layer is stored if not as in ``[dump]``; keys that are not given are as there."""

    projection: Projection | None = None  # as in [dump]
    dim: Positive | None = None  # as in [dump]
    dtype: StoredDtype | None = None  # as in [dump]
    bytes: Positive | None = None  # of a row, for dtype "trellis"
    tokens: TokenSelection | None = None  # as in [dump]


PerLayer = dict[WhichLayer, StoredSection]  # "12", "last" or "all"; a number wins over "last", "last" over "all"


TOKENS_PER_BATCH = 4096


class DumpSection(Section):
    """What the cache stores of each teacher.

    With ``dtype = "trellis"`` a row takes ``bytes`` bytes and ``dim`` is ignored: the bits go to the PCA dimensions
    where they reduce the error most.
    """

    backend: Literal["torch", "onnxruntime"] = "torch"  # what runs the teachers
    layers: Literal["even", "all", "last", "none"] | LayerNumbers = "even"  # even: those that the student will match
    projection: Projection = "pca"  # of hidden states, fitted on a sample of the texts
    dim: Positive = 128  # dimensions after the projection
    dtype: StoredDtype = "int8"  # float32, float16, int8, float8 or trellis
    bytes: Positive | None = None  # of a token and layer, for dtype "trellis"
    tokens: TokenSelection = "all"  # a target for every token, for the first one, or for the mean of a text's tokens
    # what differs in some layers: per_layer = { 12 = { dtype = "trellis", bytes = 192 } }
    per_layer: PerLayer = Field(default_factory=dict)
    pooled: bool = False  # also store the pooled vector of each text
    out_of_fold: bool | None = None  # logits of train texts from cofinetune.folds; where there are folds if not given
    hidden_transfer: Count | None = (
        None  # transfer texts that get hidden states, by text id; all of them where not given
    )
    part_size: Positive | None = None  # texts of a part; where not given as in the cache, 4096 to 16384 in a new one
    sample_texts: Positive = 2048  # on which bases and variances are fitted
    tokens_per_batch: Positive | Literal["auto"] = (
        TOKENS_PER_BATCH  # padded tokens of one forward pass; "auto": by memory of a GPU
    )
    precision: Precision = "float32"  # of the forward pass of the teachers
    compile: Annotated[bool | None, AfterValidator(lambda value: value or None)] = (
        None  # torch.compile of the teachers, with texts padded to one of eight lengths; for backend "torch"
    )
    seed: Seed = 0  # of the order of the texts and of the sample

    @model_validator(mode="after")
    def _backend_compiles(self) -> DumpSection:
        if self.compile and self.backend != "torch":
            raise ValueError(f'compile = true is for backend = "torch"; the recipe has backend = "{self.backend}"')
        return self

    @model_validator(mode="after")
    def _storage_is_consistent(self) -> DumpSection:
        check_stored(self.stored())
        for which, section in self.per_layer.items():
            check_stored(overlaid(self.stored(), section), f"per_layer.{which}: ")
        return self

    @property
    def batch_tokens(self) -> int | None:
        """``tokens_per_batch``; None for "auto"."""
        return None if self.tokens_per_batch == "auto" else self.tokens_per_batch

    @property
    def shared_batch_tokens(self) -> int:
        """The same where machines share the work, or nothing is stored: "auto" is the default."""
        return self.batch_tokens or TOKENS_PER_BATCH

    def stored(self) -> StoredSection:
        """How a layer without ``per_layer`` keys is stored."""
        return StoredSection(
            projection=self.projection, dim=self.dim, dtype=self.dtype, bytes=self.bytes, tokens=self.tokens
        )


def overlaid(below: StoredSection, above: StoredSection) -> StoredSection:
    """``below`` with the keys of ``above``; a dtype without bytes removes ``bytes``, one with bytes implies pca."""
    from kdcache.codecs.registry import storage_format

    given = above.model_dump(exclude_none=True)
    if "dtype" in given:
        by_bytes = storage_format(given["dtype"]).by_bytes
        given.setdefault(*(("projection", "pca") if by_bytes else ("bytes", None)))
    return below.model_copy(update=given)


def check_stored(stored: StoredSection, where: str = "") -> None:
    """Raises ValueError if dtype, bytes and projection do not fit together; ``where`` begins the message."""
    from kdcache.codecs.registry import storage_format, storage_formats

    assert stored.dtype is not None
    storage = storage_format(stored.dtype)
    if stored.bytes is not None and not storage.by_bytes:
        others = " or ".join(f'"{known.title}"' for known in storage_formats().values() if known.by_bytes)
        raise ValueError(f'{where}bytes = {stored.bytes} goes with dtype = {others}; with "{storage.title}" set dim')
    try:
        storage.check_keys(stored.projection, stored.bytes)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error
