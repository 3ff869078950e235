"""Loads and checks the pretrained encoder, or the fine-tuned classifier, that a recipe names as a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdcache.data.encoding import load_tokenizer, tokenizer_fingerprint
from kdcache.data.labels import numbers_known
from kdcache.errors import ModelError
from kdcache.progress import listed
from kdcache.teachers.fingerprints import fingerprint_config, fingerprint_tensors, gives_token_types
from kdcache.teachers.head import Pooling, SharedHead, new_adapter
from kdcache.teachers.teacher import (
    TeacherModel,
    check_max_length,
    class_order_of,
    depth_and_width,
    load_classifier,
    load_encoder,
)
from kdcache.teachers.trial import first_token_sees_only_itself, try_network

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kdcache.recipe import TeacherSection


TOKEN_TYPES = "token_types"  # a key of ``Source.identity`` that kdcache 0.1.0 did not record


@dataclass(frozen=True)
class Source:
    """A loaded model with its tokenizer; ``class_order`` and ``note`` only for a head of its own."""

    section: TeacherSection
    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    class_order: tuple[int, ...] | None = None
    note: str = ""

    @property
    def depth(self) -> int:
        return depth_and_width(self.network)[0]

    @property
    def width(self) -> int:
        return depth_and_width(self.network)[1]

    def identity(self) -> dict[str, Any]:
        """The inputs of a training that belong to this teacher."""
        rate = self.section.learning_rate
        own = {} if rate is None else {"learning_rate": rate}  # 0.1.0 had no such key
        return own | {
            "head": self.section.head,
            "weights": fingerprint_tensors(self.network.state_dict().items()),
            "config": fingerprint_config(self.network.config.to_diff_dict()),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            TOKEN_TYPES: gives_token_types(self.network, self.tokenizer),
            "max_length": self.max_length,
            "class_order": None if self.class_order is None else list(self.class_order),
        }


def open_source(
    section: TeacherSection,
    default_max_length: int,
    label_names: Sequence[str],
    columns: int = 1,
    pooling: Pooling | None = None,
    *,
    labels_declared: bool = True,
) -> Source:
    """Load the model of ``section``, for texts of ``columns`` columns, and try it on made-up texts.

    ``pooling`` is that of the shared head. Raises ModelError if the model cannot be loaded, lacks weights, has too few
    positions or other labels, gives a text other outputs alone than in a batch, or does not fit the pooling; also if
    its labels are LABEL_0 … and the order of the task's labels was not declared.
    """
    max_length = section.max_length or default_max_length
    own = section.head == "own"
    trusted = section.trust_remote_code
    network = (load_classifier if own else load_encoder)(section.model, section.revision, trust_remote_code=trusted)
    tokenizer = load_tokenizer(section.model, section.revision, trust_remote_code=trusted)
    check_max_length(section.name, network, max_length)
    _check_vocabulary(section.name, network, tokenizer)
    try_network(section.name, network, tokenizer, max_length, columns)
    if not own and pooling == "cls" and first_token_sees_only_itself(network, tokenizer, max_length):
        raise ModelError(
            f"teacher '{section.name}' is a causal decoder ({network.config.model_type}): its first token, which "
            "pooling 'cls' reads, sees nothing of the text",
            'Set cofinetune.pooling = "last", "attention" or "mean".',
        )
    if not own:
        return Source(section, network, tokenizer, max_length)
    order, generic = class_order_of(section.name, network.config.id2label or {}, label_names)
    if generic and not numbers_known(label_names, declared=labels_declared):
        raise ModelError(
            f"teacher '{section.name}' names its labels LABEL_0 …, and the order of the task's labels "
            f"{listed(label_names)} is not declared: which is LABEL_0 is not known",
            "Name the classes in data.labels, in the teacher's order, or in id2label of the model's config.json.",
        )
    note = (
        f"teacher '{section.name}' names its labels LABEL_0 …: taken in the order {listed(label_names)}"
        if generic
        else ""
    )
    return Source(section, network, tokenizer, max_length, order, note)


def _check_vocabulary(name: str, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = int(network.config.vocab_size)
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ModelError(
            f"teacher '{name}': its tokenizer has token ids up to {highest}, its model has {rows} embeddings",
            "Give the tokenizer that belongs to the model.",
        )


def under_shared_head(
    sources: Mapping[str, Source], head: SharedHead, widths: Mapping[str, int] | None = None
) -> dict[str, TeacherModel]:
    """Models under the shared ``head``; adapters for other widths are drawn from torch's generator, in order.

    ``widths``: of all teachers, where ``sources`` are only some of them: every adapter is drawn, for equal numbers.
    """
    widths = widths or {name: source.width for name, source in sources.items()}
    adapters = {name: new_adapter(width, head.width) for name, width in widths.items()}
    return {
        name: TeacherModel(sources[name].network, adapter, head)
        for name, adapter in adapters.items()
        if name in sources
    }
