"""Tiny random encoders with real small tokenizers, made without a network; three take a second.

The three families differ in everything that matters for kdcache: the tokenizer (WordPiece, byte-level BPE,
SentencePiece-like Unigram), the special tokens, the width and the depth.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Family = Literal["bert", "roberta", "distilbert", "xlm-roberta"]

WORDS = (
    "a the of and film movie story actor plot scene music dialogue ending director script camera performance is was "
    "feels looks "
    "good great fine moving funny warm brilliant charming fresh honest bad dull weak boring cold clumsy tired stale "
    "false awful "
    "very quite rather hardly never always almost truly not un re able ing ed ly s"
).split()
_POSITIVE = ("good", "great", "fine", "moving", "funny", "warm", "brilliant", "charming", "fresh", "honest")
_NEGATIVE = ("bad", "dull", "weak", "boring", "cold", "clumsy", "tired", "stale", "false", "awful")


def reviews(count: int, seed: int = 0) -> list[tuple[str, int]]:
    """``count`` distinct made-up review lines with labels 0 and 1 that a tiny model can learn."""
    import random

    rng = random.Random(seed)
    made: dict[str, int] = {}
    while len(made) < count:
        label = rng.randrange(2)
        mood = rng.choices(_POSITIVE if label else _NEGATIVE, k=rng.randint(1, 3))
        line = [
            "the",
            rng.choice(("film", "story", "plot", "actor", "music", "ending")),
            rng.choice(("is", "feels", "looks")),
            *mood,
        ]
        line += rng.choices(WORDS[:15], k=rng.randint(0, 8))
        made.setdefault(" ".join(line), label)
    return list(made.items())


def write_reviews(path: Path, rows: Sequence[tuple[str, int]], *, labelled: bool = True) -> Path:
    """A TSV file with the columns ``sentence`` and, if labelled, ``label``."""
    header = "sentence\tlabel" if labelled else "sentence"
    lines = [f"{text}\t{label}" if labelled else text for text, label in rows]
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def recipe_text(
    name: str,
    teachers: Mapping[str, object],
    sections: str,
    *,
    files: Sequence[str] = ("train", "validation"),
) -> str:
    """A recipe in TOML over files of ``write_reviews``, with ``teachers`` (name -> model), followed by ``sections``.

    ``files``: train.tsv, dev.tsv, test.tsv and more.tsv, as ``train``, ``validation``, ``test`` and ``transfer``.
    """
    named = {"train": '"train.tsv"', "validation": '"dev.tsv"', "test": '"test.tsv"', "transfer": '["more.tsv"]'}
    lines = [f'name = "{name}"', "[data]", *(f"{key} = {named[key]}" for key in files)]
    lines += ['text = ["sentence"]', 'label = "label"', "max_length = 32"]
    for teacher, model in teachers.items():
        lines += ["[[teachers]]", f'name = "{teacher}"', f'model = "{model}"']
    return "\n".join(lines) + "\n" + sections


def corpus() -> list[str]:
    """The training text of tiny tokenizers: made-up reviews with some accents, CJK and emoji."""
    return [text for text, _ in reviews(400, seed=7)] + [
        "crème brûlée naïve café",
        "日本語 の テキスト",
        "smile 🙂 ok 👍🏽",
        "don't stop 3.14!",
    ] * 5


def _frequent_pieces(backend: Any, count: int) -> tuple[list[str], list[tuple[str, int]]]:
    """The characters of ``corpus()``, and the ``count`` beginnings and ends of words that cover most of it.

    Two processes of one test must build the same tokenizer, and the library's WordPiece and Unigram trainers give
    another vocabulary on every run. Pieces are ranked by frequency x length and returned with their frequency. Ends of
    words are marked by a leading NUL.
    """
    words: Counter[str] = Counter()
    for line in corpus():
        text = backend.normalizer.normalize_str(line)
        words.update(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    pieces: Counter[str] = Counter()
    for word, frequency in words.items():
        for cut in range(2, len(word) + 1):
            pieces[word[:cut]] += frequency
        for cut in range(1, len(word) - 1):
            pieces["\0" + word[cut:]] += frequency
    ranked = sorted(pieces.items(), key=lambda item: (-item[1] * len(item[0]), item[0]))
    return sorted(set("".join(words))), ranked[:count]


def wordpiece_tokenizer(*, lowercase: bool = True, vocab_size: int = 300) -> PreTrainedTokenizerBase:
    """A BERT tokenizer (uncased or cased) over pieces of ``corpus()``."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters, pieces = _frequent_pieces(backend, vocab_size)
    tokens = [*special, *characters, *(f"##{character}" for character in characters)]
    tokens += [piece.replace("\0", "##") for piece, _ in pieces]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens)) if number < vocab_size}
    backend.model = models.WordPiece(vocabulary, unk_token="[UNK]")
    backend.add_special_tokens(special)
    cls, sep = backend.token_to_id("[CLS]"), backend.token_to_id("[SEP]")
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"], model_max_length=64,
    )  # fmt: skip


def bytelevel_tokenizer(*, vocab_size: int = 400) -> PreTrainedTokenizerBase:
    """A RoBERTa tokenizer (byte-level BPE, ``<s> a </s></s> b </s>``) trained on ``corpus()``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(corpus(), trainer)
    backend.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        cls_token="<s>", sep_token="</s>",
        mask_token="<mask>", model_input_names=["input_ids", "attention_mask"], model_max_length=64,
    )  # fmt: skip


def sentencepiece_tokenizer(*, vocab_size: int = 300) -> PreTrainedTokenizerBase:
    """An XLM-RoBERTa-like tokenizer (Unigram over Metaspace) over pieces of ``corpus()``."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    characters, pieces = _frequent_pieces(backend, vocab_size)
    scores = dict.fromkeys(special, 0.0) | dict.fromkeys(characters, -12.0)
    for piece, frequency in pieces:
        scores.setdefault(piece.removeprefix("\0"), math.log(frequency) - 10.0)
    backend.model = models.Unigram(list(scores.items())[:vocab_size], unk_id=special.index("<unk>"))
    backend.add_special_tokens(special)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        cls_token="<s>", sep_token="</s>",
        mask_token="<mask>", model_input_names=["input_ids", "attention_mask"], model_max_length=64,
    )  # fmt: skip


_TOKENIZERS: dict[Family, Callable[[], Any]] = {
    "bert": wordpiece_tokenizer,
    "roberta": bytelevel_tokenizer,
    "distilbert": lambda: wordpiece_tokenizer(lowercase=False, vocab_size=260),
    "xlm-roberta": sentencepiece_tokenizer,
}


def make_model(
    directory: Path,
    family: Family,
    *,
    width: int = 16,
    depth: int = 4,
    seed: int = 0,
    classes: int | None = None,
    **others: Any,
) -> Path:
    """Save a random encoder (or, with ``classes``, a sequence classifier) and its tokenizer to ``directory``.

    ``others`` are keys of the config that replace those of tiny models.
    """
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

    tokenizer = _TOKENIZERS[family]()
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 80,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "distilbert":
        sizes |= {"dim": width, "n_layers": depth, "n_heads": 2, "hidden_dim": 2 * width}
    else:
        sizes |= {
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": 2,
            "intermediate_size": 2 * width,
        }
    if classes is not None:
        sizes["num_labels"] = classes
    config = AutoConfig.for_model(family, **{**sizes, **others})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto: Any = AutoModel if classes is None else AutoModelForSequenceClassification
        model = auto.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
