"""Types of the values in a recipe, with their bounds."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from kdcache.progress import listed

T = TypeVar("T")


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _distinct(values: list[T]) -> list[T]:
    counts = Counter(values)
    often = [repr(value) for value in values if counts[value] > 1]
    if often:
        raise ValueError(f"each may be named once, but these are named more often: [{listed(often)}]")
    return values


def _which_layer(name: str) -> str:
    if name not in ("all", "last") and not (name.isdecimal() and str(int(name)) == name):
        raise ValueError(f'\'{name}\' is no layer: give its number, "last" or "all"')
    return name


Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
AboveZero = Annotated[float, Field(gt=0.0)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy, torch and Python's own generators all take
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\z")]
NonEmpty = Annotated[str, Field(min_length=1)]
Strings = Annotated[
    list[NonEmpty], BeforeValidator(_listed), AfterValidator(_distinct)
]  # one string may stand for a list of one
LayerNumbers = Annotated[list[Count], Field(min_length=1), AfterValidator(_distinct)]  # 0 = embeddings
BlockNumbers = Annotated[list[Positive], Field(min_length=1), AfterValidator(_distinct)]
Precision = Literal["float32", "bf16", "fp16"]
Projection = Literal["none", "pca", "random"]
TokenSelection = Literal["all", "first", "pooled"]
WhichLayer = Annotated[str, AfterValidator(_which_layer)]
TrackerName = Literal["tensorboard", "wandb", "mlflow"]
Trackers = Annotated[list[TrackerName], AfterValidator(_distinct)]
Head = Literal["shared", "own"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
