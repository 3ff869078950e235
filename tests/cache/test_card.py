"""The card of a cache: from the manifest alone, and safe to show whatever the manifest says."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdcache.cache.card import cache_card
from kdcache.cache.manifest import parse_manifest
from kdcache.cache.reader import open_cache
from kdcache.testing.caches import dump, made_plan

PROVENANCE = {
    "recipe": "reviews", "licence": "CC-BY-4.0", "data_licence": "MIT", "published": "2026-11-20T08:00:00Z", "text_ids": "ab" * 32,
    "versions": {"kdcache": "9.9"}, "mean_scores": {"accuracy": "0.91"},
    "teachers": {"bert": {"source": "google-bert/bert-base-uncased", "licence": "Apache-2.0", "scores": {"accuracy": "0.9012345"}}},
}  # fmt: skip


def test_a_card_says_what_a_colleague_needs(tmp_path: Path) -> None:
    manifest = dump(tmp_path / "c", made_plan(6, 2), provenance=PROVENANCE)
    again = parse_manifest(manifest.to_bytes(), "read again")
    card = cache_card(again, name="reviews-2t")
    assert card == cache_card(manifest, name="reviews-2t")
    for expected in (
        "# reviews: a cache", "2 fine-tuned teachers", "8 texts", "| labels | `bad`, `good` |", "| data fingerprint | abababab",
        f"| identity | {manifest.identity} |", "| train | 6 |", "accuracy 0.9012", "2 (pca 3 int8); 4 (none 6 float32)",
        "kdcache distill RECIPE --cache reviews-2t", "- teacher bert: Apache-2.0", "- teacher roberta: not stated", "- data: MIT",
        "made | 2026-11-20T08:00:00Z, kdcache 9.9", "Mean of the co-finetuned", "hidden states of 68 tokens",
    ):  # fmt: skip
        assert expected in card, expected
    assert "kdcache cache verify PATH" in cache_card(manifest)


@pytest.mark.parametrize(
    "provenance", [{"teachers": "none", "versions": 3, "mean_scores": ["x"]}, {"recipe": "a\x1b[31m|<script>\n# b"}]
)
def test_a_card_is_made_whatever_the_provenance_says(tmp_path: Path, provenance: dict[str, object]) -> None:
    card = cache_card(dump(tmp_path / "c", made_plan(3, 1, ("bert",)), provenance=provenance))
    assert "\x1b" not in card and "<script>" not in card and "\n# b" not in card
    assert open_cache(tmp_path / "c").identity in card
