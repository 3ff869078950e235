"""A tiny model with its own Python code, as some models on the hub have; transformers runs it only if allowed."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

RAN = "KDCACHE_TESTING_CODE_RAN"  # an environment variable: the file that the model's code writes whenever it runs

_LAYERS = """\
from torch import nn


class TinyBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, hidden, mask):
        mean = (hidden * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        return self.norm(hidden + self.dense(hidden + mean).tanh())
"""
_MODELING = """\
import os
import pathlib

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

from .tiny_layers import TinyBlock

if "KDCACHE_TESTING_CODE_RAN" in os.environ:
    pathlib.Path(os.environ["KDCACHE_TESTING_CODE_RAN"]).touch()


class TinyConfig(PretrainedConfig):
    model_type = "kdcache-tiny"

    def __init__(self, vocab_size=300, hidden_size=16, num_hidden_layers=3, **kwargs):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        super().__init__(**kwargs)


class TinyBase(PreTrainedModel):
    config_class = TinyConfig
    base_model_prefix = "tiny"


class TinyModel(TinyBase):
    def __init__(self, config):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TinyBlock(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings

    def forward(self, input_ids, attention_mask, output_hidden_states=False, return_dict=True):
        mask = attention_mask.unsqueeze(-1).to(self.embeddings.weight.dtype)
        states = [self.embeddings(input_ids)]
        for layer in self.layers:
            states.append(layer(states[-1], mask))
        hidden_states = tuple(states) if output_hidden_states else None
        return BaseModelOutput(last_hidden_state=states[-1], hidden_states=hidden_states)


class TinyClassifier(TinyBase):
    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.tiny = TinyModel(config)
        self.out = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids, attention_mask, output_hidden_states=False, return_dict=True):
        output = self.tiny(input_ids, attention_mask, output_hidden_states=output_hidden_states)
        logits = self.out(output.last_hidden_state[:, 0])
        return SequenceClassifierOutput(logits=logits, hidden_states=output.hidden_states)
"""
_AUTO_MAP = {
    "AutoConfig": "tiny_modeling.TinyConfig",
    "AutoModel": "tiny_modeling.TinyModel",
    "AutoModelForSequenceClassification": "tiny_modeling.TinyClassifier",
}


def make_custom_model(directory: Path, *, classifier: bool = False, seed: int = 0) -> Path:
    """Write a model directory with two Python files, random weights of 3 blocks of width 16, and a WordPiece tokenizer.

    Nothing in it is run or imported here.
    """
    import torch
    from safetensors.torch import save_file

    from kdcache.testing.tiny import wordpiece_tokenizer

    directory.mkdir(parents=True)
    tokenizer = wordpiece_tokenizer()
    tokenizer.save_pretrained(directory)
    (directory / "tiny_layers.py").write_text(_LAYERS)
    mark = f"# {secrets.token_hex(8)}\n"  # transformers runs a file of the same bytes once per process
    (directory / "tiny_modeling.py").write_text(mark + _MODELING)
    labels = {"id2label": {"0": "0", "1": "1"}, "label2id": {"0": 0, "1": 1}}
    config = {
        "model_type": "kdcache-tiny",
        "auto_map": _AUTO_MAP,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
    }
    config |= {"architectures": ["TinyClassifier" if classifier else "TinyModel"], **(labels if classifier else {})}
    (directory / "config.json").write_text(json.dumps(config))
    drawn = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"embeddings.weight": (len(tokenizer), 16)}
    for layer in range(3):
        shapes |= {f"layers.{layer}.dense.weight": (16, 16), f"layers.{layer}.dense.bias": (16,)}
        shapes |= {f"layers.{layer}.norm.weight": (16,), f"layers.{layer}.norm.bias": (16,)}
    weights = {name: torch.randn(shape, generator=drawn) for name, shape in shapes.items()}
    if classifier:
        weights = {f"tiny.{name}": values for name, values in weights.items()}
        weights |= {"out.weight": torch.randn((2, 16), generator=drawn), "out.bias": torch.zeros(2)}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
