"""Every registered method, under the contract of methods; a new one is found by its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcache.methods.registry import method_names
from kdcache.testing.method_contract import MethodContract


@pytest.mark.parametrize("name", method_names())
class TestEveryMethod(MethodContract):
    def test_it_has_a_test_of_its_formula(self, name: str) -> None:
        assert Path(__file__).with_name(f"test_{name.replace('-', '_')}.py").is_file()
