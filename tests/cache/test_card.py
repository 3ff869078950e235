"""The card of a cache: from the manifest alone, and safe to show whatever the manifest says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kdcache.cache.card import cache_card, describe_manifest
from kdcache.cache.manifest import parse_manifest
from kdcache.cache.reader import open_cache
from kdcache.testing.caches import CODED, LAYERS, PER_TEXT, dump, made_plan, made_teacher

PROVENANCE = {
    "recipe": "reviews",
    "licence": "CC-BY-4.0",
    "data_licence": "MIT",
    "published": "2026-11-20T08:00:00Z",
    "text_ids": "ab" * 32,
    "versions": {"kdcache": "9.9"},
    "mean_scores": {"accuracy": "0.91"},
    "teachers": {
        "bert": {
            "source": "google-bert/bert-base-uncased",
            "licence": "Apache-2.0",
            "scores": {"accuracy": "0.9012345"},
        }
    },
}


def test_a_card_says_what_a_colleague_needs(tmp_path: Path) -> None:
    manifest = dump(tmp_path / "c", made_plan(6, 2), provenance=PROVENANCE)
    again = parse_manifest(manifest.to_bytes(), "read again")
    card = cache_card(again, name="reviews-2t")
    assert card == cache_card(manifest, name="reviews-2t")
    for expected in (
        "# reviews: a cache",
        "2 fine-tuned teachers",
        "8 texts",
        "| labels | `bad`, `good` |",
        "| data fingerprint | abababab",
        f"| identity | {manifest.identity} |",
        "| train | 6 |",
        "accuracy 0.9012",
        "2 (pca 3 int8); 4 (none 6 float32)",
        "kdcache distill RECIPE --cache reviews-2t",
        "- teacher bert: Apache-2.0",
        "- teacher roberta: not stated",
        "- data: MIT",
        "made | 2026-11-20T08:00:00Z, kdcache 9.9",
        "Mean of the co-finetuned",
        "hidden states of 68 tokens",
    ):
        assert expected in card, expected
    assert "kdcache cache verify PATH" in cache_card(manifest)


@pytest.mark.parametrize(
    "provenance", [{"teachers": "none", "versions": 3, "mean_scores": ["x"]}, {"recipe": "a\x1b[31m|<script>\n# b"}]
)
def test_a_card_is_made_whatever_the_provenance_says(tmp_path: Path, provenance: dict[str, object]) -> None:
    card = cache_card(dump(tmp_path / "c", made_plan(3, 1, ("bert",)), provenance=provenance))
    assert "\x1b" not in card and "<script>" not in card and "\n# b" not in card
    assert open_cache(tmp_path / "c").identity in card


def test_bytes_of_a_row_and_of_a_layer_are_two_figures(tmp_path: Path) -> None:
    layers = {1: PER_TEXT[1], 2: LAYERS[2], 3: PER_TEXT[3], 4: CODED}
    plan = replace(made_plan(40, 2, ("bert",)), teachers=(made_teacher("bert", layers),))
    manifest = dump(tmp_path / "c", plan)
    shown = describe_manifest(manifest)["teachers"]["bert"]["layers"]
    assert {number: one["row_bytes"] for number, one in shown.items()} == {"1": 7, "2": 7, "3": 2, "4": 2}
    for number, one in shown.items():
        files = [path for path in (tmp_path / "c" / "teachers" / "bert").rglob("*") if path.is_file()]
        own = [path for path in files if f"layer-{int(number):02d}" in path.as_posix()]
        assert one["bytes"] == sum(path.stat().st_size for path in own) > 100
    card = cache_card(manifest)
    assert "4 (trellis, 2 bytes per token)" in card
    assert "3 (trellis, 2 bytes per text, mean of tokens)" in card
