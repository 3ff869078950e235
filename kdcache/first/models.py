"""What a model is, from its ``config.json`` alone, and the models that are proposed where none are given.

A directory is read where it is; a hub name from the table below, or from the files that the hub's client has fetched
before. Nothing is downloaded: of another hub name only the name is known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.errors import RecipeError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_SIZES = {  # key -> its names in the configs of the architectures
    "width": ("hidden_size", "d_model", "dim", "n_embd"),
    "blocks": ("num_hidden_layers", "n_layers", "n_layer", "num_layers"),
    "inner": ("intermediate_size", "hidden_dim", "d_ff", "n_inner"),
    "positions": ("max_position_embeddings", "n_positions"),
    "words": ("vocab_size",),
}
_RESERVED_POSITIONS = 2  # RoBERTa and its relatives number positions from 2


@dataclass(frozen=True)
class ModelFacts:
    """A model; ``blocks`` and ``width`` are 0 where nothing but the name is known.

    ``classes``: the label names of a fine-tuned classifier, by index; empty for encoders.
    """

    model: str
    family: str = ""
    blocks: int = 0
    width: int = 0
    inner: int = 0
    words: int = 0
    positions: int | None = None
    licence: str = ""
    classes: tuple[str, ...] = ()
    directory: Path | None = None

    @property
    def known(self) -> bool:
        """Whether its size is known."""
        return self.blocks > 0 and self.width > 0

    @property
    def encoder_parameters(self) -> int:
        """Weights that each token passes, without embeddings; BERT-base's where the size is not known."""
        blocks, width = (self.blocks, self.width) if self.known else (12, 768)
        return blocks * width * (4 * width + 2 * (self.inner or 4 * width))

    @property
    def parameters(self) -> int:
        """All weights, about."""
        return self.encoder_parameters + (self.words or 30_000) * (self.width or 768)

    @property
    def tokenizer_file(self) -> Path | None:
        """Its ``tokenizer.json``, if it is on this machine."""
        file = self.directory / "tokenizer.json" if self.directory else None
        return file if file is not None and file.is_file() else None


def _entry(model: str, family: str, sizes: tuple[int, int, int], words: int, licence: str = "Apache-2.0") -> ModelFacts:
    return ModelFacts(model, family, *sizes, words, positions=512, licence=licence)


LATIN_TEACHERS = (  # three architectures and tokenizers, as in the recipe sst2
    _entry("sentence-transformers/all-mpnet-base-v2", "mpnet", (12, 768, 3072), 30_527),
    _entry("ibm-granite/granite-embedding-30m-english", "roberta", (6, 384, 1536), 50_265),
    _entry("distilbert/distilbert-base-cased", "distilbert", (6, 768, 3072), 28_996),
)
LATIN_STUDENT = _entry("sentence-transformers/all-MiniLM-L6-v2", "bert", (6, 384, 1536), 30_522)
OTHER_TEACHERS = (  # many languages and scripts
    _entry("FacebookAI/xlm-roberta-base", "xlm-roberta", (12, 768, 3072), 250_002, "MIT"),
    _entry("google-bert/bert-base-multilingual-cased", "bert", (12, 768, 3072), 119_547),
    _entry("distilbert/distilbert-base-multilingual-cased", "distilbert", (6, 768, 3072), 119_547),
)
OTHER_STUDENT = _entry("sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2", "bert", (12, 384, 1536), 250_037)
_TABLE = {entry.model: entry for entry in (*LATIN_TEACHERS, LATIN_STUDENT, *OTHER_TEACHERS, OTHER_STUDENT)}


def model_facts(model: str) -> ModelFacts:
    """What is known of a directory or a hub name. Raises RecipeError if it is neither."""
    path = Path(model).expanduser()
    if path.is_dir():
        return _from_config(model, path, _config(path / "config.json", model))
    if path.is_file() or not _HUB_NAME.fullmatch(model):
        what = "a file" if path.is_file() else "neither a directory nor a hub name"
        raise RecipeError(
            f"model '{model}' is {what}",
            "Give a directory with config.json, weights and tokenizer, or a hub name (google-bert/bert-base-uncased).",
        )
    if model in _TABLE:
        return _TABLE[model]
    fetched = _fetched_before(model)
    return ModelFacts(model) if fetched is None else _from_config(model, None, _config(fetched, model))


def _fetched_before(model: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(model, "config.json")
    except ValueError:  # a name that the hub does not allow
        return None
    return Path(found) if isinstance(found, str) else None


def _config(path: Path, model: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(
            f"the directory '{model}' has no config.json", "Give a directory that transformers' save_pretrained made."
        ) from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"'{path}' is not readable: {error}", "Write or copy the model again.") from error
    if not isinstance(config, dict):
        raise RecipeError(f"'{path}' is no table of settings", "Write or copy the model again.")
    return config


def _from_config(model: str, directory: Path | None, config: Mapping[str, Any]) -> ModelFacts:
    sizes = {
        key: next((value for name in names if isinstance(value := config.get(name), int) and value > 0), 0)
        for key, names in _SIZES.items()
    }
    positions = sizes["positions"]
    return ModelFacts(
        model,
        family=str(config.get("model_type", "")),
        blocks=sizes["blocks"],
        width=sizes["width"],
        inner=sizes["inner"],
        words=sizes["words"],
        positions=max(8, positions - _RESERVED_POSITIONS) if positions else None,
        classes=_classes(config),
        directory=directory,
    )


def _classes(config: Mapping[str, Any]) -> tuple[str, ...]:
    architectures, names = config.get("architectures") or [], config.get("id2label")
    if not isinstance(names, Mapping) or not any(str(one).endswith("SequenceClassification") for one in architectures):
        return ()
    numbered = {int(key): str(value) for key, value in names.items() if str(key).isdecimal()}
    return tuple(numbered[number] for number in sorted(numbered))


def has_these_classes(facts: ModelFacts, labels: Sequence[str]) -> bool:
    """Whether a model is a classifier with exactly these labels, by name and without case."""
    theirs, ours = ([name.casefold() for name in names] for names in (facts.classes, labels))
    return len(theirs) == len(set(theirs)) == len(ours) == len(set(ours)) and set(theirs) == set(ours)


def teacher_names(models: Sequence[ModelFacts]) -> list[str]:
    """A name for each teacher: its family if they differ, else its own name; letters, digits, '.', '_' and '-'."""
    families = [facts.family for facts in models]
    by_family = all(families) and len(set(families)) == len(families)
    names: list[str] = []
    for facts in models:
        name = plain_name(facts.family if by_family else Path(facts.model).name, "teacher")
        taken = {other.lower() for other in names}
        number = 2
        unique = name
        while unique.lower() in taken:
            unique = f"{name[:58]}-{number}"
            number += 1
        names.append(unique)
    return names


def plain_name(text: str, otherwise: str) -> str:
    """``text`` with the characters that names in a recipe may have, at most 64; ``otherwise`` if none is left."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("._-")[:64]
    return plain or otherwise


def learning_rate(facts: ModelFacts) -> float:
    """A learning rate for fine-tuning, by width: wider models take smaller ones."""
    width = facts.width or 768
    for least, rate in ((1024, 1e-5), (768, 3e-5), (256, 1e-4)):
        if width >= least:
            return rate
    return 5e-4
