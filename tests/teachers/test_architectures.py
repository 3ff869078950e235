"""Teachers of many architectures.

Each works, and then a text gives the same alone, in a batch and in transformers, or is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kdcache.data.encoding import encode, pad
from kdcache.errors import ModelError
from kdcache.recipe import TeacherSection
from kdcache.teachers import trial
from kdcache.teachers.sources import open_source
from kdcache.testing.architectures import ARCHITECTURES
from kdcache.testing.models_page import teacher_column
from kdcache.testing.teacher_check import PAIRS, open_teacher, outputs, reference_logits, teacher_verdict

OWN_REFUSED = {"T5": "encoder-decoder", "BART": "encoder-decoder", "Funnel": "shorten the text"}
SHARED_REFUSED = {"BART": "encoder-decoder", "Funnel": "shorten the text"}
DECODERS = [name for name, entry in ARCHITECTURES.items() if entry.kind == "decoder"]
PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_as_a_teacher(name: str, tmp_path: Path) -> None:
    verdict = teacher_verdict(ARCHITECTURES[name], tmp_path)
    for found, refused in ((verdict.own, OWN_REFUSED), (verdict.shared, SHARED_REFUSED)):
        assert (found is None) == (name not in refused), found
        assert refused.get(name, "") in (found or "")
    assert verdict.difference < 1e-5
    assert verdict.sides < 1e-5
    assert f"| {name} | {ARCHITECTURES[name].kind} | {teacher_column(verdict)} |" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("pad_token_id", [None, "eos", -1])
@pytest.mark.parametrize("name", DECODERS)
def test_a_text_that_ends_in_eos_is_read_as_transformers_reads_it(name: str, pad_token_id: Any, tmp_path: Path) -> None:
    """The padding token of most decoders is that of the end of text.

    A real one at the end of a text must not pass for padding.
    """
    entry = ARCHITECTURES[name]
    eos = entry.tokenizer().eos_token
    texts = [("the film is good and great",), (f"bad {eos}",), (f"the plot {eos}",)]
    number = entry.tokenizer().eos_token_id if pad_token_id == "eos" else pad_token_id
    directory = entry.save(tmp_path, "classifier")
    config = json.loads(
        (directory / "config.json").read_text()
    )  # what transformers does not let one build, old files hold
    (directory / "config.json").write_text(json.dumps({**config, "pad_token_id": number}))
    expected = reference_logits(directory, texts)
    np.testing.assert_allclose(outputs(open_teacher(directory, "own"), texts)[0], expected, atol=1e-5)


def test_a_decoder_is_recognised_by_what_its_first_token_sees(tmp_path: Path) -> None:
    for name, entry in ARCHITECTURES.items():
        if name in SHARED_REFUSED:
            continue
        teacher = open_teacher(entry.save(tmp_path / name), "shared")
        assert trial.try_network("it", teacher.model.encoder, teacher.tokenizer, 32) < 1e-4
        causal = trial.first_token_sees_only_itself(teacher.model.encoder, teacher.tokenizer, 32)
        assert causal == (entry.kind == "decoder"), name


@pytest.mark.parametrize("name", DECODERS)
def test_pooling_cls_is_refused_for_decoders(name: str, tmp_path: Path) -> None:
    directory = ARCHITECTURES[name].save(tmp_path)
    section = TeacherSection(name="it", model=str(directory))
    with pytest.raises(ModelError, match="'it' is a causal decoder") as caught:
        open_source(section, 32, ("0", "1"), 1, "cls")
    assert 'cofinetune.pooling = "last"' in caught.value.hint
    open_source(section, 32, ("0", "1"), 1, "last")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"problem_type": "multi_label_classification"}, "problem_type is 'multi_label_classification'"),
        ({"problem_type": "regression"}, "problem_type is 'regression'"),
        ({"id2label": {0: "score"}, "label2id": {"score": 0}}, "it has one output"),
    ],
)
def test_a_classifier_that_chooses_no_class_is_refused(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    directory = ARCHITECTURES["BERT"].save(tmp_path, "classifier", **changes)
    with pytest.raises(ModelError, match=told) as caught:
        open_teacher(directory, "own")
    assert "single-label" in caught.value.hint


@pytest.mark.parametrize("head", ["own", "shared"])
def test_token_types_that_the_model_does_not_know(head: Any, tmp_path: Path) -> None:
    """RoBERTa with a tokenizer that gives token types: the second type of a pair is beyond its table of one."""
    directory = ARCHITECTURES["RoBERTa"].save(tmp_path, "classifier" if head == "own" else "base")
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    plain = outputs(open_teacher(directory, head), PAIRS)
    settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))

    def special(name: str, kind: int = 0) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": kind}}

    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    single = [special("<s>"), {"Sequence": {"id": "A", "type_id": 0}}, special("</s>")]
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, special("</s>", 1), {"Sequence": {"id": "B", "type_id": 1}}, special("</s>", 1)],
        "special_tokens": {
            name: {"id": name, "ids": [number], "tokens": [name]} for name, number in (("<s>", 0), ("</s>", 2))
        },
    }  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    teacher = open_teacher(directory, head)
    types = encode(teacher.tokenizer, PAIRS, 32).token_type_ids
    assert types is not None and types.max() == 1
    for found, expected in zip(outputs(teacher, PAIRS), plain, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


class _ReadsPadding(nn.Module):
    """A model of a kind that nobody knows: its states change with the length of the batch."""

    def __init__(self, network: Any, shape: str) -> None:
        super().__init__()
        self.network, self.config, self.shape = network, network.config, shape

    def forward(self, input_ids: Any, attention_mask: Any, output_hidden_states: bool, return_dict: bool) -> Any:
        output = self.network(
            input_ids=input_ids,
            attention_mask=attention_mask,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        states = output.hidden_states
        if self.shape == "length":
            states = tuple(state * input_ids.shape[1] for state in states)
        elif self.shape == "fewer":
            states = states[:-1]
        elif self.shape == "shorter":
            states = (*states[:-1], states[-1][:, ::2])
        elif self.shape == "nan":
            states = (*states[:-1], states[-1] * torch.nan)
        else:
            raise TypeError("forward() wants something else\nsecond line")
        return type(output)(last_hidden_state=states[-1], hidden_states=states)


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ("length", "change by .*% of their size when a text is padded; 1% is accepted"),
        ("fewer", "not one vector per token and block: 3 of them, expected 4"),
        ("shorter", "not one vector per token and block: one of shape"),
        ("nan", "NaN or infinity"),
        ("raises", "fails on a made-up text: TypeError: forward.. wants something else$"),
    ],
)
def test_a_model_of_an_unknown_kind_is_tried_before_it_is_trained(shape: str, told: str, tmp_path: Path) -> None:
    teacher = open_teacher(ARCHITECTURES["BERT"].save(tmp_path), "shared")
    network: Any = _ReadsPadding(teacher.model.encoder, shape)
    with pytest.raises(ModelError if shape != "nan" else Exception, match=told):
        trial.try_network("odd", network, teacher.tokenizer, 32)


def test_batches_are_padded_on_the_right_whatever_the_tokenizer_says(tmp_path: Path) -> None:
    teacher = open_teacher(ARCHITECTURES["XLNet"].save(tmp_path), "shared")
    assert teacher.tokenizer.padding_side == "left"
    batch = pad(encode(teacher.tokenizer, [("bad",), ("the film is good",)], 32), [0, 1], 1)
    assert batch["attention_mask"][:, 0].tolist() == [1, 1]
    assert batch["attention_mask"][0].tolist() == sorted(batch["attention_mask"][0].tolist(), reverse=True)
