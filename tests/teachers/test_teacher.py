"""Loading encoders and classifiers: nothing random, nothing too long, labels by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kdcache.errors import ModelError
from kdcache.teachers.head import SharedHead
from kdcache.teachers.teacher import (
    TeacherModel,
    check_max_length,
    class_order_of,
    load_classifier,
    load_encoder,
    position_limit,
)
from kdcache.testing.tiny import make_model


def test_encoders_come_without_pooler(tiny_models: dict[str, Path]) -> None:
    for path in tiny_models.values():
        assert not [name for name in load_encoder(str(path)).state_dict() if "pooler" in name]


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("mpnet", {}),
        ("deberta-v2", {"position_biased_input": False, "relative_attention": True, "pos_att_type": ["c2p"]}),
        ("electra", {"embedding_size": 8}),
        ("albert", {"embedding_size": 8}),
    ],
)
def test_other_families_work(kind: str, sizes: dict[str, object], tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(
        kind, vocab_size=50, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=40, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModel.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    model = TeacherModel(load_encoder(str(tmp_path)), None, SharedHead(8, 3)).eval()
    inputs = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    output = model({**inputs, "token_type_ids": torch.zeros(1, 3, dtype=torch.int64)}, hidden_states=True)
    assert output.logits.shape == (1, 3)
    assert output.hidden_states is not None
    assert [tuple(state.shape) for state in output.hidden_states] == [(1, 3, 8)] * 3
    assert model(inputs).hidden_states is None


def test_roberta_positions_start_after_the_padding(tiny_models: dict[str, Path]) -> None:
    bert, roberta = load_encoder(str(tiny_models["bert"])), load_encoder(str(tiny_models["roberta"]))
    assert position_limit(bert) == 80
    assert position_limit(roberta) == 80 - 2
    tokens = torch.full((1, 78), 7)
    assert torch.isfinite(roberta(input_ids=tokens).last_hidden_state).all()
    with pytest.raises((IndexError, RuntimeError)):
        roberta(input_ids=torch.full((1, 79), 7))
    check_max_length("roberta", roberta, 78)
    with pytest.raises(ModelError, match="'roberta' takes at most 78 tokens, max_length is 79"):
        check_max_length("roberta", roberta, 79)


def test_positions_of_opt_are_those_that_it_can_read() -> None:
    from transformers import OPTConfig, OPTModel

    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1, "vocab_size": 50}
    model = OPTModel(OPTConfig(num_attention_heads=2, max_position_embeddings=20, **sizes)).eval()
    limit = position_limit(model)
    assert limit == 20
    ids = torch.full((1, limit + 1), 5)
    model(ids[:, :limit], torch.ones_like(ids[:, :limit]))
    with pytest.raises(IndexError):
        model(ids, torch.ones_like(ids))


def test_a_checkpoint_without_all_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_model(tmp_path, "bert", depth=1)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layer.0.output.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack encoder\.layer\.0\.output\.dense\.weight"):
        load_encoder(str(tmp_path))


def test_a_pooler_that_is_missing_does_not_matter(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_model(tmp_path, "bert", depth=1)
    before = load_encoder(str(tmp_path)).state_dict()
    tensors = {
        name: tensor for name, tensor in load_file(tmp_path / "model.safetensors").items() if "pooler" not in name
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    after = load_encoder(str(tmp_path)).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_encoder_is_no_classifier(tiny_models: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"lack classifier\.") as caught:
        load_classifier(str(tiny_models["xlm"]))
    assert "fine-tuned sequence classifier" in caught.value.hint


def test_what_is_not_there_or_no_encoder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model could be loaded from '/nowhere/at-all'"):
        load_encoder("/nowhere/at-all")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bart"}))
    with pytest.raises(ModelError, match="encoder-decoder"):
        load_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match="no model could be loaded"):
        load_encoder(str(tmp_path))


def test_labels_are_matched_by_name() -> None:
    assert class_order_of("t", {0: "NEGATIVE", 1: "POSITIVE"}, ["negative", "positive"]) == ((0, 1), False)
    assert class_order_of("t", {0: "Positive", 1: "Negative"}, ["negative", "positive"]) == ((1, 0), False)
    assert class_order_of("t", {"0": "c", "1": "a", "2": "b"}, ["a", "b", "c"]) == ((1, 2, 0), False)
    assert class_order_of("t", {0: "LABEL_0", 1: "LABEL_1"}, ["negative", "positive"]) == ((0, 1), True)


@pytest.mark.parametrize("names", [("a", "b"), ("a", "b", "d"), ("a", "A", "b")])
def test_other_labels_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ModelError, match="the task's labels are a, b, c"):
        class_order_of("t", dict(enumerate(names)), ["a", "b", "c"])
    with pytest.raises(ModelError, match="LABEL_0, LABEL_1"):
        class_order_of("t", {0: "LABEL_0", 1: "LABEL_1"}, ["a", "b", "c"])
