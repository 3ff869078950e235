"""Students of every architecture of the table.

They work, or are refused in one line. None gives other logits in a batch than alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kdcache.errors import ModelError
from kdcache.recipe import StudentSection
from kdcache.students.build import build_student
from kdcache.students.model import Student
from kdcache.students.save import load_student, save_student, student_record
from kdcache.students.score import encode_split, split_logits
from kdcache.teachers import network
from kdcache.teachers.bundle import HEAD_FILE
from kdcache.teachers.network import takes_full_mask
from kdcache.testing.architectures import ARCHITECTURES, DEPTH
from kdcache.testing.student_check import TEXTS, StudentVerdict, student_verdict
from kdcache.testing.teachers import make_teachers

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
REFUSED = {"T5": "encoder-decoder", "BART": "encoder-decoder", "Funnel": "funnel"}
WHOLE_ONLY = {"ALBERT": "share weights"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_as_a_student(name: str, tmp_path: Path) -> None:
    verdict = student_verdict(ARCHITECTURES[name], tmp_path)
    if name in REFUSED:
        assert verdict.whole is not None and REFUSED[name] in verdict.whole, verdict
    else:
        assert verdict.whole is None
    if name in WHOLE_ONLY:
        assert verdict.cut is not None and WHOLE_ONLY[name] in verdict.cut, verdict
    else:
        assert (verdict.cut is None) == verdict.works, verdict.cut
    row = next(line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {name} |"))
    assert row.endswith(f" | {verdict.word} |")


def test_the_table_has_an_answer_for_every_student() -> None:
    """The documentation's table is made of these words."""
    assert StudentVerdict(None, None).word == "works"
    assert StudentVerdict(None, "share weights").word == "works, all layers"
    assert StudentVerdict("an encoder-decoder", None).word == "refused"


DECODERS = [name for name, entry in ARCHITECTURES.items() if entry.kind == "decoder"]
SETTINGS: list[dict[str, Any]] = [
    {"padding_side": "left"}, {"padding_side": "right"},
    {"pad_token_id": None}, {"pad_token_id": -1}, {"pad_token_id": 5},
]  # fmt: skip


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_read_the_last_token_whatever_pads(name: str, tmp_path: Path) -> None:
    """The tokenizer's side and the config's padding token do not change what is said of a text, one that ends in eos
    neither.
    """
    source = ARCHITECTURES[name].save(tmp_path / "source")
    texts = (*TEXTS, "the film is good" + ARCHITECTURES[name].tokenizer().eos_token)
    expected: torch.Tensor | None = None
    for number, changes in enumerate(SETTINGS):
        student = build(resaved(source, tmp_path / str(number), changes))
        assert student.model.config.pad_token_id == student.tokenizer.pad_token_id is not None, changes
        assert student.tokenizer.padding_side == "right", changes
        alone = torch.cat([logits(student, [text]) for text in texts])
        assert torch.allclose(logits(student, texts), alone, atol=1e-5), changes
        expected = alone if expected is None else expected
        ends = len(texts) if student.tokenizer.pad_token == student.tokenizer.eos_token else len(TEXTS)
        assert torch.allclose(alone[:ends], expected[:ends], atol=1e-5), changes


FULL_MASK = {"BERT": True, "MPNet": None, "DeBERTa-v2": None, "GPT-2": False, "XLNet": False, "ModernBERT": None}


@pytest.mark.parametrize("name", FULL_MASK)
def test_a_full_mask_is_used_only_where_it_gives_the_same(name: str, tmp_path: Path) -> None:
    """In training; a causal decoder and XLNet read other tokens with it."""
    model = build(ARCHITECTURES[name].save(tmp_path / "source")).model
    taken = takes_full_mask(model.network, 48)
    assert FULL_MASK[name] in (taken, None)
    mask = (torch.arange(48) < torch.tensor([48, 48, 30, 1])[:, None]).long()
    inputs = {"input_ids": (5 + torch.arange(4 * 48).reshape(4, 48) % 5) * mask, "attention_mask": mask}
    expected = model.train()(inputs, hidden_states=True)
    model.full_mask = taken
    found = model(inputs, hidden_states=True)
    torch.testing.assert_close(found.logits, expected.logits)
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(one[mask.bool()], other[mask.bool()])


def test_a_full_mask_is_tried_on_long_texts(tmp_path: Path) -> None:
    """The tokens of ModernBERT read neighbours only, in some layers; short texts do not show it."""
    source = ARCHITECTURES["ModernBERT"].save(tmp_path / "source")
    model = build(resaved(source, tmp_path / "local", {"local_attention": 8})).model
    assert not takes_full_mask(model.network, 48)


def test_a_decoder_whose_tokenizer_ends_every_text_is_read_at_that_end(tmp_path: Path) -> None:
    from tokenizers import processors

    source = ARCHITECTURES["Llama"].save(tmp_path / "llama")
    tokenizer = ARCHITECTURES["Llama"].tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[attr-defined]
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.save_pretrained(source)
    student = build(source)
    classifier: Any = student.model.network.eval()
    for text in TEXTS:
        ids = student.tokenizer(text, return_tensors="pt")["input_ids"]
        assert ids[0, -1] == student.tokenizer.eos_token_id
        with torch.no_grad():
            wanted = classifier.score(classifier.model(ids).last_hidden_state[:, -1])
        assert torch.allclose(logits(student, [text]), wanted, atol=1e-5)


def test_hidden_states_lie_where_their_tokens_do(tmp_path: Path) -> None:
    """XLNet is run with its padding on the left.

    What the hidden loss sees is in the order of its batch, padded on the right.
    """
    student = build(ARCHITECTURES["XLNet"].save(tmp_path / "xlnet"))
    assert student.tokenizer.padding_side == "left"
    batch = dict(student.tokenizer(list(TEXTS), padding=True, padding_side="right", return_tensors="pt"))
    with torch.no_grad():
        together = student.model.eval()(batch, hidden_states=True).hidden_states
        for row, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
            one = {key: values[row : row + 1, :length] for key, values in batch.items()}
            for many, alone in zip(together, student.model(one, hidden_states=True).hidden_states, strict=True):
                assert torch.allclose(many[row, :length], alone[0], atol=1e-4)


PER_LAYER: list[tuple[str, dict[str, Any], str, list[Any]]] = [
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
     "layer_types", ["full_attention", "sliding_attention"]),
    ("Qwen3", {"layer_types": ["sliding_attention", "full_attention", "full_attention"],
               "use_sliding_window": True, "sliding_window": 4},
     "layer_types", ["sliding_attention", "full_attention"]),
    ("ModernBERT", {"global_attn_every_n_layers": 2}, "layer_types", ["full_attention", "full_attention"]),
    ("Longformer", {"attention_window": [4, 4, 8]}, "attention_window", [4, 8]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "settings", "key", "kept"), PER_LAYER, ids=[row[0] for row in PER_LAYER])
def test_what_a_config_lists_per_layer_is_cut_with_the_layers(
    name: str, settings: dict[str, Any], key: str, kept: list[Any], tmp_path: Path
) -> None:
    """The cut model says what the whole one says whose middle block does nothing."""
    source = ARCHITECTURES[name].save(tmp_path / "source", **settings)
    student, whole = build(source, layers=[1, DEPTH]), build(source)
    assert list(getattr(student.model.config, key)) == kept
    stack: Any = whole.model.network.base_model
    (stack.encoder.layer if name == "Longformer" else stack.layers)[1] = Nothing(as_tuple=name == "Longformer")
    batch = dict(student.tokenizer(list(TEXTS), padding=True, padding_side="right", return_tensors="pt"))
    with torch.no_grad():
        found, expected = (each.model.eval()(batch, hidden_states=True).hidden_states[-1] for each in (student, whole))
    assert torch.allclose(found[batch["attention_mask"] == 1], expected[batch["attention_mask"] == 1], atol=1e-5)


class Nothing(torch.nn.Module):
    """A block that gives back its hidden states."""

    def __init__(self, *, as_tuple: bool) -> None:
        super().__init__()
        self.as_tuple = as_tuple
        self.attention_type = "full_attention"  # ModernBERT asks its blocks

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> Any:
        return (hidden,) if self.as_tuple else hidden


def test_a_block_that_would_compute_otherwise_in_its_new_place_is_refused(tmp_path: Path) -> None:
    source = ARCHITECTURES["GPT-2"].save(tmp_path / "gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ModelError, match="would not load again: its config makes scaling"):
        build(source, layers=[1, 3])
    assert build(source, layers=2).model.depth == 2


def test_positions_of_gpt2_are_counted(tmp_path: Path) -> None:
    source = ARCHITECTURES["GPT-2"].save(tmp_path / "gpt2", n_positions=48)
    with pytest.raises(ModelError, match=r"max_length is 64, but .* positions for 48"):
        build(source)
    assert build(source, max_length=48).max_length == 48


def test_dropout_reaches_every_family(tmp_path: Path) -> None:
    for name in ("GPT-2", "XLNet"):
        student = build(ARCHITECTURES[name].save(tmp_path / name))
        assert not [module.p for module in student.model.modules() if isinstance(module, torch.nn.Dropout) and module.p]


def test_a_model_that_reads_its_padding_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that kdcache does not know may read the last position.

    Seen before the first step, and not in its scores.
    """
    source = ARCHITECTURES["XLNet"].save(tmp_path / "xlnet")
    monkeypatch.setattr(network, "reads_last_position", lambda _: False)
    with pytest.raises(
        ModelError, match=r"student .* change by .*% of their size when a text is padded; 1% is accepted"
    ):
        build(source)


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_decoders_under_the_shared_head(name: str, tmp_path: Path) -> None:
    teachers = make_teachers(tmp_path / "teachers", {"bert": "bert"}, label_names=("0", "1"))
    source = ARCHITECTURES[name].save(tmp_path / "source")
    section = StudentSection(init_from=str(source), head="shared", layers=[1, DEPTH])
    student = build_student(section, ("0", "1"), max_length=64, seed=0, teachers_dir=teachers)
    alone = torch.cat([logits(student, [text]) for text in TEXTS])
    assert torch.allclose(logits(student, TEXTS), alone, atol=1e-5)
    record = teachers / "teachers.json"
    record.write_text(record.read_text().replace('"attention"', '"cls"'))
    save_file(
        {key: value for key, value in load_file(teachers / HEAD_FILE).items() if "pooling" not in key},
        teachers / HEAD_FILE,
    )
    with pytest.raises(ModelError, match=r"causal decoder .* first token"):
        build_student(section, ("0", "1"), max_length=64, seed=0, teachers_dir=teachers)


def test_a_student_that_torch_cannot_export_is_saved_without_its_graph(tmp_path: Path) -> None:
    teachers = make_teachers(tmp_path / "teachers", {"bert": "bert"}, label_names=("0", "1"))
    section = StudentSection(init_from=str(ARCHITECTURES["Longformer"].save(tmp_path / "source")), head="shared")
    student = build_student(section, ("0", "1"), max_length=64, seed=0, teachers_dir=teachers)
    record = student_record(student, name="tiny", method="kd", text_columns=("sentence",), label_column="label")
    lacking = save_student(tmp_path / "student", student, record, "card")
    assert "cannot be exported" in lacking
    assert "\n" not in lacking
    assert "\x1b" not in lacking
    assert not (tmp_path / "student" / "model.onnx").exists()
    assert lacking in (tmp_path / "student" / "README.md").read_text()
    assert torch.allclose(logits(load_student(tmp_path / "student"), TEXTS), logits(student, TEXTS), atol=1e-6)


def build(source: Path, **settings: Any) -> Student:
    section = StudentSection(init_from=str(source), **settings)
    return build_student(section, ("0", "1"), max_length=64, seed=0, dropout=0.0)


def logits(student: Student, texts: Sequence[str]) -> torch.Tensor:
    split = encode_split(student, [(text,) for text in texts], np.zeros(len(texts), np.int64))
    return torch.from_numpy(split_logits(student.model, split))


def resaved(source: Path, directory: Path, changes: dict[str, Any]) -> Path:
    """The same model with other settings of the config, or with another ``padding_side`` of the tokenizer."""
    import json

    shutil.copytree(source, directory)
    name = "tokenizer_config.json" if "padding_side" in changes else "config.json"
    document = json.loads((directory / name).read_text())
    (directory / name).write_text(json.dumps(document | changes))
    return directory
