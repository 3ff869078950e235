"""Settings of the training loop, and what of them a checkpoint must match."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from kdcache.errors import RecipeError

if TYPE_CHECKING:
    from kdcache.recipe import OptimSection
    from kdcache.training.optim import ScheduleName

_KEYS = {"lr_by_prefix": "own_rates"}  # the key in checkpoints since 0.1.0
_FREE = {
    "checkpoint_steps", "checkpoint_minutes", "read_steps", "write_in_thread", "identity", "newer_keys",
    "decay_by_prefix", "tf32", "fused_adamw", "compile",  # the last three: in ``identity`` where they are given
}  # fmt: skip


@dataclass(frozen=True)
class LoopSettings:
    """Settings of the loop.

    ``identity`` names all other inputs of the outcome (data, models). A checkpoint with another identity is refused.
    """

    epochs: int
    learning_rate: float
    warmup: float = 0.1
    schedule: ScheduleName | None = None  # None: linear
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    checkpoint_steps: int | None = None
    checkpoint_minutes: float | None = None  # 5 where neither is given
    log_steps: int = 10
    read_steps: int | None = None  # steps after which losses are copied to the host; None: 1 on a CPU, else 20
    write_in_thread: bool | None = None  # checkpoints, which takes a copy of the state; None: not on a CPU
    tf32: bool | None = None  # None: as torch has it
    fused_adamw: bool | None = None  # None: where there is a fused kernel
    compile: bool | None = None  # the task compiles its networks
    evaluate_steps: int | None = None
    patience: int | None = None  # evaluations without a better score
    ema: float | None = None  # decay of the averaged weights
    seed: int = 0
    lr_by_prefix: Mapping[str, float] = field(default_factory=dict)  # learning rates by prefix of parameter names
    decay_by_prefix: bool = False  # weight decay for these parameters too; fixed by the stage
    identity: Mapping[str, Any] = field(default_factory=dict)
    newer_keys: frozenset[str] = frozenset()  # of ``identity``: optional, because 0.1.0 did not write them

    @classmethod
    def from_section(
        cls, section: OptimSection, identity: Mapping[str, Any], newer_keys: Iterable[str] = ()
    ) -> LoopSettings:
        return cls(
            epochs=section.epochs,
            learning_rate=section.learning_rate,
            warmup=section.warmup,
            schedule=section.schedule,
            weight_decay=section.weight_decay,
            max_grad_norm=section.max_grad_norm,
            precision=section.precision,
            checkpoint_steps=section.checkpoint_steps,
            checkpoint_minutes=section.checkpoint_minutes,
            tf32=section.tf32,
            fused_adamw=section.fused_adamw,
            compile=section.compile,
            evaluate_steps=section.evaluate_steps,
            patience=section.patience,
            ema=section.ema,
            seed=section.seed,
            identity=identity,
            newer_keys=frozenset(newer_keys),
        )

    def full_identity(self, steps_per_epoch: int) -> dict[str, Any]:
        """What a checkpoint must match; when checkpoints are written may change."""
        settings = {_KEYS.get(name, name): value for name, value in vars(self).items() if name not in _FREE}
        return {**settings, "steps_per_epoch": steps_per_epoch, **self.identity}


def check_evaluation(section: OptimSection, name: str, *, validation: bool) -> None:
    """RecipeError if section ``name`` has keys that need validation rows, and there are none."""
    for key in ("patience", "evaluate_steps"):
        value = getattr(section, key)
        if value is not None and not validation:
            raise RecipeError(
                f"{name}.{key} = {value} needs labelled validation rows, and there are none",
                "Name a file with data.validation, or set data.validation_fraction.",
            )
