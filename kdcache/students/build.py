"""Building a student from a recipe: load or initialise the model, cut it to size, add the head, check that it runs."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from kdcache.data.custom_code import code_not_run, wants_code
from kdcache.data.encoding import load_tokenizer
from kdcache.errors import ModelError, RecipeError, first_line
from kdcache.students.cut import blocks_to_keep, keep_blocks, set_dropout
from kdcache.students.model import Student, StudentModel, StudentOutput
from kdcache.students.output_layer import outputs_of_teacher, settle_output_layer
from kdcache.students.padding import declares_causal_attention, require_pad_token, settle_padding
from kdcache.teachers.teacher import be_quiet, position_limit
from kdcache.teachers.trial import try_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from kdcache.recipe import Recipe, StudentSection
    from kdcache.teachers.head import SharedHead

TEACHER_PREFIX = "teacher:"
_FAMILIES = (
    "Choose an encoder, e.g. BERT, RoBERTa, DistilBERT, MPNet, ELECTRA or DeBERTa, or a decoder, e.g. GPT-2, Llama or "
    "Qwen."
)


def build_student(
    section: StudentSection,
    label_names: Sequence[str],
    *,
    max_length: int,
    seed: int,
    dropout: float | None = None,
    teachers_dir: Path | None = None,
    labels_declared: bool = True,
) -> Student:
    """The untrained student of a recipe, on the CPU in float32.

    Weights that no checkpoint gives are drawn from ``seed``. ``max_length`` is that of the data, for a section without
    its own. ``teachers_dir`` is needed for ``init_from = "teacher:NAME"`` and for the shared head. A classifier keeps
    its output layer, in the order of ``label_names``, if these are its classes; one with classes LABEL_0 … if the order
    of integers is known, as for teachers (``labels_declared``). Raises ModelError and RecipeError, also for a model
    whose outputs depend on the other rows of a batch.
    """
    source = _source(section, teachers_dir)
    config = _config(section, source)
    tokenizer = load_tokenizer(section.tokenizer or source, trust_remote_code=section.trust_remote_code)
    pad_token_id = require_pad_token(tokenizer, config.pad_token_id)
    if section.config is not None:
        config.update({"vocab_size": len(tokenizer), "pad_token_id": pad_token_id} | section.config)
    if config.pad_token_id is None:
        config.pad_token_id = pad_token_id
    set_dropout(config, dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if section.head == "standard":
            outputs = _outputs(section, config, teachers_dir)
            network = _classifier(section, source, config, outputs, label_names, labels_declared=labels_declared)
            encoder = cast("PreTrainedModel", network.base_model)
            model = StudentModel(network)
        else:
            network = encoder = _network(section, source, config)[0]
            head, adapter = _shared_head(teachers_dir, int(config.hidden_size), len(label_names), dropout)
            check_pooling(network, head.pooling_name, source)
            model = StudentModel(network, head, adapter)
    if section.config is None:
        keep_blocks(encoder, blocks_to_keep(section.layers, int(config.num_hidden_layers), source), source)
    length = section.max_length or max_length
    _check_fits(encoder, tokenizer, length, source)
    settle_padding(network, tokenizer)
    student = Student(model, tokenizer, tuple(label_names), length, source, runs_own_code(network, tokenizer))
    _try_student(student)
    if student.own_code:
        _check_code_is_saved(network, source)
    return student


def runs_own_code(*loaded: object) -> bool:
    """Whether the class of one of these models or tokenizers came with it and not with transformers."""
    return any(type(each).__module__.startswith("transformers_modules.") for each in loaded)


def check_student(recipe: Recipe, teachers_dir: Path | None = None) -> None:
    """Refuse a recipe whose model cannot become a student, from its config alone, at the start of a run.

    If the teacher that the student starts from is not in ``teachers_dir`` yet, the model that this teacher will be made
    from is checked. Raises ModelError and RecipeError as ``build_student`` does.
    """
    section, revision = recipe.require_student(), None
    origin, pooling = section.init_from or "", recipe.cofinetune.pooling
    if origin.startswith(TEACHER_PREFIX) and not (
        teachers_dir and (teachers_dir / origin.removeprefix(TEACHER_PREFIX)).is_dir()
    ):
        teacher = recipe.teacher(origin.removeprefix(TEACHER_PREFIX))
        source, revision = teacher.model, teacher.revision
    else:
        source = _source(section, teachers_dir)
    config = _config(section, source, revision)
    if _own_code(section, config):
        return  # only loading it would show what it is
    model_class = _model_class(section, config, source)
    with torch.device("meta"):
        network = model_class(config, **({} if section.head == "standard" else without_pooler(model_class)))
    if section.head == "shared":
        check_pooling(network, pooling, source)
    if section.config is None:
        keep_blocks(network.base_model, blocks_to_keep(section.layers, int(config.num_hidden_layers), source), source)


def check_pooling(network: PreTrainedModel, pooling: str, source: str) -> None:
    """Raise ModelError where the shared head would read the first token of a causal decoder, which sees no text."""
    if pooling == "cls" and declares_causal_attention(network):
        raise ModelError(
            f"'{source}' is a causal decoder ({network.config.model_type}): its first token sees nothing of the text, "
            "and the shared head with pooling 'cls' reads only that token",
            "Set student.head = 'standard', or co-finetune with cofinetune.pooling = 'attention'.",
        )


def _source(section: StudentSection, teachers_dir: Path | None) -> str:
    """A hub name or directory; for a config a description by its model type, for messages."""
    if section.config is not None:
        return f"config of type {section.config.get('model_type')}"
    assert section.init_from is not None
    if not section.init_from.startswith(TEACHER_PREFIX):
        return section.init_from
    name = section.init_from.removeprefix(TEACHER_PREFIX)
    if teachers_dir is None or not teachers_dir.is_dir():
        unknown = "no directory of co-finetuned teachers is known"
        where = unknown if teachers_dir is None else f"there is no directory '{teachers_dir}'"
        raise ModelError(
            f"student.init_from is '{section.init_from}', but {where}",
            "Run kdcache cofinetune first, keep teachers/ beside the cache, or set student.init_from to a hub name or "
            "directory.",
        )
    from kdcache.teachers.bundle import teacher_names

    known = teacher_names(teachers_dir)
    if name not in known:
        raise ModelError(
            f"student.init_from is '{section.init_from}', but '{teachers_dir}' holds no teacher '{name}'; it holds: "
            f"{', '.join(known)}",
            "Set student.init_from to one of these, e.g. teacher:" + (known[0] if known else "NAME"),
        )
    return str(teachers_dir / name)


def _config(section: StudentSection, source: str, revision: str | None = None) -> PretrainedConfig:
    from transformers import AutoConfig

    be_quiet()
    if section.config is None:
        try:
            config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=section.trust_remote_code)
        except Exception as error:  # transformers raises OSError, ValueError, KeyError … for a missing directory
            raise _not_loadable(source, error) from error
        return _usable(cast("PretrainedConfig", config), source)
    values = dict(section.config)
    model_type = values.pop("model_type", None)
    if not isinstance(model_type, str):
        raise RecipeError(
            "student.config has no model_type", 'Example: config = { model_type = "bert", num_hidden_layers = 4 }'
        )
    try:
        config = AutoConfig.for_model(model_type, **values)
    except Exception as error:  # unknown type, or a value of the wrong kind
        raise RecipeError(
            f"student.config is not usable: {first_line(error)}", "Check model_type and the keys of that config."
        ) from error
    return _usable(config, source)


def _usable(config: PretrainedConfig, source: str) -> PretrainedConfig:
    """Raise ModelError for models whose hidden states are not one vector per token and layer."""
    reason = ""
    if getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder, which has two stacks of layers"
    elif getattr(config, "block_sizes", None):
        reason = "its layers pool the tokens, so that hidden states change their length"
    if reason:
        raise ModelError(
            f"'{source}' is a model of type '{config.model_type}' and cannot be a student: {reason}", _FAMILIES
        )
    return config


def _outputs(section: StudentSection, config: PretrainedConfig, teachers_dir: Path | None) -> Mapping[Any, str]:
    """The class of each output of the model that the student starts from."""
    named = None
    if teachers_dir is not None and (section.init_from or "").startswith(TEACHER_PREFIX):
        named = outputs_of_teacher(teachers_dir, str(section.init_from).removeprefix(TEACHER_PREFIX))
    return named or config.id2label or {}


def _classifier(
    section: StudentSection,
    source: str,
    config: PretrainedConfig,
    outputs: Mapping[Any, str],
    label_names: Sequence[str],
    *,
    labels_declared: bool,
) -> PreTrainedModel:
    """The classifier for the classes of the task; its output layer is in their order, or new."""
    config.id2label = dict(enumerate(label_names))
    config.label2id = {name: index for index, name in enumerate(label_names)}
    network, absent = _network(section, source, config)
    if section.config is None:
        settle_output_layer(network, source, outputs, label_names, absent, labels_declared=labels_declared)
    return network


def _network(section: StudentSection, source: str, config: PretrainedConfig) -> tuple[PreTrainedModel, Collection[str]]:
    """The classifier, or the bare model without pooler for the shared head; new weights where none are given.

    Also the names of those that the checkpoint lacks.
    """
    standard = section.head == "standard"
    model_class = _model_class(section, config, source)
    options: dict[str, bool] = {} if standard else without_pooler(model_class)
    if _own_code(section, config):
        options = {"trust_remote_code": True}
    try:
        if section.config is not None:
            return cast("PreTrainedModel", model_class(config, **options).float()), ()
        model, report = model_class.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=standard,
            **options,
        )
    except Exception as error:  # as above; also broken weight files
        raise _not_loadable(source, error) from error
    return cast("PreTrainedModel", model), _checked_absent(model, report, source)


def _model_class(section: StudentSection, config: PretrainedConfig, source: str) -> Any:
    """The class of transformers that loads the model, or the auto class that finds the model's own code."""
    import transformers

    standard = section.head == "standard"
    if _own_code(section, config):
        return transformers.AutoModelForSequenceClassification if standard else transformers.AutoModel
    known: Any = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING if standard else transformers.MODEL_MAPPING
    if type(config) not in known or runs_own_code(config):  # code of another model may have registered it
        raise ModelError(
            f"'{source}' is a model of type '{config.model_type}', which transformers cannot make a student of",
            _FAMILIES,
        )
    return known[type(config)]


def _own_code(section: StudentSection, config: PretrainedConfig) -> bool:
    """Whether the model is loaded through code of its own, which the section allows."""
    auto_class = "AutoModelForSequenceClassification" if section.head == "standard" else "AutoModel"
    return section.trust_remote_code and auto_class in (getattr(config, "auto_map", None) or {})


def without_pooler(model_class: Any) -> dict[str, bool]:
    """The option that leaves out the pooler, for classes that have it: the shared head pools itself."""
    takes = inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}


def _checked_absent(model: PreTrainedModel, report: Mapping[str, Any], source: str) -> list[str]:
    """The missing weights; ModelError where there are others than those of heads and poolers."""
    prefix = "" if model.base_model is model else model.base_model_prefix + "."
    absent = [
        *report["missing_keys"],
        *(key[0] if isinstance(key, tuple) else key for key in report["mismatched_keys"]),
    ]
    encoder = sorted(key for key in absent if key.startswith(prefix) and "pooler." not in key)
    if encoder:
        raise ModelError(
            f"the weights of '{source}' lack {', '.join(encoder[:3])}{' …' if len(encoder) > 3 else ''}",
            "Take a directory made by save_pretrained, or give student.config for a student with random weights.",
        )
    return absent


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
            f"the tokenizer '{tokenizer.name_or_path}' has {len(tokenizer)} tokens, but the student '{source}' has "
            f"embeddings for {vocabulary}",
            "Set student.tokenizer to the tokenizer that the model was made with.",
        )


def _try_student(student: Student) -> None:
    """Run the student on made-up texts: an unknown family fails here, before the first step."""
    model = student.model.eval()

    def forward(inputs: Mapping[str, Tensor]) -> StudentOutput:
        return model(inputs, hidden_states=True)  # type: ignore[no-any-return]

    hint = "Set student.tokenizer to the tokenizer that the model was made with. " + _FAMILIES
    try:
        try_model(f"student '{student.source}'", model, forward, student.tokenizer, student.max_length, hint=hint)
    finally:
        model.train()


def _check_code_is_saved(network: PreTrainedModel, source: str) -> None:
    """Raise ModelError, before the training, where the saved student would lack code that it needs."""
    from transformers.dynamic_module_utils import custom_object_save

    references = dict(getattr(network.config, "auto_map", None) or {})
    if not references:
        return
    with tempfile.TemporaryDirectory(prefix="kdcache-") as place:
        network.config.save_pretrained(place)
        custom_object_save(network, place, config=cast("Any", network.config))
        wanted = {auto: network.config.auto_map.get(auto) for auto in ("AutoConfig", type(network)._auto_class) if auto}
        lacking = [
            auto
            for auto, name in wanted.items()
            if not name or "--" in name or not (Path(place) / f"{name.split('.')[0]}.py").is_file()
        ]
    if lacking:
        raise ModelError(
            f"the code of '{source}' cannot be saved with the student: its auto_map has no file for "
            f"{', '.join(lacking)}",
            "Copy the model and its .py files into one directory whose config.json names them in auto_map, and set "
            "student.init_from to it.",
        )


def _not_loadable(source: str, error: Exception) -> ModelError:
    if wants_code(error):
        return code_not_run(source)
    return ModelError(
        f"no model could be loaded from '{source}': {first_line(error)}",
        "Set student.init_from to a directory with config.json and model.safetensors, or to a hub name that is within "
        "reach.",
    )
