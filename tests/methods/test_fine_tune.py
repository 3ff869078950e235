"""Fine-tuning against its formula in a loop."""

from __future__ import annotations

from kdcache.testing.method_contract import GoldenMethod, PlainStep


class TestFineTune(GoldenMethod):
    method = "fine-tune"

    def expected(self, step: PlainStep) -> dict[str, float]:
        return {"task": step.task}
