"""The servers that tests start end with the tests, however those end."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

CODE = """
import sys, tempfile
from kdcache.testing import s3_server
made = []
real = tempfile.mkdtemp
tempfile.mkdtemp = lambda **options: made.append(real(**options)) or made[-1]
with s3_server.run_rclone() as server:
    print(server.endpoint.rpartition(":")[2], made[-1], flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("kill", [True, False])
def test_a_server_and_its_files_go_with_the_tests(kill: bool) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        port, home = process.stdout.readline().split()
        assert Path(home).is_dir()
        socket.create_connection(("127.0.0.1", int(port)), timeout=60).close()
        if kill:
            process.kill()
        else:
            assert process.stdin is not None
            process.stdin.close()
    deadline = time.monotonic() + 120
    while (
        Path(home).exists() or listens(int(port))
    ) and time.monotonic() < deadline:  # a killed process takes a moment
        time.sleep(0.02)
    assert not Path(home).exists()
    assert not listens(int(port))


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=60).close()
    except ConnectionRefusedError:
        return False
    return True
