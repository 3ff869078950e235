"""Models that come with Python code of their own: it is run only where the user asks for it, model by model.

transformers runs such code with ``trust_remote_code = True``, and asks on the terminal where the argument is not given.
kdcache always gives it: True where the recipe's table of that model, or a flag, says so, else False. A cache, a
teachers directory or a student that somebody else made can never say so for the user.
"""

from __future__ import annotations

from kdcache.errors import CustomCodeError


def wants_code(error: BaseException) -> bool:
    """Whether a loader of transformers failed because it was not allowed to run the model's code."""
    return "trust_remote_code" in str(error)


def code_not_run(model: object) -> CustomCodeError:
    """The error for a model that cannot be loaded without its code; the hint names the key that allows it."""
    return CustomCodeError(
        f"'{model}' comes with Python code of its own, which is run only where that is asked for",
        "Read that code. If you trust it, set trust_remote_code = true in [student], or in the [[teachers]] table of "
        "the model; "
        "commands without a recipe take --trust-remote-code.",
    )
