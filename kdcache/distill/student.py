"""The student: an encoder cut to size, with one of two heads.

``standard`` is a ``AutoModelForSequenceClassification`` and loads with transformers alone. ``shared`` is the paper's: the
pooling and prediction layer that the teachers share (MT-BERT, section 3.1), copied from them, behind an adapter where the
widths differ. Both look the same to training: inputs in, logits and hidden states out.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from kdcache.data.encoding import load_tokenizer
from kdcache.distill.blocks import blocks_to_keep, keep_blocks, set_dropout
from kdcache.errors import ModelError, RecipeError
from kdcache.teachers.teacher import accepted_inputs, be_quiet, position_limit

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from kdcache.recipe import StudentSection
    from kdcache.teachers.head import SharedHead

HeadKind = Literal["standard", "shared"]
TEACHER_PREFIX = "teacher:"


@dataclass(frozen=True)
class StudentOutput:
    """``logits`` float32 [batch, classes]; ``hidden_states`` [batch, tokens, width] by layer, 0 = embeddings."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...]


class StudentModel(nn.Module):
    """An encoder with a head. ``network`` is the classifier of transformers, or the encoder where the head is shared."""

    def __init__(self, network: PreTrainedModel, head: SharedHead | None = None, adapter: nn.Linear | None = None) -> None:
        super().__init__()
        self.network = network
        self.head = head
        self.adapter = adapter
        one_type = getattr(network.config, "type_vocab_size", 2) < 2  # RoBERTa: a tokenizer's second type would be out of range
        self.accepted = accepted_inputs(network) - ({"token_type_ids"} if one_type else set())

    @property
    def head_kind(self) -> HeadKind:
        return "standard" if self.head is None else "shared"

    @property
    def config(self) -> PretrainedConfig:
        return self.network.config

    @property
    def width(self) -> int:
        """Dimensions of a hidden state."""
        return int(self.config.hidden_size)

    @property
    def depth(self) -> int:
        """Number of blocks; ``hidden_states[depth]`` is the output of the last."""
        return int(self.config.num_hidden_layers)

    def forward(self, inputs: Mapping[str, Tensor], *, hidden_states: bool = False) -> StudentOutput:
        """``inputs``: input_ids, attention_mask [batch, tokens] and what else the tokenizer gives."""
        accepted = {name: tensor for name, tensor in inputs.items() if name in self.accepted}
        output = self.network(**accepted, output_hidden_states=hidden_states, return_dict=True)
        states = tuple(output.hidden_states) if hidden_states else ()
        if self.head is None:
            return StudentOutput(output.logits.float(), states)
        last = output.last_hidden_state if self.adapter is None else self.adapter(output.last_hidden_state)
        logits, _ = self.head(last, inputs["attention_mask"])
        return StudentOutput(logits.float(), states)


@dataclass(frozen=True)
class Student:
    """A student with what it takes to use it; ``source`` says where its weights came from."""

    model: StudentModel
    tokenizer: PreTrainedTokenizerBase
    label_names: tuple[str, ...]
    max_length: int  # tokens
    source: str

    @property
    def parameters(self) -> int:
        """Trainable parameters, embeddings included."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def build_student(
    section: StudentSection,
    label_names: Sequence[str],
    *,
    max_length: int,
    seed: int,
    dropout: float | None = None,
    teachers_dir: Path | None = None,
) -> Student:
    """The untrained student of a recipe, on the CPU in float32. Weights that no checkpoint gives are drawn from ``seed``.

    ``max_length`` is that of the data, where the section has none of its own. ``teachers_dir`` is needed for
    ``init_from = "teacher:NAME"`` and for the shared head. Raises ModelError and RecipeError.
    """
    source = _source(section, teachers_dir)
    config = _config(section, source)
    tokenizer = load_tokenizer(section.tokenizer or source)
    if section.config is not None:
        config.update({"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id} | section.config)
    set_dropout(config, dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if section.head == "standard":
            config.id2label = dict(enumerate(label_names))
            config.label2id = {name: index for index, name in enumerate(label_names)}
            network = _network(section, source, config)
            encoder = cast("PreTrainedModel", network.base_model)
            model = StudentModel(network)
        else:
            network = encoder = _network(section, source, config)
            head, adapter = _shared_head(teachers_dir, int(config.hidden_size), len(label_names), dropout)
            model = StudentModel(network, head, adapter)
    if section.config is None:
        keep_blocks(encoder, blocks_to_keep(section.layers, int(config.num_hidden_layers), source), source)
    length = section.max_length or max_length
    _check_fits(encoder, tokenizer, length, source)
    return Student(model, tokenizer, tuple(label_names), length, source)


def _source(section: StudentSection, teachers_dir: Path | None) -> str:
    """A hub name or directory; for a config its model type, which names it in messages."""
    if section.config is not None:
        return f"config of type {section.config.get('model_type')}"
    assert section.init_from is not None
    if not section.init_from.startswith(TEACHER_PREFIX):
        return section.init_from
    name = section.init_from.removeprefix(TEACHER_PREFIX)
    if teachers_dir is None or not teachers_dir.is_dir():
        where = (
            "no directory of co-finetuned teachers is known"
            if teachers_dir is None
            else f"there is no directory '{teachers_dir}'"
        )
        raise ModelError(
            f"student.init_from is '{section.init_from}', but {where}",
            "Run kdcache cofinetune first, keep teachers/ beside the cache, or set student.init_from to a hub name or directory.",
        )
    from kdcache.teachers.bundle import teacher_names

    known = teacher_names(teachers_dir)
    if name not in known:
        raise ModelError(
            f"student.init_from is '{section.init_from}', but '{teachers_dir}' holds no teacher '{name}'; it holds: {', '.join(known)}",
            "Set student.init_from to one of these, e.g. teacher:" + (known[0] if known else "NAME"),
        )
    return str(teachers_dir / name)


def _config(section: StudentSection, source: str) -> PretrainedConfig:
    from transformers import AutoConfig

    be_quiet()
    if section.config is None:
        try:
            return cast("PretrainedConfig", AutoConfig.from_pretrained(source))
        except Exception as error:  # transformers raises OSError, ValueError, KeyError … for a missing or foreign directory
            raise _not_loadable(source, error) from error
    values = dict(section.config)
    model_type = values.pop("model_type", None)
    if not isinstance(model_type, str):
        raise RecipeError("student.config has no model_type", 'Example: config = { model_type = "bert", num_hidden_layers = 4 }')
    try:
        return AutoConfig.for_model(model_type, **values)
    except Exception as error:  # unknown type, or a value of the wrong kind
        raise RecipeError(
            f"student.config is not usable: {_first_line(error)}", "Check model_type and the keys of that config."
        ) from error


def _network(section: StudentSection, source: str, config: PretrainedConfig) -> PreTrainedModel:
    """The classifier, or for the shared head the bare encoder without pooler; freshly initialised where no weights are given."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_MAPPING

    standard = section.head == "standard"
    known = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING if standard else MODEL_MAPPING
    if type(config) not in known:
        raise ModelError(
            f"'{source}' is a model of type '{config.model_type}', which transformers cannot make a student of",
            "Choose an encoder, e.g. BERT, RoBERTa, DistilBERT, MPNet, ELECTRA or DeBERTa.",
        )
    model_class: Any = known[type(config)]
    options = {} if standard else without_pooler(model_class)
    try:
        if section.config is not None:
            return cast("PreTrainedModel", model_class(config, **options).float())
        model, report = model_class.from_pretrained(
            source, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=standard, **options
        )
    except Exception as error:  # as above; also broken weight files
        raise _not_loadable(source, error) from error
    _check_complete(model, report, source)
    return cast("PreTrainedModel", model)


def without_pooler(model_class: Any) -> dict[str, bool]:
    """The option that leaves out a pooler, for encoder classes that know it: the shared head pools itself."""
    takes = inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}


def _check_complete(model: PreTrainedModel, report: Mapping[str, Any], source: str) -> None:
    """Only heads and poolers may be new: random blocks inside a pretrained encoder are a mistake, not a student."""
    prefix = "" if model.base_model is model else model.base_model_prefix + "."
    absent = [*report["missing_keys"], *(key[0] if isinstance(key, tuple) else key for key in report["mismatched_keys"])]
    encoder = sorted(key for key in absent if key.startswith(prefix) and "pooler." not in key)
    if encoder:
        raise ModelError(
            f"the weights of '{source}' lack {', '.join(encoder[:3])}{' …' if len(encoder) > 3 else ''}",
            "Take a directory made by save_pretrained, or give student.config for a student with random weights.",
        )


def _shared_head(
    teachers_dir: Path | None, width: int, classes: int, dropout: float | None
) -> tuple[SharedHead, nn.Linear | None]:
    """A copy of the teachers' head to train on, and an adapter to its width where the student's differs."""
    if teachers_dir is None or not teachers_dir.is_dir():
        raise ModelError(
            "student.head is 'shared', but no directory with the teachers' shared head is at hand",
            "Run kdcache cofinetune first, keep teachers/ beside the cache, or set student.head = 'standard'.",
        )
    from kdcache.teachers.bundle import load_shared_head

    head = load_shared_head(teachers_dir)
    if head.classes != classes:
        raise ModelError(f"the shared head in '{teachers_dir}' has {head.classes} classes, the task has {classes}")
    for module in head.modules() if dropout is not None else ():
        if isinstance(module, nn.Dropout):
            module.p = dropout if dropout is not None else module.p
    for parameter in head.parameters():
        parameter.requires_grad_(True)
    return head, None if head.width == width else nn.Linear(width, head.width)


def _check_fits(encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int, source: str) -> None:
    longest = position_limit(encoder)
    if longest is not None and max_length > longest:
        raise ModelError(
            f"max_length is {max_length}, but the student '{source}' has positions for {longest} tokens",
            f"Set student.max_length to at most {longest}.",
        )
    vocabulary = int(encoder.config.vocab_size)
    if len(tokenizer) > vocabulary:
        raise ModelError(
            f"the tokenizer '{tokenizer.name_or_path}' has {len(tokenizer)} tokens, but the student '{source}' has embeddings for {vocabulary}",
            "Set student.tokenizer to the tokenizer that the model was made with.",
        )
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"the tokenizer '{tokenizer.name_or_path}' has no padding token", "Set student.tokenizer to one that has."
        )


def _not_loadable(source: str, error: Exception) -> ModelError:
    return ModelError(
        f"no model could be loaded from '{source}': {_first_line(error)}",
        "Set student.init_from to a directory with config.json and model.safetensors, or to a hub name that is within reach.",
    )


def _first_line(error: Exception) -> str:
    """What an error of another library says, on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
