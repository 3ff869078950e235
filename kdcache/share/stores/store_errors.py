"""What a store library says, in kdcache's words: who was asked for what, why it failed, and what cures it.

obstore gives one class for most failures and puts the rest into a long text. The status, the server's own code and the
reason of a broken connection are read out of it; the text itself goes to a note of the exception, redacted, which a
traceback shows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from kdcache.errors import RemoteAccessError, RemoteError
from kdcache.share.stores.redaction import redact

_STATUS = re.compile(r"status code: (\d{3})(?: ([A-Za-z ]+))?")
_CODE = re.compile(r"<Code>([^<]{1,80})</Code>|\(code: (\w{1,80})\)|\"reason\": ?\"(\w{1,80})\"")
_SAID = re.compile(r"<Message>([^<]{1,300})</Message>")
_REASONS = (
    (re.compile(r"dns error|failed to lookup address"), "its name is not known to the name server"),
    (re.compile(r"Connection refused"), "nothing listens there (connection refused)"),
    (re.compile(r"TimedOut|timed out|deadline has elapsed"), "no answer in time"),
    (re.compile(r"certificate|UnknownIssuer|tls", re.I), "its certificate is not trusted"),
    (re.compile(r"BadScheme"), "its address is no http or https URL"),
    (re.compile(r"Network is unreachable|No route to host"), "the network does not lead there"),
    (re.compile(r"ConnectionReset|Connection reset|IncompleteMessage|connection closed|Broken pipe|IncompleteBody"), "the connection broke"),
)  # fmt: skip
_METADATA = ("169.254.169.254", "metadata.google.internal", "169.254.170.2")
_CREDENTIALS = {
    "InvalidAccessKeyId": "The key id is unknown there: check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL.",
    "SignatureDoesNotMatch": "The secret does not belong to the key id: check AWS_SECRET_ACCESS_KEY.",
    "ExpiredToken": "The credentials have run out: renew them.",
    "InvalidToken": "The session token is not valid: renew the credentials, or unset AWS_SESSION_TOKEN.",
    "RequestTimeTooSkewed": "The clock of this machine is wrong: set it.",
    "AuthenticationFailed": "Check AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY (or the SAS token).",
}
_LOGIN = {
    "s3": (
        "Export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; those of a profile: "
        'eval "$(aws configure export-credentials --format env)". A public bucket: export AWS_SKIP_SIGNATURE=true'
    ),
    "gs": "Run gcloud auth application-default login, or export GOOGLE_APPLICATION_CREDENTIALS=FILE of a service account.",
    "az": "Export AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or AZURE_USE_AZURE_CLI=true.",
}
_NAMES = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
}
_WRITES = ("write", "create", "delete")


@dataclass(frozen=True)
class Place:
    """A store, for messages; ``environment`` is what its credentials came from, None: that of this process."""

    scheme: str
    bucket: str
    url: str
    endpoint: str  # empty: the provider's own
    environment: Mapping[str, str] | None = None

    def __repr__(self) -> str:
        return f"Place({self.url!r})"

    @property
    def at(self) -> str:
        """URL, with the endpoint where it is not the provider's own."""
        return f"{self.url} at {self.endpoint}" if self.endpoint else self.url


def explain(error: BaseException, place: Place, method: str, key: str = "") -> RemoteError:
    """A RemoteError that says what failed: ``method`` (list, head, read, write, create, delete) of ``key``."""
    if isinstance(error, RemoteError):
        return error
    text = str(error)
    status, code = _status(text), _code(text)
    verb = "look for" if method == "head" else method
    what = f"cannot {verb} '{key}' on {place.at}" if key else f"cannot {verb} {place.at}"
    if any(address in text for address in _METADATA):
        made: RemoteError = RemoteAccessError(f"{what}: no credentials found", _LOGIN[place.scheme])
    elif code in ("NoSuchBucket", "ContainerNotFound") or "bucket does not exist" in text:
        made = RemoteError(
            f"{what}: there is no bucket '{place.bucket}'", "Check the name in KDCACHE_REMOTE, or have the bucket made."
        )
    elif _denied(error, status, code):
        made = _access(what, place, method, code)
    elif code in ("PermanentRedirect", "AuthorizationHeaderMalformed") or status in (301, 307):
        made = RemoteError(
            f"{what}: the bucket lies in another region", "Export AWS_REGION with the region of the bucket."
        )
    elif reason := _reason(text):
        made = RemoteError(
            f"{what}: {reason}",
            "Check the address and the network, then run the same command again." if not place.endpoint
            else "Check the endpoint (AWS_ENDPOINT_URL) and that its server runs, then run the same command again.",
        )  # fmt: skip
    else:
        made = RemoteError(f"{what}: {_summary(text, status, code, place)}", "Run the same command again.")
    made.add_note(redact(text, place.environment))
    return made


def is_lost(error: BaseException) -> bool:
    """Whether a request may have been done although it failed here: no answer came, or one that says nothing of it."""
    status = _status(str(error))
    return status is None or status >= 500 or status in (408, 409, 429)


def out_of_range(error: BaseException) -> bool:
    """Whether a read began behind the end of the object."""
    return _status(str(error)) == 416 or "InvalidRange" in str(error) or "is larger than" in str(error)


def is_whole(error: BaseException) -> bool:
    """Whether a range was asked for and the whole object came."""
    return "non-partial response" in str(error)


def _access(what: str, place: Place, method: str, code: str) -> RemoteAccessError:
    if code in _CREDENTIALS:
        return RemoteAccessError(f"{what}: the credentials are not accepted ({code})", _CREDENTIALS[code])
    if method in _WRITES:
        return RemoteAccessError(
            f"{what}: the credentials do not allow it",
            "They may be read-only: pull works with them, push needs leave to write.",
        )
    return RemoteAccessError(
        f"{what}: the credentials do not allow it", f"Check {_NAMES[place.scheme]}, or ask for leave to read and list."
    )


def _denied(error: BaseException, status: int | None, code: str) -> bool:
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    refused = code in ("AccessDenied", "Forbidden") or code in _CREDENTIALS
    return isinstance(error, PermissionDeniedError | UnauthenticatedError) or status in (401, 403) or refused


def _status(text: str) -> int | None:
    found = _STATUS.search(text)
    return int(found.group(1)) if found else None


def _code(text: str) -> str:
    found = _CODE.search(text)
    return next((group for group in found.groups() if group), "") if found else ""


def _reason(text: str) -> str:
    if _status(text) is not None:
        return ""
    return next((words for pattern, words in _REASONS if pattern.search(text)), "")


def _summary(text: str, status: int | None, code: str, place: Place) -> str:
    """The server's own words where it said something, else the first line of the library's."""
    if status is not None:
        said = _SAID.search(text)
        words = [f"status {status}", *([code] if code else []), *([said.group(1)] if said else [])]
        return redact(", ".join(words), place.environment)
    line = text.split("\n", 1)[0]
    return redact(line, place.environment)[:300]
