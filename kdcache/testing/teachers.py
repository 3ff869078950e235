"""Tiny teachers, made in a second: a directory as co-finetuning writes it, with random weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdcache.testing.tiny import Family, make_model

if TYPE_CHECKING:
    from kdcache.teachers.bundle import TeacherRecord
    from kdcache.teachers.head import SharedHead

SHARED_WIDTH = 16


def make_teachers(
    directory: Path,
    families: Mapping[str, Family],
    *,
    label_names: Sequence[str] = ("0", "1"),
    text_columns: Sequence[str] = ("sentence",),
    widths: Mapping[str, int] | None = None,
    own_heads: Sequence[str] = (),
    depth: int = 4,
    max_length: int = 32,
    seed: int = 0,
) -> Path:
    """Write a teachers directory with one tiny teacher for each entry (name, family) of ``families``.

    Those in ``own_heads`` are whole classifiers. The others have one shared head of width 16, and an adapter if
    ``widths`` gives them another width.
    """
    import torch

    from kdcache.teachers.bundle import Bundle, save_shared_head, write_bundle
    from kdcache.teachers.head import SharedHead

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = SharedHead(SHARED_WIDTH, len(label_names))
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter)  # for logits of a usual size
        records: dict[str, TeacherRecord] = {}
        for number, (name, family) in enumerate(families.items()):
            width = (widths or {}).get(name, SHARED_WIDTH)
            classes = len(label_names) if name in own_heads else None
            model = make_model(
                directory / f".{name}.source", family, width=width, depth=depth, seed=seed + number, classes=classes
            )
            records[name] = _save(directory, name, model, None if classes else head, max_length)
    save_shared_head(directory, head)
    write_bundle(
        directory,
        Bundle(tuple(label_names), tuple(text_columns), records, head.pooling_name, SHARED_WIDTH, head.dropout_rate),
    )
    return directory


def _save(directory: Path, name: str, source: Path, head: SharedHead | None, max_length: int) -> TeacherRecord:
    import shutil

    from kdcache.data.encoding import load_tokenizer
    from kdcache.teachers.bundle import TeacherRecord, save_teacher
    from kdcache.teachers.fingerprints import fingerprint_teacher
    from kdcache.teachers.head import new_adapter
    from kdcache.teachers.teacher import TeacherModel, depth_and_width, load_classifier, load_encoder

    encoder = load_classifier(str(source)) if head is None else load_encoder(str(source))
    depth, width = depth_and_width(encoder)
    adapter = None if head is None else new_adapter(width, head.width)
    order = None if head is not None else tuple(range(len(encoder.config.id2label or {})))
    model = TeacherModel(encoder, adapter, head, order).eval()
    tokenizer = load_tokenizer(str(source))
    save_teacher(directory, name, model, tokenizer)
    shutil.rmtree(source)
    return TeacherRecord(
        head="own" if head is None else "shared",
        adapter=adapter is not None,
        depth=depth,
        width=width,
        max_length=max_length,
        source="tiny",
        revision=None,
        licence="",
        fingerprints=fingerprint_teacher(model, tokenizer),
        class_order=order,
    )
