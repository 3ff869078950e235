"""What object stores do to a client.

Refuse it, lose its answers, answer late, be absent; and what kdcache makes of it.
"""

from __future__ import annotations

import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kdcache.errors import RemoteAccessError, RemoteError
from kdcache.share.stores import store_client
from kdcache.share.stores.object_store import ObjectStoreRemote, open_object_store
from kdcache.testing.s3_server import S3Server, User


def opened(server: S3Server, url: str | None = None, user: User | None = None) -> ObjectStoreRemote:
    remote = server.open(url, user)
    assert isinstance(remote, ObjectStoreRemote)
    return remote


def failure(call: Callable[[], object], kind: type[RemoteError] = RemoteError) -> RemoteError:
    """The error of a call; whatever it holds holds none of the keys that the tests use."""
    with pytest.raises(kind) as caught:
        call()
    assert isinstance(caught.value, kind)
    return caught.value


def calls(remote: ObjectStoreRemote) -> Iterator[Callable[[], object]]:
    yield lambda: list(remote.list("refs/"))
    yield lambda: remote.head("one")
    yield lambda: list(remote.read("one"))
    yield lambda: remote.write("one", b"x")
    yield lambda: remote.create("one", b"x")
    yield lambda: remote.delete("one")
    yield remote.now


def test_read_only_credentials_read_and_are_told_what_they_cannot(seaweedfs: S3Server) -> None:
    writer = opened(seaweedfs)
    writer.write("one", b"x")
    reader = opened(seaweedfs, writer.url, seaweedfs.reader)
    assert reader.read_bytes("one", 9) == b"x"
    assert [entry.key for entry in reader.list("")] == ["one"]
    for call in (
        lambda: reader.write("one", b"y"),
        lambda: reader.create("two", b"y"),
        lambda: reader.delete("one"),
        reader.now,
    ):
        error = failure(call, RemoteAccessError)
        assert "do not allow it" in error.message
        assert "read-only" in error.hint
    assert writer.read_bytes("one", 9) == b"x"


def test_wrong_credentials_are_named_by_their_variable(seaweedfs: S3Server) -> None:
    wrong = opened(seaweedfs, user=User(seaweedfs.writer.key, "not-the-secret"))
    unknown = opened(seaweedfs, user=User("nobody-at-all", "not-the-secret"))
    assert "AWS_SECRET_ACCESS_KEY" in failure(lambda: list(wrong.list("")), RemoteAccessError).hint
    assert "AWS_ACCESS_KEY_ID" in failure(lambda: unknown.write("one", b"x"), RemoteAccessError).hint
    for remote in (wrong, unknown):
        for call in calls(remote):
            failure(call, RemoteAccessError)


def test_a_bucket_that_is_not_there_is_named(rclone_store: S3Server) -> None:
    remote = opened(rclone_store, "s3://no-such-bucket/x")
    for call in (lambda: list(remote.list("")), lambda: list(remote.read("one")), lambda: remote.write("one", b"x")):
        assert "no bucket 'no-such-bucket'" in failure(call).message


def test_a_server_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(store_client._RETRIES, "max_retries", 1)
    keys = {
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "something",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
    }
    error = failure(lambda: open_object_store("s3://team/x", keys).head("one"))
    assert "http://127.0.0.1:9" in error.message
    assert "connection refused" in error.message
    assert "AWS_ENDPOINT_URL" in error.hint


def test_no_credential_is_in_any_message_note_or_repr(seaweedfs: S3Server) -> None:
    user = User("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI-K7MDENG-bPxRfiCYEXAMPLEKEY")
    remote = opened(seaweedfs, user=user)
    said = [repr(remote), repr(user), repr(seaweedfs), str(vars(remote))]
    for call in calls(remote):
        try:
            call()
        except RemoteError as error:
            said += [error.message, error.hint, *error.__notes__, "".join(traceback.format_exception(error))]
    assert len(said) > 20
    for text in said:
        for secret in (user.key, user.secret, seaweedfs.writer.secret):
            assert secret not in text
    endpoint = seaweedfs.endpoint.replace("://", "://me:hunter22@")
    with_password = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    error = failure(lambda: open_object_store("s3://team/x", with_password).head("one"))
    assert "hunter22" not in "".join(traceback.format_exception(error))


class Answers:
    """A store's put, with answers that get lost or mislead: one per request, None: as it is."""

    def __init__(self, remote: ObjectStoreRemote, *answers: tuple[bool, Exception] | None) -> None:
        self._real, self._answers = remote._raw_put, list(answers)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        answer = self._answers.pop(0) if self._answers else None
        if answer is None:
            return self._real(*arguments, **options)
        done, error = answer
        if done:
            self._real(*arguments, **options)
        raise error


def generic(text: str) -> Exception:
    from obstore.exceptions import GenericError

    return GenericError(text)


def exists() -> Exception:
    from obstore.exceptions import AlreadyExistsError

    return AlreadyExistsError("status code: 409 Conflict")


@pytest.mark.parametrize(
    ("answers", "outcome"),
    [
        ([(True, generic("error sending request: TimedOut"))], True),  # done, and nobody said so
        ([(True, exists())], True),  # one's own request, sent again by the client
        ([(False, exists())], True),  # a delete was under way, nothing is there: once more
        ([(False, exists()), (False, exists())], True),
        ([(False, generic("error sending request: TimedOut"))], RemoteError),  # not done
        ([(False, exists())] * 9, RemoteError),
        ([(False, generic("status code: 400 Bad Request"))], RemoteError),
    ],
)
def test_an_answer_that_was_lost_or_misleads(
    seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch, answers: list[tuple[bool, Exception]], outcome: object
) -> None:
    remote = opened(seaweedfs)
    monkeypatch.setattr(remote, "_raw_put", Answers(remote, *answers))
    if outcome is RemoteError:
        failure(lambda: remote.create("refs/x/1", b"mine"))
        assert remote.head("refs/x/1") is None
    else:
        assert remote.create("refs/x/1", b"mine") is outcome
        assert remote.read_bytes("refs/x/1", 9) == b"mine"


def test_somebody_elses_object_is_a_conflict_even_if_the_answer_was_lost(
    seaweedfs: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = opened(seaweedfs)
    assert remote.create("refs/x/1", b"theirs")
    monkeypatch.setattr(remote, "_raw_put", Answers(remote, (False, generic("error sending request: TimedOut"))))
    assert not remote.create("refs/x/1", b"mine")


def test_a_store_is_not_used_in_a_fork(rclone_store: S3Server) -> None:
    code = """
import os, sys
from kdcache.share.stores.object_store import open_object_store
from kdcache.errors import RemoteError
remote = open_object_store(sys.argv[1])
assert remote.head("one") is None
child = os.fork()
if child == 0:
    for call in (lambda: remote.head("one"), lambda: open_object_store(sys.argv[1])):
        try:
            call()
        except RemoteError as error:
            print(error.message, error.hint, flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert remote.head("one") is None
"""
    done = _run(code, rclone_store)
    assert done.stdout.count("forked") == 2
    assert done.stdout.count("'spawn'") == 2


def test_memory_does_not_grow_with_the_size_of_an_object(seaweedfs: S3Server, tmp_path: Path) -> None:
    size = 192 << 20
    with (tmp_path / "large").open("wb") as file:
        file.truncate(size)
    code = """
import resource, sys
from pathlib import Path
from kdcache.share.stores.object_store import open_object_store
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
remote = open_object_store(sys.argv[1])
remote.write("small", bytes(9 << 20))
before = peak()
remote.write("large", Path(sys.argv[2]))
assert sum(len(block) for block in remote.read("large")) == remote.head("large").size
print(peak() - before)
"""
    grown = int(_run(code, seaweedfs, str(tmp_path / "large")).stdout)
    assert grown < 96 << 20, f"{grown >> 20} MiB more for an object of {size >> 20} MiB"


def _run(code: str, server: S3Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    import os

    done = subprocess.run(
        [sys.executable, "-c", code, server.url(), *arguments],
        env=os.environ | server.environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done
