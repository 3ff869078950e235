"""Replacement of words by a masked language model (TinyBERT, arXiv 1909.10351, appendix A).

Each word is chosen with a probability; the chosen words of a text are masked in one forward pass, and each is replaced
by one of the model's most probable words, drawn uniformly. The paper masks one word at a time, which costs a pass per
word, and replaces words of several pieces by neighbours of word vectors; here these words stay.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.data.custom_code import code_not_run, wants_code
from kdcache.data.encoding import load_tokenizer, padding_id, require_fast
from kdcache.errors import ModelError, RecipeError

if TYPE_CHECKING:
    import torch

_TEXTS = 32  # of a forward pass
_LONGEST = 512  # tokens


class MaskedLanguageModel:
    """Calling it replaces words of texts, given as (words, generator) each; None where no word was replaced.

    Args:
        model: hub name or directory of a model that ``AutoModelForMaskedLM`` loads.
        share: probability that a word is chosen.
        candidates: the most probable words of which one is drawn.

    Raises:
        RecipeError: there is no such model, or its tokenizer has no mask token.
        ModelError: the tokenizer is a slow one.
    """

    def __init__(self, model: str, *, share: float = 0.4, candidates: int = 15) -> None:
        import torch
        from transformers import AutoModelForMaskedLM

        self.tokenizer = load_tokenizer(model)
        if self.tokenizer.mask_token is None:
            raise RecipeError(f"the tokenizer of '{model}' has no mask token", "Name a masked language model: --mlm.")
        try:
            network = AutoModelForMaskedLM.from_pretrained(model, dtype="float32")
        except Exception as error:  # transformers raises OSError, ValueError, KeyError …
            if wants_code(error):
                raise code_not_run(model) from error
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise RecipeError(f"no masked language model could be loaded from '{model}': {reason}") from error
        self.fingerprint = _fingerprint(network)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._network = network.eval().to(self._device)
        self._share, self._candidates = share, candidates
        positions = int(getattr(network.config, "max_position_embeddings", _LONGEST) or _LONGEST)
        self._longest = min(_LONGEST, positions - 2)  # RoBERTa's positions begin at 2
        words = _word_ids(self.tokenizer)
        self._words, self._word_ids = list(words.values()), torch.tensor(list(words), device=self._device)
        self._single: dict[str, bool] = {}

    def __call__(self, texts: Sequence[tuple[list[str], random.Random]]) -> list[list[str] | None]:
        chosen = [self._choose(words, generator) for words, generator in texts]
        made: list[list[str] | None] = []
        for first in range(0, len(texts), _TEXTS):
            rows = range(first, min(first + _TEXTS, len(texts)))
            asked = [row for row in rows if chosen[row]]
            answers = dict(zip(asked, self._fill([(texts[row][0], chosen[row]) for row in asked]), strict=True))
            made += [_drawn(*texts[row], chosen[row], answers[row]) if row in answers else None for row in rows]
        return made

    def _choose(self, words: Sequence[str], generator: random.Random) -> list[int]:
        """Places of the words to replace; none in a text that has the mask token already."""
        drawn = [generator.random() < self._share for _ in words]
        if any(str(self.tokenizer.mask_token) in word for word in words):
            return []
        return [place for place, word in enumerate(words) if drawn[place] and self._is_single(word)]

    def _is_single(self, word: str) -> bool:
        """Whether a word is one token, as it stands after a space."""
        if word not in self._single:
            ids = require_fast(self.tokenizer).encode(f" {word}", add_special_tokens=False).ids
            known = len(ids) == 1 and ids[0] not in self.tokenizer.all_special_ids  # not the token of unknown words
            self._single[word] = known and word.isalpha()
        return self._single[word]

    def _fill(self, texts: Sequence[tuple[Sequence[str], Sequence[int]]]) -> list[list[list[str]]]:
        """Per text and masked place, the most probable words; fewer places where a text is cut."""
        import torch

        if not texts:
            return []
        mask, backend = str(self.tokenizer.mask_token), require_fast(self.tokenizer)
        lines = [
            " ".join(mask if place in places else word for place, word in enumerate(words)) for words, places in texts
        ]
        rows = [encoding.ids[: self._longest] for encoding in backend.encode_batch(lines)]
        width = max(len(row) for row in rows)
        ids = np.array([row + [padding_id(self.tokenizer)] * (width - len(row)) for row in rows])
        attended = np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(attended)}
        with torch.no_grad():
            logits = self._network(**{name: tensor.to(self._device) for name, tensor in inputs.items()}).logits
        masked = (ids == self.tokenizer.mask_token_id) & (attended == 1)
        row_places = torch.from_numpy(np.argwhere(masked)).to(self._device)
        at_masks = logits[row_places[:, 0], row_places[:, 1]][:, self._word_ids]
        best = at_masks.topk(min(self._candidates, len(self._words)), dim=1).indices.tolist()
        answers: list[list[list[str]]] = [[] for _ in texts]
        for row, order in zip(row_places[:, 0].tolist(), best, strict=True):
            answers[row].append([self._words[place] for place in order])
        return answers


def _drawn(
    words: Sequence[str], generator: random.Random, places: Sequence[int], answers: Sequence[Sequence[str]]
) -> list[str] | None:
    """The text with one answer at each place; an answer that is the word itself leaves it."""
    made = list(words)
    for place, answer in zip(places, answers, strict=False):
        made[place] = answer[generator.randrange(len(answer))]
    return None if made == list(words) else made


def _word_ids(tokenizer: Any) -> dict[int, str]:
    """Tokens that are whole words of letters, by id: beginnings of words where the vocabulary marks them."""
    tokens = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)
    marks = [mark for mark in ("\u0120", "\u2581") if any(token.startswith(mark) for token in tokens)]
    words = {}
    for token, number in sorted(tokens.items(), key=lambda item: item[1]):
        whole = token.startswith(marks[0]) if marks else not token.startswith("##")
        word = str(tokenizer.decode([number])).strip() if whole and number not in special else ""
        if len(word) > 1 and word.isalpha():
            words[number] = word
    if not words:
        raise ModelError(
            f"the vocabulary of '{tokenizer.name_or_path}' has no token that is a whole word",
            "Name another masked language model.",
        )
    return words


def _fingerprint(network: torch.nn.Module) -> str:
    """sha256 of the weights, for the metadata of the output."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
