"""Compares coders of hidden states: share of variance kept on unseen rows, and decode time, by bytes per token.

    python benchmarks/coding.py pipelines/sst2.toml --teachers runs/sst2/teachers --states states
    python benchmarks/coding.py --gaussian          # distortion of the trellis code on a Gaussian, by bits

Bases and tables are fitted on ``--texts`` seeded train texts; the share is measured on ``--unseen`` test texts. Hidden
states are computed once, in float32, and stored in ``--states``. One thread. Prints one JSON line per teacher, layer,
coder and size.

    cut               PCA to as many dimensions as fit, int8 with one scale per token
    scalar            PCA, bits allotted by variance, Lloyd-Max tables (the coder of kdcache with window 0)
    trellis           like scalar, with tables looked up by the last 6 (8) bits, and rows found by dynamic programming
    per coordinate    like scalar, with a table per coordinate instead of one per depth
    shared            like trellis, with one basis for all layers of the teacher
    entropy           PCA, uniform steps, mean bytes of an ideal entropy coder: a bound, with rows of unequal length
    product           product quantisation: 256 centroids for each of several pieces of the state
    residual          residual quantisation of the state, 256 centroids per stage; only 16 bytes, since a stage is a
                      matrix of the full width
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from product import KMEANS_ROWS, ProductQuantiser, kmeans, nearest, some

from kdcache.cache.ids import id_array
from kdcache.codecs.base import Basis, LayerSpec
from kdcache.codecs.int8 import INT8
from kdcache.codecs.trellis import TRELLIS
from kdcache.codecs.trellis.codebook import decode_rows
from kdcache.codecs.trellis.coder import Coder, RowDecoder
from kdcache.codecs.trellis.fit import allot_bits, train_codebook
from kdcache.data.task import load_task
from kdcache.dump.fitting import Moments, fit_basis
from kdcache.dump.run import open_teacher, text_batches
from kdcache.dump.specs import PreparedTeacher, prepare_teachers, scopes
from kdcache.recipe import load_recipe
from kdcache.teachers.bundle import read_bundle

UNSEEN_ROWS = 4096
DECODED_ROWS = 1024  # rows at once: about a batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("--teachers", type=Path)
    parser.add_argument("--states", type=Path, default=Path("states"))
    parser.add_argument("--texts", type=int, default=2048)
    parser.add_argument("--unseen", type=int, default=512)
    parser.add_argument("--bytes", type=int, nargs="*", default=[16, 48, 96, 192])
    parser.add_argument("--coders", nargs="*", default=list(CODERS))
    parser.add_argument("--only", nargs="*", help="names of teachers")
    parser.add_argument("--layers", type=int, nargs="*")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--gaussian", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.gaussian:
        gaussian()
        return
    for name, layers in extract(arguments).items():
        for layer in layers:
            states = States.of(arguments.states, name, layer, layers)
            for coder in arguments.coders:
                for size in arguments.bytes if coder != "residual" else [16]:
                    kept, seconds = CODERS[coder](states, size)
                    found = {"teacher": name, "layer": layer, "coder": coder, "bytes": size, "kept": round(kept, 4)}
                    speed = None if seconds is None else round(seconds * 1e6 / DECODED_ROWS, 2)
                    print(json.dumps({**found, "decode, us per token": speed}), flush=True)


def extract(arguments: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """Write hidden states to ``name-layer-fit.npy`` and ``-test.npy``; returns the layers of every teacher."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    task, bundle = load_task(recipe.data), read_bundle(arguments.teachers)
    arguments.states.mkdir(exist_ok=True)
    train = list(scopes(task).full.values())
    test = [task.texts[bytes(row)] for row in task.splits["test"].text_ids]
    chosen = {"fit": pick(train, arguments.texts), "test": pick(test, arguments.unseen)}
    found = {}
    for teacher in prepare_teachers(recipe, bundle, arguments.teachers, len(task.label_names)):
        if arguments.only and teacher.name not in arguments.only:
            continue
        found[teacher.name] = tuple(
            layer for layer in teacher.spec.layers if not arguments.layers or layer in arguments.layers
        )
        for part, texts in chosen.items():
            if not all(
                (arguments.states / f"{teacher.name}-{layer}-{part}.npy").exists() for layer in teacher.spec.layers
            ):
                for layer, whole in hidden_states(teacher, texts, arguments.teachers).items():
                    np.save(arguments.states / f"{teacher.name}-{layer}-{part}.npy", whole)
    return found


def hidden_states(teacher: PreparedTeacher, texts: list[tuple[str, ...]], teachers_dir: Path) -> dict[int, np.ndarray]:
    """One pass of a teacher over some texts: float32 [tokens, width] by layer."""
    batches = text_batches(teacher, texts, id_array([bytes(16)] * len(texts)), 4096)
    layers = tuple(teacher.spec.layers)
    states: dict[int, np.ndarray] = {}
    with open_teacher(teacher, teachers_dir) as backend:
        for rows, output in batches.run(backend, layers):
            for layer in layers:
                whole = states.setdefault(
                    layer, np.empty((int(batches.encoded.offsets[-1]), teacher.spec.width), np.float32)
                )
                whole[batches.token_places(rows)] = output.hidden[layer].cpu().numpy()
    return states


def pick(texts: list[tuple[str, ...]], count: int) -> list[tuple[str, ...]]:
    return [texts[place] for place in np.argsort(np.random.PCG64(0).random_raw(len(texts)), kind="stable")[:count]]


@dataclass
class Rotation:
    """An orthonormal PCA basis at full width."""

    components: np.ndarray
    mean: np.ndarray
    explained_variance: np.ndarray


@dataclass
class States:
    """``fit`` and ``unseen`` float32 [rows, width].

    ``basis``: PCA at full width; ``others``: files of the teacher's layers.
    """

    fit: np.ndarray
    unseen: np.ndarray
    basis: Rotation
    others: list[Path]

    @staticmethod
    def of(directory: Path, name: str, layer: int, layers: tuple[int, ...]) -> States:
        fit, test = (np.load(directory / f"{name}-{layer}-{part}.npy") for part in ("fit", "test"))
        others = [directory / f"{name}-{one}-fit.npy" for one in layers]
        return States(fit, some(test, UNSEEN_ROWS), pca(chunks(fit), fit.shape[1]), others)

    def share(self, back: np.ndarray) -> float:
        return float(1 - np.square(self.unseen - back).sum() / np.square(self.unseen - self.unseen.mean(axis=0)).sum())


def chunks(array: np.ndarray) -> Iterator[torch.Tensor]:
    for start in range(0, len(array), 4096):
        yield torch.from_numpy(array[start : start + 4096])


def pca(pieces: Iterator[torch.Tensor], width: int) -> Rotation:
    moments = Moments(width, cross=True)
    for piece in pieces:
        moments.add(piece)
    basis = fit_basis(moments, "pca", width, seed=0, name="", layer=0)
    assert basis.components is not None
    assert basis.mean is not None
    assert basis.explained_variance is not None
    return Rotation(basis.components, basis.mean, basis.explained_variance)


def timed(call: Callable[[], object]) -> float:
    """The median CPU time of fifteen calls, after a first one; other load affects it less than wall time."""
    call()
    taken = []
    for _ in range(15):
        began = time.process_time()
        call()
        taken.append(time.process_time() - began)
    return sorted(taken)[7]


Result = tuple[float, float | None]


def cut(states: States, size: int) -> Result:
    components, mean = states.basis.components[: max(1, size - 4)], states.basis.mean
    nothing = Basis(None, None, None, 0.0, 0.0)
    block = INT8.encode((states.unseen - mean) @ components.T, LayerSpec("pca", len(components), "int8"), nothing)
    assert block.scales is not None
    values, scales = torch.from_numpy(block.values), torch.from_numpy(block.scales)
    return states.share((values.float() * scales[:, None]).numpy() @ components + mean), timed(
        lambda: values.float() * scales[:, None]
    )


def coded(states: States, size: int, window: int, basis: Rotation | None = None) -> Result:
    whole = basis or states.basis
    sample = some(states.fit, TRELLIS.sample_rows)
    coordinates = torch.from_numpy((sample - whole.mean) @ whole.components.T)
    variance = (
        whole.explained_variance.astype(np.float64)
        if basis is None
        else coordinates.numpy().var(axis=0, dtype=np.float64)
    )
    bits = allot_bits(variance, 8 * size)
    mine = bits > 0
    codebook = train_codebook(coordinates[:, mine], bits[mine], np.sqrt(variance[mine]), window=window)
    components = whole.components[mine]
    rows = torch.from_numpy(Coder(codebook, size, "cpu")(torch.from_numpy((states.unseen - whole.mean) @ components.T)))
    decoder = RowDecoder(codebook)
    return states.share(decoder(rows).numpy() @ components + whole.mean), timed(lambda: decoder(rows[:DECODED_ROWS]))


def per_coordinate(states: States, size: int) -> Result:
    whole = states.basis
    coordinates, unseen = (
        torch.from_numpy((x - whole.mean) @ whole.components.T)
        for x in (some(states.fit, TRELLIS.sample_rows), states.unseen)
    )
    back = np.zeros(unseen.shape, np.float32)
    bits = allot_bits(whole.explained_variance.astype(np.float64), 8 * size)
    for place in np.flatnonzero(bits).tolist():
        scale = np.sqrt(whole.explained_variance[place : place + 1])
        codebook = train_codebook(coordinates[:, place : place + 1], bits[place : place + 1], scale, window=0)
        rows = Coder(codebook, 1, "cpu")(unseen[:, place : place + 1])
        back[:, place : place + 1] = decode_rows(rows, codebook)
    return states.share(back @ whole.components + whole.mean), None


def shared(states: States, size: int) -> Result:
    return coded(
        states, size, 6, pca((piece for path in states.others for piece in chunks(np.load(path))), states.fit.shape[1])
    )


def entropy(states: States, size: int) -> Result:
    components, mean = states.basis.components, states.basis.mean
    fit = (some(states.fit, 16384) - mean) @ components.T
    unseen = (states.unseen - mean) @ components.T
    low, high = 1e-3, 10 * float(fit.std())
    for _ in range(25):  # the step size at which the codes have the budget
        step = (low * high) ** 0.5
        bits = sum(_bits(np.rint(column / step).astype(np.int64)) for column in fit.T)
        low, high = (step, high) if bits > 8 * size else (low, step)
    codes = np.rint(unseen / step)
    centres = (
        np.sign(codes) * step * np.maximum(np.abs(codes) - 0.05, 0)
    )  # a little towards the mean, where the density is higher
    return states.share(centres @ components + mean), None


def _bits(codes: np.ndarray) -> float:
    counts = np.unique(codes, return_counts=True)[1] / len(codes)
    return float(-(counts * np.log2(counts)).sum())


def product(states: States, size: int) -> Result:
    quantiser = ProductQuantiser.trained(torch.from_numpy(states.fit), size)
    codes = quantiser.encode(torch.from_numpy(states.unseen))
    return states.share(quantiser.decode(codes).numpy()), timed(
        lambda: quantiser.decode([code[:DECODED_ROWS] for code in codes])
    )


def residual(states: States, size: int) -> Result:
    sample, unseen = some(torch.from_numpy(states.fit), KMEANS_ROWS).clone(), torch.from_numpy(states.unseen).clone()
    tables, codes = [], []
    for _ in range(size):
        tables.append(kmeans(sample))
        sample -= tables[-1][nearest(sample, tables[-1])]
        codes.append(nearest(unseen, tables[-1]))
        unseen -= tables[-1][codes[-1]]

    def decode(count: int) -> torch.Tensor:
        return sum((table[code[:count]] for table, code in zip(tables, codes, strict=True)), torch.zeros(1))

    return states.share(decode(len(unseen)).numpy()), timed(lambda: decode(DECODED_ROWS))


CODERS: dict[str, Callable[[States, int], Result]] = {
    "cut": cut,
    "scalar": lambda states, size: coded(states, size, 0),
    "trellis": lambda states, size: coded(states, size, 6),
    "trellis 8": lambda states, size: coded(states, size, 8),
    "per coordinate": per_coordinate,
    "shared": shared,
    "entropy": entropy,
    "product": product,
    "residual": residual,
}


def gaussian() -> None:
    """Distortion of codes of 1 to 8 bits of a Gaussian of variance 1, unseen values, by window."""
    for window in (0, 6, 8):
        generator = torch.Generator().manual_seed(0)
        found = []
        for depth in range(1, 9):
            sample, unseen = (torch.randn(rows, 32, generator=generator) for rows in (4000, 2000))
            codebook = train_codebook(sample, np.full(32, depth, np.uint8), np.ones(32), window=window)
            decoded = decode_rows(Coder(codebook, 32, "cpu")(unseen), codebook)
            found.append(round(float(np.square(decoded - unseen.numpy()).mean()), 6))
        print(json.dumps({"window": window, "distortion at 1 to 8 bits": found}), flush=True)


if __name__ == "__main__":
    main()
