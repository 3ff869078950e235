"""The contract of a storage format, as a test class that the tests of every format inherit.

    class TestInt8(CodecContract):
        storage = INT8

A format that needs more than its name overrides ``layer``. Class attributes say what only some formats guarantee.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kdcache.cache.arrays import array_metadata
from kdcache.cache.bases import check_basis, decode_basis, encode_basis
from kdcache.cache.canonical import parse_json
from kdcache.cache.reader import open_cache
from kdcache.cache.verify import verify
from kdcache.codecs.base import Basis, HiddenBlock, LayerSpec, StorageFormat
from kdcache.codecs.projection import Projector
from kdcache.codecs.registry import storage_format, stored_name
from kdcache.errors import DamageError, NonFiniteError
from kdcache.testing.caches import Plan, dump, made_hidden, made_teacher, made_texts

WIDTH = 6  # of the synthetic teachers
_TINY = 512 * float(np.finfo(np.float32).smallest_normal)  # rows below may become zeros
_inherited = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.differing_executors])


class CodecContract:
    """``largest``: the largest magnitude to be tested; ``beyond``: a magnitude that is refused, if there is one."""

    storage: ClassVar[StorageFormat]
    largest: ClassVar[float] = 2.0**100
    beyond: ClassVar[float | None] = None
    every_code_counts: ClassVar[bool] = False  # whether every code has a value, so that a missing chunk is not detected

    def layer(self) -> tuple[LayerSpec, Basis]:
        """A layer in this format, and its basis."""
        return LayerSpec("none", WIDTH, self.storage.name), Basis(None, None, None, 1.0, 1.0)

    def rows(self, count: int, seed: int = 0) -> np.ndarray:
        """float32 [count, dim] of ordinary size."""
        spec, basis = self.layer()
        return np.random.default_rng(seed).standard_normal((count, self.storage.dim(spec, basis)), np.float32)

    def encoded(self, values: np.ndarray) -> HiddenBlock:
        spec, basis = self.layer()
        return self.storage.encode(values, spec, basis)

    def decoded(self, block: HiddenBlock) -> np.ndarray:
        return self.storage.decode(block, self.layer()[1])

    def matrices(self) -> st.SearchStrategy[np.ndarray]:
        """float32 [rows, dim] of any size up to ``largest``, also without rows."""
        spec, basis = self.layer()
        elements = st.floats(-self.largest, self.largest, width=32)
        return hnp.arrays(
            np.float32, st.tuples(st.integers(0, 5), st.just(self.storage.dim(spec, basis))), elements=elements
        )

    def test_it_is_found_by_its_name_and_by_its_title(self) -> None:
        assert storage_format(self.storage.name) is self.storage
        assert stored_name(self.storage.title) == stored_name(self.storage.name) == self.storage.name

    @given(st.data())
    @_inherited
    def test_a_round_trip_stays_within_the_error_model(self, data: st.DataObject) -> None:
        spec, basis = self.layer()
        values = data.draw(self.matrices())
        block = self.encoded(values)
        back = self.decoded(block)
        assert back.dtype == np.float32 and back.shape == values.shape
        rounding = self.storage.rounding(block, values, spec, basis)
        error = np.linalg.norm(back.astype(np.float64) - values, axis=1)
        assert (error <= rounding.most * (1 + 1e-6) + _TINY * values.shape[1]).all()
        assert (rounding.usual <= rounding.most).all()

    @given(st.data())
    @_inherited
    def test_encoding_what_was_decoded_changes_nothing(self, data: st.DataObject) -> None:
        once = self.decoded(self.encoded(data.draw(self.matrices())))
        twice = self.decoded(self.encoded(once))
        largest = np.abs(once).max(axis=1, keepdims=True, initial=0.0)
        assert (np.abs(twice.astype(np.float64) - once) <= 1e-5 * largest + _TINY).all()

    @given(st.data())
    @_inherited
    def test_the_device_encodes_as_numpy_does_bit_for_bit(self, data: st.DataObject) -> None:
        spec, basis = self.layer()
        values = data.draw(self.matrices())
        self.same(self.storage.encoder(spec, basis, "cpu")(torch.from_numpy(values)), self.encoded(values))

    @given(st.data())
    @_inherited
    def test_the_device_decodes_as_numpy_does_bit_for_bit(self, data: st.DataObject) -> None:
        block = self.encoded(data.draw(self.matrices()))
        decoder = self.storage.decoder(self.layer()[1])
        values = torch.from_numpy(block.values)
        found = values.float() if decoder is None else decoder(values)
        if block.scales is not None:
            found = found * torch.from_numpy(block.scales)[:, None]
        np.testing.assert_array_equal(found.numpy(), self.decoded(block))

    def test_a_device_decodes_rows_that_lie_apart_in_memory(self) -> None:
        """Decode a view of records that hold several layers side by side, as in a batch."""
        block = self.encoded(self.rows(9))
        apart = torch.from_numpy(np.concatenate([block.values, block.values], axis=1))[:, : block.values.shape[1]]
        decoder = self.storage.decoder(self.layer()[1]) or torch.Tensor.float
        np.testing.assert_array_equal(decoder(apart).numpy(), decoder(torch.from_numpy(block.values)).numpy())

    def test_a_row_takes_the_bytes_that_it_is_said_to_take(self) -> None:
        spec, _ = self.layer()
        block = self.encoded(self.rows(7))
        assert block.values.nbytes + (0 if block.scales is None else block.scales.nbytes) == 7 * self.storage.row_bytes(
            spec
        )
        empty = self.storage.empty(spec, 7)
        empty.put(np.arange(7), block)
        self.same(empty, block)
        self.same(block.take(np.array([2, 5])), self.encoded(self.rows(7)[[2, 5]]))

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_what_is_not_finite_is_refused_with_its_token(self, bad: float) -> None:
        values = self.rows(3)
        values[1, -1] = bad
        with pytest.raises(NonFiniteError, match="token 1: NaN or infinity"):
            self.encoded(values)

    def test_the_limits_of_magnitude(self) -> None:
        values = self.rows(3)
        values[2] = self.largest
        assert np.isfinite(self.decoded(self.encoded(values))).all()
        if self.beyond is not None:
            values[1, 0] = -self.beyond
            with pytest.raises(NonFiniteError, match=r"token 1: .* is beyond") as caught:
                self.encoded(values)
            assert caught.value.hint

    def test_no_rows_and_rows_of_zeros(self) -> None:
        spec, _ = self.layer()
        empty = self.encoded(self.rows(0))
        self.storage.check_block(empty, spec, 0)
        assert len(empty) == 0 and self.decoded(empty).shape == self.rows(0).shape
        zeros = self.encoded(np.zeros_like(self.rows(2)))
        self.storage.check_block(zeros, spec, 2)
        assert np.isfinite(self.decoded(zeros)).all()
        np.testing.assert_array_equal(*self.decoded(zeros))

    def test_a_damaged_block_is_found(self) -> None:
        spec, _ = self.layer()
        block = self.encoded(self.rows(4))
        self.storage.check_block(block, spec, 4)
        assert self.storage.finite_rows(block).all()
        other = np.float64 if block.values.dtype != np.float64 else np.int16
        scales = None if block.scales is not None else np.ones(4, np.float32)
        for damaged in (
            HiddenBlock(block.values.astype(other), block.scales),
            HiddenBlock(block.values[:, 1:], block.scales),
            HiddenBlock(block.values[1:], block.scales),
            HiddenBlock(block.values, scales),
        ):
            with pytest.raises(ValueError, match=r"expected|arrays"):
                self.storage.check_block(damaged, spec, 4)
        if block.scales is not None:
            block.scales[2] = np.nan
            np.testing.assert_array_equal(self.storage.finite_rows(block), [True, True, False, True])

    def test_the_fill_value_of_a_missing_chunk_is_loud(self) -> None:
        spec, _ = self.layer()
        block = self.encoded(self.rows(4))
        metadata = parse_json(array_metadata(block.values.shape, block.values.dtype.name))
        assert isinstance(metadata, dict)
        fill = metadata["fill_value"]
        block.values[1] = np.nan if fill == "NaN" else fill
        try:
            self.storage.check_block(block, spec, 4)
            loud = not self.storage.finite_rows(block)[1]
        except ValueError as error:
            loud = "code" in str(error)
        assert loud or self.every_code_counts

    def test_its_basis_comes_back_from_its_file(self) -> None:
        spec, basis = self.layer()
        check_basis(basis, spec, WIDTH)
        data = encode_basis(basis)
        back = decode_basis(data, spec, WIDTH)
        assert encode_basis(back) == data
        assert self.storage.dim(spec, back) == self.rows(1).shape[1]

    def test_a_cache_keeps_it_and_finds_a_flipped_bit(self, tmp_path: Path) -> None:
        spec, _ = self.layer()
        teacher = made_teacher("bert", {2: spec})
        identity = dump(tmp_path, Plan(made_texts(6), made_texts(2, "test"), (teacher,))).identity
        cache = open_cache(tmp_path)
        assert cache.identity == identity and cache.teachers["bert"].layers == {2: spec}
        block, made = cache.hidden("bert", "part-00000", 2), made_hidden(teacher, 2, cache.texts("part-00000"))
        self.same(block, made)
        group = zarr.open(str(tmp_path / "teachers/bert/hidden/part-00000.zarr"), mode="r")
        np.testing.assert_array_equal(group["layer-02"][...], made.values)  # type: ignore[index, call-overload]
        assert self.storage.decode(block, cache.basis("bert", 2)).dtype == np.float32
        assert verify(tmp_path) == []
        shard = tmp_path / "teachers/bert/hidden/part-00000.zarr/layer-02/c/0/0"
        damaged = bytearray(shard.read_bytes())
        damaged[3] ^= 16
        shard.write_bytes(bytes(damaged))
        with pytest.raises(DamageError, match="layer-02"):
            open_cache(tmp_path).hidden("bert", "part-00000", 2)

    def test_a_plan_can_measure_and_ask_for_each_of_its_forms(self) -> None:
        whole = LayerSpec("none", 96, self.storage.name)
        forms = self.storage.candidates(whole)
        assert forms and len({self.storage.label(form) for form in forms}) == len(forms)
        for form in forms:
            self.storage.check_layer(form, 96)
            keys = self.storage.keys(form)
            row_bytes = keys.get("bytes")
            self.storage.check_keys(str(keys["projection"]), None if row_bytes is None else int(row_bytes))
            assert self.storage.layer(form, 96, "layer 1 of teacher 'bert'") == form
            assert self.storage.title in self.storage.label(form)

    def test_states_come_back_through_projection_and_format(self) -> None:
        """Orthonormal rows preserve distances: the error of the stored row is that of the rebuilt state."""
        spec, basis = self.layer()
        projector = Projector(basis, "cpu")
        states = projector.back(torch.from_numpy(self.rows(5)))
        block = self.storage.encoder(spec, basis, "cpu")(projector(states))
        back = projector.back(torch.from_numpy(self.decoded(block)))
        rounding = self.storage.rounding(block, projector(states).numpy(), spec, basis)
        assert (torch.linalg.norm(back - states, dim=1).numpy() <= rounding.most + 1e-5).all()

    @staticmethod
    def same(one: HiddenBlock, other: HiddenBlock) -> None:
        """Assert equal bytes and dtypes."""
        pairs = [(one.values, other.values)]
        if one.scales is not None and other.scales is not None:
            pairs.append((one.scales, other.scales))
        else:
            assert one.scales is other.scales
        for left, right in pairs:
            assert left.dtype == right.dtype and left.shape == right.shape
            assert left.tobytes() == right.tobytes()
