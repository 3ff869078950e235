"""The commented recipe as text. All values pass through a TOML library, also in comments, so any name may occur."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

_LONGEST_LINE = 90
MOST_LABELS = 1_000  # longer lists are left out: the sorted order is the same


@dataclass(frozen=True)
class Teacher:
    """One ``[[teachers]]`` table; ``own`` keeps its classifier."""

    name: str
    model: str
    learning_rate: float | None = None
    own: bool = False
    licence: str = ""
    remark: str = ""


@dataclass(frozen=True)
class FirstRecipe:
    """What the recipe is to say. Paths are as written there; ``layers`` None keeps all blocks of the student."""

    name: str
    train: str
    text: tuple[str, ...]
    label: str
    teachers: tuple[Teacher, ...]
    student: str
    labels: tuple[str, ...] = ()
    validation: str | None = None
    validation_fraction: float = 0.0
    test: str | None = None
    transfer: tuple[str, ...] = ()
    max_length: int = 128
    lengths: str = ""  # a comment
    layers: int | None = None
    dim: int = 128
    cofinetune_epochs: int = 3
    distill_epochs: int = 3
    learning_rate: float = 3e-5
    student_learning_rate: float = 5e-5
    costs: tuple[str, ...] = field(default=())  # comments


def quoted(value: str | float | Sequence[str]) -> str:
    """A value as TOML on one line."""
    import tomli_w

    if isinstance(value, str) or not isinstance(value, Sequence):
        return tomli_w.dumps({"v": value}).removeprefix("v = ").removesuffix("\n")
    return "[" + ", ".join(quoted(one) for one in value) + "]"


def _long_list(values: Sequence[str]) -> str:
    """A list, one value a line if it is long."""
    line = quoted(values)
    return line if len(line) <= _LONGEST_LINE else "[\n" + "".join(f"    {quoted(one)},\n" for one in values) + "]"


def recipe_text(recipe: FirstRecipe) -> str:
    """The recipe with comments; ``load_recipe`` reads it."""
    parts = [_head(recipe), _data(recipe), *(_teacher(teacher) for teacher in recipe.teachers), _trainings(recipe)]
    return "\n".join(line for part in parts for line in (*part, ""))


def _head(recipe: FirstRecipe) -> list[str]:
    return [
        "# Made by kdcache init. Everything here can be changed; check it with: kdcache pipelines validate FILE",
        "#",
        "# Costs (an estimate from rows, lengths and model sizes; kdcache plan measures it):",
        *(f"#   {line}" for line in recipe.costs),
        "",
        f"name = {quoted(recipe.name)}              # of the run directory: runs/NAME",
        'licence = ""              # of the data and the models: it is shown on the card of the cache and the student',
    ]


def _data(recipe: FirstRecipe) -> list[str]:
    lines = ["[data]                    # paths are relative to this file", f"train = {quoted(recipe.train)}"]
    if recipe.validation is not None:
        lines.append(f"validation = {quoted(recipe.validation)}")
    else:
        fraction = quoted(recipe.validation_fraction)
        lines.append(
            f"validation_fraction = {fraction}    # of train, chosen by a hash of the text: the same every time"
        )
    if recipe.test is not None:
        lines.append(f"test = {quoted(recipe.test)}")
    if recipe.transfer:
        lines.append(f"transfer = {_long_list(recipe.transfer)}    # texts without labels, for distillation only")
    else:
        lines.append("# transfer = []           # files of texts without labels help a student most; kdcache augment")
    lines += [
        f"text = {quoted(recipe.text)}    # one column, or two for pairs",
        f"label = {quoted(recipe.label)}",
    ]
    if recipe.labels:
        lines.append(f"labels = {_long_list(recipe.labels)}    # class order: number 0, 1, …")
    return [
        *lines,
        f"max_length = {recipe.max_length}          # tokens; {recipe.lengths}",
        'licence = ""              # of the data',
    ]


def _teacher(teacher: Teacher) -> list[str]:
    lines = ["[[teachers]]", f"name = {quoted(teacher.name)}", f"model = {quoted(teacher.model)}"]
    if teacher.own:
        lines.append('head = "own"              # fine-tuned on these labels already: used as it is')
    elif teacher.learning_rate is not None:
        lines.append(f"learning_rate = {quoted(teacher.learning_rate)}")
    if teacher.remark:
        lines.append(f"# {teacher.remark}")
    remark = "check it" if teacher.licence else "of this model"
    return [*lines, f"licence = {quoted(teacher.licence)}    # {remark}"]


def _trainings(recipe: FirstRecipe) -> list[str]:
    layers = "# layers = 3              # keep the first 3 blocks only: a smaller and faster student"
    if recipe.layers is not None:
        layers = f"layers = {recipe.layers}                # its first blocks; fewer are faster and less accurate"
    return [
        "[cofinetune]              # the teachers are trained together under one head",
        f"epochs = {recipe.cofinetune_epochs}",
        "batch_size = 32",
        f"learning_rate = {quoted(recipe.learning_rate)}     # of the shared head",
        'precision = "float32"     # "bf16" is faster on GPUs and some processors',
        "seed = 0",
        "",
        "[dump]                    # what the cache keeps; kdcache plan RECIPE compares the choices",
        'projection = "pca"',
        f"dim = {recipe.dim}",
        'dtype = "int8"',
        '# tokens_per_batch = "auto"    # on a GPU: batches by its memory; else 4096 tokens',
        "",
        "[student]",
        f"init_from = {quoted(recipe.student)}    # a hub name, a directory, or teacher:NAME",
        layers,
        "",
        "[distill]",
        'method = "mt-bert"        # others: kdcache methods',
        f"epochs = {recipe.distill_epochs}",
        "batch_size = 32",
        f"learning_rate = {quoted(recipe.student_learning_rate)}",
        "seed = 0",
        "",
        "[distill.weights]         # factors of the loss terms",
        "task = 1.0                # labels",
        "soft = 1.0                # soft labels of the teachers",
        "hidden = 0.1              # hidden states of the teachers",
    ]
