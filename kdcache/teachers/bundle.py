"""A teachers directory, as co-finetuning writes it.

    teachers/
      bert/                    encoder and tokenizer for AutoModel; with an own head, the whole classifier for
                               AutoModelForSequenceClassification
      roberta/                 likewise, with adapter.safetensors if its width differs from that of the shared space
      shared_head.safetensors  pooling and dense layer; absent if every teacher has its own head
      teachers.json            pooling, width, labels; per teacher head kind, max_length, source, scores, fingerprints

teachers.json is written last: a directory without it is not a bundle. Everything is written under a temporary name,
synced and renamed.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kdcache.cache.spec import Fingerprints, differing
from kdcache.data.encoding import load_tokenizer, tokenizer_fingerprint
from kdcache.errors import CustomCodeError, DamageError, KdcacheError, MismatchError, ModelError, first_line
from kdcache.files import make_directory, publish_directory, sync_tree, write_file
from kdcache.teachers.fingerprints import (
    fingerprint_config,
    fingerprint_state,
    fingerprint_teacher,
    head_tensors,
    tokenizer_as_used,
)
from kdcache.teachers.head import Pooling, SharedHead
from kdcache.teachers.sources import TOKEN_TYPES
from kdcache.teachers.teacher import HeadKind, Teacher, TeacherModel, load_classifier, load_encoder
from kdcache.training.processes import current

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RECORD = "teachers.json"
HEAD_FILE = "shared_head.safetensors"
ADAPTER_FILE = "adapter.safetensors"
_FORMAT = 1


@dataclass(frozen=True)
class TeacherRecord:
    """One teacher of the bundle. ``class_order`` of an own head: the output index of each task label."""

    head: HeadKind
    adapter: bool
    depth: int
    width: int
    max_length: int
    source: str
    revision: str | None
    licence: str
    fingerprints: Fingerprints
    class_order: tuple[int, ...] | None = None
    scores: Mapping[str, float] = field(default_factory=dict)  # on validation; empty without one
    trust_remote_code: bool = False  # its own Python code ran; written only if true


@dataclass(frozen=True)
class Bundle:
    """teachers.json. ``width``, ``pooling`` and ``dropout`` belong to the shared head; None without one."""

    label_names: tuple[str, ...]
    text_columns: tuple[str, ...]
    teachers: Mapping[str, TeacherRecord]
    pooling: Pooling | None = None
    width: int | None = None
    dropout: float | None = None
    mean_scores: Mapping[str, float] = field(default_factory=dict)  # of the mean probability, on validation
    training: Mapping[str, Any] = field(default_factory=dict)  # settings, data digests, the best epoch

    @property
    def labels_declared(self) -> bool:
        """Whether the order of ``label_names`` was; false for bundles of 0.1.0, which did not record it."""
        return self.training.get("labels_declared") is True


def is_bundle(directory: Path) -> bool:
    return (directory / RECORD).is_file()


def read_bundle(directory: Path) -> Bundle:
    """teachers.json as plain values. ModelError if it is missing, DamageError if it is invalid."""
    path = directory / RECORD
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ModelError(
            f"'{directory}' holds no teachers: there is no {RECORD}", "Make them with: kdcache cofinetune RECIPE"
        ) from error
    try:
        document = json.loads(text)
        if document.pop("format") != _FORMAT:
            raise ValueError("unknown format")
        teachers = {name: _record(entry) for name, entry in document.pop("teachers").items()}
        label_names, text_columns = tuple(document.pop("label_names")), tuple(document.pop("text_columns"))
        return Bundle(label_names, text_columns, teachers, **document)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamageError(
            f"'{path}' is not a record of teachers: {error}", "Make the teachers again: kdcache cofinetune RECIPE"
        ) from error


def _record(entry: dict[str, Any]) -> TeacherRecord:
    order = entry.pop("class_order", None)
    fingerprints = Fingerprints(**entry.pop("fingerprints"))
    return TeacherRecord(**entry, fingerprints=fingerprints, class_order=None if order is None else tuple(order))


def write_bundle(directory: Path, bundle: Bundle) -> None:
    """Write teachers.json, durably and atomically, after the files that it describes."""
    document = {"format": _FORMAT, **asdict(bundle)}
    for entry in document["teachers"].values():
        if not entry["trust_remote_code"]:
            del entry["trust_remote_code"]  # as 0.1.0 wrote it
    write_file(directory / RECORD, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())


def teacher_names(directory: Path) -> list[str]:
    """Names of the teachers of a bundle, in its order."""
    return list(read_bundle(directory).teachers)


def save_teacher(directory: Path, name: str, model: TeacherModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write ``directory/name/``, replacing an existing one."""
    from safetensors.torch import save_file

    make_directory(directory)
    temporary = directory / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    with _in_this_process(model.encoder):
        model.encoder.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    if model.adapter is not None:
        save_file(
            {key: tensor.contiguous() for key, tensor in model.adapter.state_dict().items()}, temporary / ADAPTER_FILE
        )
    sync_tree(temporary)
    publish_directory(temporary, directory / name)


@contextlib.contextmanager
def _in_this_process(network: PreTrainedModel) -> Iterator[None]:
    """While the block runs, ``save_pretrained`` writes in any process; transformers 5 writes in the first one alone."""
    if current().first:
        yield
        return
    vars(network)["should_save_on_this_rank"] = lambda is_main_process: is_main_process  # not of its class
    try:
        yield
    finally:
        del vars(network)["should_save_on_this_rank"]


def save_shared_head(directory: Path, head: SharedHead) -> None:
    """Write ``shared_head.safetensors``."""
    from safetensors.torch import save

    write_file(
        directory / HEAD_FILE, save({key: tensor.cpu().contiguous() for key, tensor in head.state_dict().items()})
    )


def load_shared_head(directory: Path, bundle: Bundle | None = None) -> SharedHead:
    """The shared head in eval mode. ModelError if the bundle has none, DamageError if its file is unreadable."""
    bundle = bundle or read_bundle(directory)
    if bundle.width is None or bundle.pooling is None:
        raise ModelError(
            f"the teachers in '{directory}' share no head: each has its own", 'Use student.head = "standard".'
        )
    head = SharedHead(bundle.width, len(bundle.label_names), bundle.pooling, bundle.dropout or 0.0)
    _load_tensors(directory / HEAD_FILE, head)
    return head.eval()


def load_teacher(
    directory: Path, name: str, bundle: Bundle | None = None, *, trust_remote_code: bool = False
) -> Teacher:
    """A teacher in eval mode, in float32, on the CPU.

    ``trust_remote_code`` allows it to run Python code from its directory; teachers.json cannot allow that. Raises
    ModelError if the bundle has no such teacher, DamageError if a file is missing or unreadable, and MismatchError
    (exit 4) if the fingerprints of the files are not those of teachers.json.
    """
    bundle = bundle or read_bundle(directory)
    if name not in bundle.teachers:
        raise ModelError(
            f"'{directory}' has no teacher '{name}'; it has: {', '.join(bundle.teachers)}",
            f"Add it: kdcache cofinetune RECIPE --add {name}",
        )
    record = bundle.teachers[name]
    model, tokenizer = _load_parts(directory, name, record, bundle, trusted=trust_remote_code)
    fingerprints = _fingerprints(model, tokenizer, name, bundle)
    _check_fingerprints(directory / name, record.fingerprints, fingerprints)
    return Teacher(
        name,
        model,
        tokenizer,
        record.head,
        record.depth,
        record.width,
        record.max_length,
        fingerprints,
        bundle.label_names,
    )


def fingerprints_on_disk(directory: Path, name: str, record: TeacherRecord, bundle: Bundle) -> Fingerprints:
    """The fingerprints of a teacher that was just saved, as ``load_teacher`` computes them."""
    return _fingerprints(*_load_parts(directory, name, record, bundle, trusted=record.trust_remote_code), name, bundle)


def check_files(directory: Path, name: str, bundle: Bundle, *, trust_remote_code: bool = False) -> int:
    """Compare the files of a teacher with teachers.json, and count its parameters; no model is made.

    Tensors are read from their files and hashed. If they do not give the fingerprints, as with weights that the model
    shares between layers and the file has once, ``load_teacher`` decides, on the CPU.

    Raises what ``load_teacher`` raises.
    """
    record = bundle.teachers[name]
    found = _file_fingerprints(directory, name, bundle)
    if found is None or differing(record.fingerprints, found):
        load_teacher(directory, name, bundle, trust_remote_code=trust_remote_code)
    return parameters_on_disk(directory, name)


def parameters_on_disk(directory: Path, name: str) -> int:
    """How many numbers the files of a teacher hold, with the shared head if it has one; reads headers only."""
    from safetensors import safe_open

    count = 0
    for path in _weight_files(directory, name):
        with safe_open(path, framework="pt") as file:
            count += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118 - no mapping
    return count


def _weight_files(directory: Path, name: str) -> list[Path]:
    """The tensors of a teacher: its own files, and the shared head unless it has an own one."""
    own = sorted((directory / name).glob("*.safetensors"))
    shared = is_bundle(directory) and read_bundle(directory).teachers[name].head == "shared"
    return [*own, directory / HEAD_FILE] if shared else own


def _file_fingerprints(directory: Path, name: str, bundle: Bundle) -> Fingerprints | None:
    """Fingerprints from the files of a teacher; None if they cannot be read so, or its own Python code is needed."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig

    place, record = directory / name, bundle.teachers[name]
    try:
        config = AutoConfig.from_pretrained(place)
        files = {path.name: load_file(path) for path in _weight_files(directory, name)}  # memory maps
        tokenizer = tokenizer_fingerprint(load_tokenizer(str(place)))
        prefix: str = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)].base_model_prefix  # type: ignore[attr-defined]
    except (OSError, ValueError, KeyError, SafetensorError, KdcacheError):
        return None
    if getattr(config, "auto_map", None):
        return None
    adapter, head = files.pop(ADAPTER_FILE, {}), files.pop(HEAD_FILE, {})
    network = {
        key: tensor.float() if tensor.is_floating_point() else tensor
        for own in files.values()
        for key, tensor in own.items()
    }
    shared = head_tensors(head, adapter) if record.head == "shared" else None
    weights, described = fingerprint_state(network, prefix, shared, bundle.pooling, record.class_order)
    return Fingerprints(weights, fingerprint_config(config.to_diff_dict()), described, tokenizer)


def _fingerprints(model: TeacherModel, tokenizer: PreTrainedTokenizerBase, name: str, bundle: Bundle) -> Fingerprints:
    """The fingerprints; for a bundle of 0.1.0, which did not record token types, computed as 0.1.0 did."""
    prints = fingerprint_teacher(model, tokenizer)
    training = bundle.training
    identities = (training.get("identity", {}), training.get("added", {}).get(name, {}))
    if not any(f"teachers.{name}.{TOKEN_TYPES}" in identity for identity in identities):
        return prints
    used = tokenizer_as_used(prints.tokenizer, model.encoder, tokenizer, len(bundle.text_columns))
    return replace(prints, tokenizer=used)


def _load_parts(
    directory: Path, name: str, record: TeacherRecord, bundle: Bundle, *, trusted: bool = False
) -> tuple[TeacherModel, PreTrainedTokenizerBase]:
    place = directory / name
    try:
        tokenizer = load_tokenizer(str(place), trust_remote_code=trusted)
        if record.head == "own":
            classifier = load_classifier(str(place), trust_remote_code=trusted)
            return TeacherModel(classifier, None, None, record.class_order).eval(), tokenizer
        encoder = load_encoder(str(place), trust_remote_code=trusted)
    except CustomCodeError:
        raise
    except KdcacheError as error:
        raise DamageError(
            f"teacher directory '{place}' cannot be read: {error.message}",
            "Make the teachers again: kdcache cofinetune RECIPE",
        ) from error
    head = load_shared_head(directory, bundle)
    adapter = None
    if record.adapter:
        adapter = torch.nn.Linear(record.width, head.width, bias=False)
        _load_tensors(place / ADAPTER_FILE, adapter)
    return TeacherModel(encoder, adapter, head).eval(), tokenizer


def _load_tensors(path: Path, module: torch.nn.Module) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        module.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise DamageError(
            f"'{path}' is missing, truncated or not what teachers.json describes: {first_line(error)}",
            "Make the teachers again: kdcache cofinetune RECIPE",
        ) from error


def _check_fingerprints(place: Path, recorded: Fingerprints, found: Fingerprints) -> None:
    changes = differing(recorded, found)
    if changes:
        raise MismatchError(
            f"teacher '{place}' is not the one that teachers.json describes: {changes}",
            "Put the files back, or make the teachers again: kdcache cofinetune RECIPE",
        )
