"""Models that come with Python code of their own: it runs only if the user allows it, per model.

transformers runs such code with ``trust_remote_code=True``, and asks on the terminal if the argument is missing.
kdcache always passes it: True if the recipe's table of that model or a flag says so, else False. A cache, a teachers
directory or a student from somebody else can never allow it.
"""

from __future__ import annotations

from kdcache.errors import CustomCodeError


def wants_code(error: BaseException) -> bool:
    """Whether a loader of transformers failed because it was not allowed to run the model's code."""
    return "trust_remote_code" in str(error)


def code_not_run(model: object) -> CustomCodeError:
    """The error for a model that cannot be loaded without its code; the hint names the key that allows it."""
    return CustomCodeError(
        f"'{model}' comes with Python code of its own, which does not run unless you allow it",
        "Read that code. If you trust it, set trust_remote_code = true in [student], or in the [[teachers]] table of "
        "the model; commands without a recipe take --trust-remote-code.",
    )
