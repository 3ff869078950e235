"""The student directory, written atomically, and reading it back.

student/
  config.json, model.safetensors, tokenizer*   save_pretrained; with the standard head transformers alone loads it
  kdcache.json                                 what transformers does not store: columns, max_length, method, head
  README.md                                    the model card
  shared_head.safetensors                      shared head only: pooling, dense layer and adapter
  model.onnx                                   shared head only: input_ids, attention_mask … -> logits; absent if
                                               torch cannot export the model (XLNet, Longformer)
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from kdcache.data.custom_code import code_not_run, wants_code
from kdcache.data.encoding import encode, load_tokenizer, pad
from kdcache.errors import DamageError, ModelError, RecipeError, first_line
from kdcache.files import make_directory, publish_directory, sync_tree
from kdcache.students.build import runs_own_code, without_pooler
from kdcache.students.model import Student, StudentModel
from kdcache.students.padding import require_pad_token, settle_padding
from kdcache.teachers.backends.onnx_graph import write_graph
from kdcache.teachers.teacher import be_quiet, position_limit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD_FILE = "kdcache.json"
HEAD_FILE = "shared_head.safetensors"
ONNX_FILE = "model.onnx"
FORMAT = 1


@dataclass(frozen=True)
class SharedHeadRecord:
    """Sizes of a student's shared head; ``adapter``: a linear map from the student's width comes before it."""

    width: int
    pooling: str
    dropout: float
    adapter: bool


@dataclass(frozen=True)
class StudentRecord:
    """kdcache.json of a student: how to use it, and where it came from."""

    name: str
    method: str
    text_columns: tuple[str, ...]
    label_column: str
    label_names: tuple[str, ...]
    max_length: int
    shared_head: SharedHeadRecord | None = None
    kdcache: str = ""
    labels_declared: bool | None = (
        None  # False: label_names are sorted, so their numbers are nobody's; None: not recorded
    )
    trust_remote_code: bool = (
        False  # it needs Python code of its own, which lies beside it; written only where that is so
    )


def student_record(
    student: Student,
    *,
    name: str,
    method: str,
    text_columns: tuple[str, ...],
    label_column: str,
    labels_declared: bool | None = None,
) -> StudentRecord:
    """The record of ``student`` as it is."""
    from kdcache import __version__

    head = student.model.head
    shared = None
    if head is not None:
        shared = SharedHeadRecord(head.width, head.pooling_name, head.dropout_rate, student.model.adapter is not None)
    names, length = student.label_names, student.max_length
    return StudentRecord(
        name,
        method,
        text_columns,
        label_column,
        names,
        length,
        shared,
        __version__,
        labels_declared=labels_declared,
        trust_remote_code=student.own_code,
    )


def save_student(directory: Path, student: Student, record: StudentRecord, card: str) -> str:
    """Write the directory under a temporary name, fsync it, and replace an older one. Raises StorageError.

    Returns the reason why there is no model.onnx where torch cannot export it, which does not fail the save; else "".
    """
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    make_directory(directory.parent)
    temporary.mkdir()
    model = student.model.cpu().eval()
    model.network.save_pretrained(temporary)
    student.tokenizer.save_pretrained(temporary)
    document = {"format": FORMAT, "kind": "student", **asdict(record)}
    if not record.trust_remote_code:
        del document["trust_remote_code"]  # records without own code keep their format
    (temporary / RECORD_FILE).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    reason = ""
    if model.head is not None:
        _save_shared_head(model, temporary / HEAD_FILE)
        try:
            export_onnx(student, len(record.text_columns), temporary / ONNX_FILE)
        except ModelError as error:
            reason, card = error.message, f"{card}\nThere is no `{ONNX_FILE}`: {error.message}.\n"
            (temporary / ONNX_FILE).unlink(missing_ok=True)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    sync_tree(temporary)
    publish_directory(temporary, directory)
    return reason


def _save_shared_head(model: StudentModel, path: Path) -> None:
    from safetensors.torch import save_file

    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("network.")}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


def read_record(directory: Path) -> StudentRecord | None:
    """The record of a model directory; None for a model that kdcache did not make.

    Raises RecipeError for a missing directory, DamageError for an unreadable record.
    """
    if not directory.is_dir():
        raise RecipeError(
            f"there is no model directory '{directory}'",
            "Give a directory made by save_pretrained or by kdcache distill.",
        )
    path = directory / RECORD_FILE
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.pop("format") != FORMAT or document.pop("kind") != "student":
            raise ValueError("not a student's record of format 1")
        shared = document.pop("shared_head")
        for key in ("text_columns", "label_names"):
            document[key] = tuple(document[key])
        return StudentRecord(**document, shared_head=SharedHeadRecord(**shared) if shared else None)
    except (ValueError, KeyError, TypeError) as error:
        raise DamageError(
            f"'{path}' is not readable: {error}",
            "Distill again, or delete it and name the columns with --text and --label.",
        ) from error


def load_student(directory: Path, *, trust_remote_code: bool = False) -> Student:
    """A saved student, in eval mode, float32, on the CPU; also any sequence classifier that transformers loads.

    ``trust_remote_code`` allows it to run Python code of the directory. Raises ModelError, RecipeError and DamageError.
    """
    record = read_record(directory)
    network = _load_network(
        directory, shared=record is not None and record.shared_head is not None, trusted=trust_remote_code
    )
    tokenizer = load_tokenizer(str(directory), trust_remote_code=trust_remote_code)
    require_pad_token(tokenizer, network.config.pad_token_id)
    settle_padding(network, tokenizer)
    own_code = runs_own_code(network, tokenizer)
    if record is None:
        id2label = {int(index): str(name) for index, name in (network.config.id2label or {}).items()}
        names = tuple(id2label[index] for index in sorted(id2label))
        longest = min(int(tokenizer.model_max_length), 512, position_limit(network) or 512)
        return Student(StudentModel(network).eval(), tokenizer, names, longest, str(directory), own_code)
    model = StudentModel(network) if record.shared_head is None else _with_shared_head(network, record, directory)
    return Student(model.eval(), tokenizer, record.label_names, record.max_length, str(directory), own_code)


def _load_network(directory: Path, *, shared: bool, trusted: bool) -> PreTrainedModel:
    from transformers import MODEL_MAPPING, AutoConfig, AutoModel, AutoModelForSequenceClassification

    be_quiet()
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trusted)
        loader: Any = AutoModelForSequenceClassification
        options: dict[str, bool] = {"trust_remote_code": trusted}
        if shared and type(config) in MODEL_MAPPING and not trusted:
            loader = MODEL_MAPPING[type(config)]
            options = without_pooler(loader)
        elif shared:
            loader = AutoModel
        model, report = loader.from_pretrained(directory, dtype=torch.float32, output_loading_info=True, **options)
    except Exception as error:  # transformers raises OSError, ValueError, safetensors errors …
        if wants_code(error):
            raise code_not_run(directory) from error
        reason = first_line(error)
        raise ModelError(f"no model could be loaded from '{directory}': {reason}", "Distill it again.") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"the weights in '{directory}' lack {', '.join(missing[:3])}: this is no finished classifier",
            "Give the directory of a student, or of a fine-tuned sequence classifier.",
        )
    return cast("PreTrainedModel", model)


def _with_shared_head(network: PreTrainedModel, record: StudentRecord, directory: Path) -> StudentModel:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from kdcache.teachers.head import Pooling, SharedHead

    assert record.shared_head is not None
    sizes = record.shared_head
    head = SharedHead(sizes.width, len(record.label_names), cast("Pooling", sizes.pooling), sizes.dropout)
    adapter = nn.Linear(int(network.config.hidden_size), sizes.width) if sizes.adapter else None
    model = StudentModel(network, head, adapter)
    try:
        state = load_file(directory / HEAD_FILE)
        encoder = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("network.")}
        model.load_state_dict(encoder | state)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise DamageError(
            f"'{directory / HEAD_FILE}' is missing or damaged: {first_line(error)}", "Distill again."
        ) from error
    return model


class _LogitsOnly(nn.Module):
    """Tensors in, logits out, as an ONNX graph needs it."""

    def __init__(self, model: StudentModel, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *tensors: Tensor) -> Tensor:
        return cast("Tensor", self.model(dict(zip(self.names, tensors, strict=True))).logits)


def export_onnx(student: Student, columns: int, path: Path, *, cure: str = "Set student.head = 'standard'.") -> None:
    """The student as one ONNX graph with dynamic batch and length. Raises ModelError where torch cannot export it."""
    texts = [("a plain sentence of some words",) * columns, ("short",) * columns]
    inputs = pad(encode(student.tokenizer, texts, student.max_length), [0, 1], int(student.tokenizer.pad_token_id))
    taken = {name: tensor for name, tensor in inputs.items() if name in student.model.accepted}
    module = _LogitsOnly(student.model, list(taken)).eval()
    write_graph(module, taken, lambda: ["logits"], path, subject="the student", cure=cure)
