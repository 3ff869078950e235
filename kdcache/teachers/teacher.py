"""A teacher: an encoder or decoder of AutoModel, an adapter if its width differs, and a shared or own head.

Encoders are loaded without their pooler: the shared head pools, and a pooler that the checkpoint lacks would be random.
For the same reason, any other missing weight is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from kdcache.data.custom_code import code_not_run, wants_code
from kdcache.errors import ModelError, first_line
from kdcache.progress import listed_apart
from kdcache.teachers.network import accepted_inputs as accepted_inputs
from kdcache.teachers.network import at_last_token, full_mask, head_reads_the_end, run_network

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kdcache.cache.spec import Fingerprints
    from kdcache.teachers.head import SharedHead

HeadKind = Literal["shared", "own"]
_UNFIT = {"funnel": "its blocks shorten the text, so that hidden states and tokens do not correspond"}


@dataclass(frozen=True)
class TeacherForward:
    """Outputs of a teacher.

    ``logits`` [batch, classes] are in the task's class order. ``pooled`` [batch, width] is the shared head's, or the
    last hidden state of the token that an own head reads: the first one, or the last one of decoders and XLNet.
    ``hidden_states`` are as in transformers: index 0 is the embeddings, k after block k, each [batch, tokens, width].
    """

    logits: Tensor
    pooled: Tensor
    hidden_states: tuple[Tensor, ...] | None


class TeacherModel(nn.Module):
    """``encoder`` is an encoder without head under a SharedHead, else the whole sequence classifier."""

    class_order: Tensor | None

    def __init__(
        self,
        encoder: PreTrainedModel,
        adapter: nn.Linear | None,
        head: SharedHead | None,
        class_order: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.adapter = adapter
        self.head = head
        self.full_mask = False  # of an encoder that ``takes_full_mask``, while it trains on an accelerator
        order = None if class_order is None else torch.tensor(list(class_order))
        self.register_buffer("class_order", order, persistent=False)

    def forward(self, inputs: Mapping[str, Tensor], *, hidden_states: bool = False) -> TeacherForward:
        """Run on ``inputs`` of ``kdcache.data.encoding.pad``, each [batch, tokens], padded on the right as the states.

        Names that the encoder does not take are ignored.
        """
        mask = inputs["attention_mask"]
        taken = {**inputs, "attention_mask": full_mask(mask)} if self.full_mask and self.training else inputs
        output = run_network(self.encoder, taken, hidden_states=hidden_states or self.head is None)
        states, last = output.hidden_states if hidden_states else None, output.last
        assert last is not None
        if self.head is not None:
            logits, pooled = self.head(last if self.adapter is None else self.adapter(last), mask)
            return TeacherForward(logits, pooled, states)
        assert output.logits is not None
        pooled = at_last_token(last, mask) if head_reads_the_end(self.encoder) else last[:, 0]
        return TeacherForward(
            output.logits if self.class_order is None else output.logits[:, self.class_order], pooled, states
        )


@dataclass
class Teacher:
    """A loaded teacher. ``fingerprints`` are computed from its files."""

    name: str
    model: TeacherModel
    tokenizer: PreTrainedTokenizerBase
    head_kind: HeadKind
    depth: int
    width: int
    max_length: int
    fingerprints: Fingerprints
    label_names: tuple[str, ...]


def load_encoder(model: str, revision: str | None = None, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The bare encoder in float32, without pooler. ModelError if it cannot be loaded or lacks weights.

    ``trust_remote_code`` allows it to run Python code that comes with the model; CustomCodeError if it needs to and is
    not allowed.
    """
    from transformers import AutoConfig, AutoModel

    be_quiet()
    with _explained(model):
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    _check_type(model, config)
    if trust_remote_code and "AutoModel" in (getattr(config, "auto_map", None) or {}):
        return _load(AutoModel, model, revision, config, {"trust_remote_code": True})
    model_class = _encoder_class(model, config)
    options = {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(model_class).parameters else {}
    return _load(model_class, model, revision, config, options)


def count_parameters(model: str, revision: str | None = None, *, trust_remote_code: bool = False) -> int:
    """How many parameters the encoder has, by its config: no weights are read. Raises as ``load_encoder``."""
    from transformers import AutoConfig, AutoModel

    be_quiet()
    with _explained(model):
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    _check_type(model, config)
    own_code = trust_remote_code and "AutoModel" in (getattr(config, "auto_map", None) or {})
    make: Any = None if own_code else _encoder_class(model, config)._from_config
    with _explained(model), torch.device("meta"):
        network = AutoModel.from_config(config, trust_remote_code=True) if own_code else make(config)
    return sum(parameter.numel() for parameter in network.parameters())


def _encoder_class(model: str, config: Any) -> Any:
    """The class of transformers for the encoder alone; ModelError if there is none."""
    from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING

    seq2seq = getattr(config, "is_encoder_decoder", False)
    try:
        return (MODEL_FOR_TEXT_ENCODING_MAPPING if seq2seq else MODEL_MAPPING)[type(config)]
    except KeyError as error:
        if seq2seq:
            raise ModelError(
                f"'{model}' is an encoder-decoder ({config.model_type}) whose encoder transformers cannot load "
                "alone; a teacher is an encoder or a decoder",
                "Choose an encoder, e.g. BERT, a decoder, e.g. Qwen, or a T5.",
            ) from error
        raise ModelError(
            f"'{model}' ({config.model_type}) is not a model that AutoModel knows", "Choose an encoder, e.g. BERT."
        ) from error


def load_classifier(model: str, revision: str | None = None, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """A fine-tuned sequence classifier in float32. ModelError if it cannot be loaded or has no such head.

    ``trust_remote_code`` as in ``load_encoder``.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    be_quiet()
    with _explained(model):
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    _check_type(model, config)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"'{model}' is an encoder-decoder ({config.model_type}): its classifier has no single stack of hidden "
            "states to learn from",
            'Choose a classifier on an encoder or a decoder; the encoder of a T5 takes head = "shared".',
        )
    _check_one_class_per_text(model, config)
    return _load(AutoModelForSequenceClassification, model, revision, config, {"trust_remote_code": trust_remote_code})


def _check_type(model: str, config: Any) -> None:
    if config.model_type in _UNFIT:
        raise ModelError(
            f"'{model}' is a model of type '{config.model_type}': {_UNFIT[config.model_type]}",
            "Choose another model, e.g. BERT, RoBERTa, DeBERTa, ModernBERT or Qwen.",
        )


def _check_one_class_per_text(model: str, config: Any) -> None:
    """ModelError for multi-label classifiers and regression, whose outputs are no logits of a softmax."""
    problem, labels = getattr(config, "problem_type", None), len(config.id2label or {})
    if problem not in (None, "single_label_classification") or labels == 1:
        kind = f"problem_type is '{problem}'" if problem is not None else "it has one output"
        raise ModelError(
            f"'{model}' does not choose one class per text ({kind} in its config.json): its outputs are no logits of a "
            "softmax",
            'A teacher with head = "own" must be a single-label classifier; its encoder alone takes head = "shared".',
        )


def _load(loader: Any, model: str, revision: str | None, config: Any, options: dict[str, Any]) -> PreTrainedModel:
    with _explained(model):
        loaded, report = loader.from_pretrained(
            model, revision=revision, config=config, dtype=torch.float32, output_loading_info=True, **options
        )
    missing = sorted(
        key for key in report["missing_keys"] if not _is_pooler(key) or loader.__name__.startswith("AutoModelFor")
    )
    mismatched = sorted(str(key) for key in report.get("mismatched_keys", ()))
    if missing or mismatched:
        names = ", ".join([*missing, *mismatched][:4]) + (" …" if len(missing) + len(mismatched) > 4 else "")
        raise ModelError(
            f"the weights of '{model}' lack {names}, which would be random numbers",
            'A teacher with head = "own" must be a fine-tuned sequence classifier; an encoder takes head = "shared".',
        )
    return cast("PreTrainedModel", loaded.eval())


def _is_pooler(key: str) -> bool:
    return key.startswith("pooler.") or ".pooler." in key


class _explained:  # noqa: N801 - reads as a statement
    """Turns errors of transformers' loaders into a ModelError that names the model."""

    def __init__(self, model: str) -> None:
        self._model = model

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and wants_code(error):
            raise code_not_run(self._model) from error
        if isinstance(error, Exception):
            first = first_line(error)
            raise ModelError(
                f"no model could be loaded from '{self._model}': {first}",
                "Give a directory made by save_pretrained, or a hub name that is in reach or already downloaded.",
            ) from error


def be_quiet() -> None:
    """Disable progress bars and load reports of transformers on stderr."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def depth_and_width(model: PreTrainedModel) -> tuple[int, int]:
    """Number of blocks and width of the hidden states."""
    return int(model.config.num_hidden_layers), int(model.config.hidden_size)


def position_limit(model: PreTrainedModel) -> int | None:
    """The longest input in tokens, with special ones; None if positions are only relative.

    RoBERTa and similar models number positions from ``padding_idx + 1``, OPT and BART from ``offset``; the rows before
    that are unused.
    """
    for name, module in model.named_modules():
        if name.endswith(("position_embeddings", "wpe", "embed_positions")) and isinstance(module, nn.Embedding):
            unused = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
            return module.num_embeddings - int(unused)
    return None


def check_max_length(name: str, model: PreTrainedModel, max_length: int) -> None:
    """ModelError if ``max_length`` exceeds the positions of the model."""
    limit = position_limit(model)
    if limit is not None and max_length > limit:
        raise ModelError(
            f"teacher '{name}' takes at most {limit} tokens, max_length is {max_length}",
            f"Set data.max_length, or max_length of that teacher, to {limit} or less.",
        )


def class_order_of(name: str, id2label: Mapping[Any, str], label_names: Sequence[str]) -> tuple[tuple[int, ...], bool]:
    """The classifier's output index of each task label, and whether its labels are generic (LABEL_0 …).

    Generic labels are taken by index. Names are compared without case; ModelError if they are not the task's.
    """
    own = {int(index): str(label) for index, label in id2label.items()}
    if len(own) == len(label_names) and all(label.upper() == f"LABEL_{index}" for index, label in own.items()):
        return tuple(range(len(own))), True
    places = {label.casefold(): index for index, label in own.items()}
    wanted = [label.casefold() for label in label_names]
    if len(places) != len(own) or len(set(wanted)) != len(wanted) or set(places) != set(wanted):
        theirs, of_task = listed_apart(tuple(own[index] for index in sorted(own)), tuple(label_names))
        raise ModelError(
            f"teacher '{name}' predicts {theirs}; the task's labels are {of_task}",
            "Set data.labels to the task's labels in class order, or correct id2label in the model's config.json.",
        )
    return tuple(places[label] for label in wanted), False
