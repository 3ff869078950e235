"""The table of methods: a distillation method is one choice per slot.

    L = CE(y, z_s) + sum over teachers i of mean over rows of w_i(x) [ D(M(z), z_s) + sum over layer pairs of R(h_s,j, h_i,l) ]

    w  weighting   weighting.py: how much a teacher counts on a row
    M  mixing      mixing.py: how the teachers' soft labels come together
    D  soft_loss   losses.py: the loss between the mixture and the student; None = no soft labels
    R  hidden      whether hidden states are matched; the direction and the layers are the recipe's choice

A method that is new to kdcache is one row here, and at most one small pure function in one of those files.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from kdcache.distill.losses import SoftLoss, soft_cross_entropy
from kdcache.distill.mixing import Mixing, each_teacher, mean_probability
from kdcache.distill.weighting import Weighting, inverse_cross_entropy, one
from kdcache.errors import RecipeError


@dataclass(frozen=True)
class Method:
    """One row of the table. ``title`` is what a results table calls it, ``source`` where it was published."""

    name: str
    title: str
    source: str
    weighting: Weighting = one
    mixing: Mixing = each_teacher
    soft_loss: SoftLoss | None = None
    hidden: bool = False
    weighting_on_hidden: bool = False  # the weights multiply the hidden loss too

    @property
    def uses_teachers(self) -> bool:
        """Whether any term needs a teacher."""
        return self.soft_loss is not None or self.hidden


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "mt-bert",
            "MT-BERT",
            "Wu, Wu, Huang, Findings of ACL-IJCNLP 2021, arXiv 2106.01023",
            weighting=inverse_cross_entropy,
            soft_loss=soft_cross_entropy,
            hidden=True,
        ),
        Method(
            "kd",
            "mean of soft labels",
            "Hinton, Vinyals, Dean, arXiv 1503.02531, with the mean of the teachers' probabilities as its teacher",
            mixing=mean_probability,
            soft_loss=soft_cross_entropy,
        ),
        Method("fine-tune", "without teachers", "the baseline: the task loss alone"),
    )
}


def find_method(name: str) -> Method:
    """The row of that name; RecipeError names those there are, and the nearest."""
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.5)
    hint = f"Did you mean distill.method = '{near[0]}'?" if near else "Set distill.method to one of these."
    raise RecipeError(f"there is no distillation method '{name}'; there are: {', '.join(METHODS)}", hint)
