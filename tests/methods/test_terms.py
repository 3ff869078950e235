"""Every term of every method, and every choice of the parts, under the contract of terms."""

from __future__ import annotations

import pytest

from kdcache.methods.base import Term
from kdcache.methods.parts.hidden_states import COSINE, SQUARED, HiddenRelations, HiddenStates
from kdcache.methods.parts.mixing import mean_logit, mean_probability
from kdcache.methods.parts.relations import angle_relation, cosine_relation, distance_relation
from kdcache.methods.parts.soft_labels import SoftLabels, kl_divergence, logit_squared_error
from kdcache.methods.registry import all_methods
from kdcache.testing.term_contract import TermContract

TERMS: dict[str, Term] = {f"{method.name}: {term.name}": term for method in all_methods() for term in method.terms} | {
    "KL": SoftLabels(kl_divergence),
    "squared error of logits": SoftLabels(logit_squared_error),
    "mean probability": SoftLabels(mixing=mean_probability),
    "mean logit": SoftLabels(mixing=mean_logit),
    "cosine of tokens": HiddenStates("tokens", distance=COSINE),
    "first token": HiddenStates("first"),
    "mean of tokens, normalised, W on the teacher's side": HiddenStates(
        "mean", normalised=True, distance=SQUARED, direction="teacher-to-student"
    ),
    "W on both sides": HiddenStates(direction="both"),
    "no W": HiddenStates(direction="none"),
    "weighted tokens": HiddenStates(weighted=True),
    "weighted first token": HiddenStates("first", weighted=True),
    "distances": HiddenRelations(((1.0, distance_relation),)),
    "angles of first tokens": HiddenRelations(((1.0, angle_relation),), "first"),
    "cosines, normalised": HiddenRelations(((1.0, cosine_relation),), normalised=True),
}


@pytest.mark.parametrize("name", TERMS)
class TestTerms(TermContract):
    @pytest.fixture
    def term(self, name: str) -> Term:
        return TERMS[name]
