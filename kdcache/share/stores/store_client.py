"""The obstore client of an object store: opened from the environment, with errors that a person can act on.

**Opening.** Credentials and endpoint come from the variables that the tools of the providers use. The client has
time-outs and retries. It refuses to work after a fork, where obstore's threads do not exist and a call would hang.

**Errors.** obstore raises one class for most failures and puts the details into a long text. The HTTP status, the
server's own code and the reason of a broken connection are parsed from that text. So the message names the request, the
server, the reason and the cure. The text itself becomes a note of the exception, which a traceback shows.

**Redaction.** Errors of a store library quote URLs, headers and answers of the server, which may hold credentials. So
every text passes ``redact``. It removes user and password of a URL, its query (which may hold a signature), values
named like secrets, authorization headers, access key ids, and the values of the secrets in this process's environment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from kdcache.errors import RecipeError, RemoteAccessError, RemoteError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

HIDDEN = "***"
_SECRET_NAMES = (
    r"(?:[\w-]*(?:secret|password|passwd|token|signature|credential|authorization|access[_-]?key|account[_-]?key|"
    r"sas[_-]?key|api[_-]?key)[\w-]*|sig|sas)"
)
_ENVIRONMENT = re.compile(
    r"^(AWS|AZURE|AZURITE|GOOGLE|GCS|GCLOUD)_.*(KEY|SECRET|TOKEN|PASSWORD|SAS|CREDENTIALS?)(_|$)|^(AWS|AZURE).*KEY_ID$"
)
_RULES = (
    (re.compile(r"(?<=://)[^\s\"'<>]*@"), f"{HIDDEN}@"),
    (re.compile(r"(\w+://[^\s\"'<>?]*)\?[^\s\"'<>)]*"), rf"\1?{HIDDEN}"),
    (
        re.compile(r"(?i)<([\w]*(?:AccessKeyId|StringToSign|Signature|CanonicalRequest|Token)[\w]*)>.*?</\1>", re.S),
        rf"<\1>{HIDDEN}</\1>",
    ),
    (re.compile(r"(?i)\b(bearer|basic|sharedkey|sharedaccesssignature)\s+[\w.~+/=:%&-]+"), rf"\1 {HIDDEN}"),
    (re.compile(r"AWS4-HMAC-SHA256[^\n\"]*"), f"AWS4-HMAC-SHA256 {HIDDEN}"),
    (re.compile(rf"(?i)([\"']?\b{_SECRET_NAMES}[\"']?\s*[=:]\s*)(?:\"[^\"]*\"|'[^']*'|[^\s,;&)}}<]+)"), rf"\1{HIDDEN}"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b"), HIDDEN),
)  # fmt: skip


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """``text`` without credentials; values of secrets in ``environment`` (default: this process's) are replaced too."""
    values = {
        value
        for name, value in (os.environ if environment is None else environment).items()
        if len(value) >= 6 and _ENVIRONMENT.search(name.upper())
    }
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text


@dataclass(frozen=True)
class Place:
    """A store, for messages; ``environment``: the variables of its credentials, None for this process's."""

    scheme: str
    bucket: str
    url: str
    endpoint: str  # empty: the provider's own
    environment: Mapping[str, str] | None = None

    def __repr__(self) -> str:
        return f"Place({self.url!r})"

    @property
    def at(self) -> str:
        """The URL, with the endpoint unless it is the provider's."""
        return f"{self.url} at {self.endpoint}" if self.endpoint else self.url


_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
_RETRIES: Any = {  # about ten seconds in all if nothing answers
    "max_retries": 10,
    "backoff": {"init_backoff": timedelta(milliseconds=300), "max_backoff": timedelta(seconds=10), "base": 2},
    "retry_timeout": timedelta(minutes=3),
}
_runtime: list[int] = []  # the process in which obstore's threads run


def open_store(url: str, environment: Mapping[str, str] | None = None) -> tuple[ObjectStore, Place]:
    """A client for an s3://, gs:// or az:// URL. Raises RecipeError if variables and URL do not fit together."""
    obstore()
    from obstore.store import AzureStore, GCSStore, S3Store

    scheme, _, rest = url.partition("://")
    bucket, _, prefix = rest.strip("/").partition("/")
    settings = os.environ if environment is None else environment
    endpoint = next((settings[name] for name in _ENDPOINTS[scheme] if settings.get(name)), "")
    shown = redact(f"{scheme}://{bucket}{'/' if prefix else ''}{prefix}", {})
    place = Place(scheme, bucket, shown, endpoint=redact(endpoint, settings), environment=environment)
    kind: Any = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[scheme]
    given = {"config": {name.lower(): value for name, value in environment.items()}} if environment is not None else {}
    try:
        return kind(
            bucket, prefix=prefix or None, client_options=_client(endpoint), retry_config=_RETRIES, **given
        ), place
    except Exception as error:
        message = redact(str(error).split("\n", 1)[0], settings)
        raise RecipeError(
            f"cannot open {place.at}: {message}", "Check the variables that name the account, its key and the endpoint."
        ) from None


def obstore() -> Any:
    """The module obstore. Raises RemoteError in a fork of the process that first used it: calls would hang."""
    if _runtime and _runtime[0] != os.getpid():
        raise RemoteError(
            "an object store was opened before this process was forked; object stores do not work after a fork",
            "Start worker processes with the method 'spawn', and open the remote in them.",
        )
    _runtime[:] = [os.getpid()]
    import obstore as library

    return library


def _client(endpoint: str) -> Any:
    """A stalled connection ends after two minutes, an active one after an hour: slow lines exist."""
    return {
        "allow_http": endpoint.startswith("http://"),
        "connect_timeout": timedelta(seconds=5),
        "read_timeout": timedelta(minutes=2),
        "timeout": timedelta(hours=1),
    }


_STATUS = re.compile(r"status code: (\d{3})(?: ([A-Za-z ]+))?")
_CODE = re.compile(r"<Code>([^<]{1,80})</Code>|\(code: (\w{1,80})\)|\"reason\": ?\"(\w{1,80})\"")
_MESSAGE = re.compile(r"<Message>([^<]{1,300})</Message>")
_REASONS = (
    (re.compile(r"dns error|failed to lookup address"), "its name is not known to the name server"),
    (re.compile(r"Connection refused"), "no server listens there (connection refused)"),
    (re.compile(r"TimedOut|timed out|deadline has elapsed"), "no answer in time"),
    (re.compile(r"certificate|UnknownIssuer|tls", re.I), "its certificate is not trusted"),
    (re.compile(r"BadScheme"), "its address is no http or https URL"),
    (re.compile(r"Network is unreachable|No route to host"), "there is no route to its network"),
    (
        re.compile(r"ConnectionReset|Connection reset|IncompleteMessage|connection closed|Broken pipe|IncompleteBody"),
        "the connection broke",
    ),
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
    "gs": (
        "Run gcloud auth application-default login, or export GOOGLE_APPLICATION_CREDENTIALS=FILE of a service account."
    ),
    "az": (
        "Export AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, "
        "or AZURE_USE_AZURE_CLI=true."
    ),
}
_NAMES = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
}
_WRITES = ("write", "create", "delete")


def explain(error: BaseException, place: Place, method: str, key: str = "") -> RemoteError:
    """The RemoteError for a failed ``method`` (list, head, read, write, create, delete) of ``key``."""
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
            f"{what}: the bucket is in another region", "Export AWS_REGION with the region of the bucket."
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
    """Whether a failed request may have succeeded on the server: no answer came, or an inconclusive one."""
    status = _status(str(error))
    return status is None or status >= 500 or status in (408, 409, 429)


def out_of_range(error: BaseException) -> bool:
    """Whether a read began beyond the end of the object."""
    return _status(str(error)) == 416 or "InvalidRange" in str(error) or "is larger than" in str(error)


def is_whole(error: BaseException) -> bool:
    """Whether the server answered a range request with the whole object."""
    return "non-partial response" in str(error)


def _access(what: str, place: Place, method: str, code: str) -> RemoteAccessError:
    if code in _CREDENTIALS:
        return RemoteAccessError(f"{what}: the credentials are not accepted ({code})", _CREDENTIALS[code])
    if method in _WRITES:
        return RemoteAccessError(
            f"{what}: the credentials do not allow it",
            "They may be read-only: pull works with them, push needs write access.",
        )
    return RemoteAccessError(
        f"{what}: the credentials do not allow it",
        f"Check {_NAMES[place.scheme]}, or ask for permission to read and list.",
    )


def _denied(error: BaseException, status: int | None, code: str) -> bool:
    from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

    refused = code in ("AccessDenied", "Forbidden") or code in _CREDENTIALS
    return isinstance(error, PermissionDeniedError | UnauthenticatedError) or status in (401, 403) or refused


def _status(text: str) -> int | None:
    match = _STATUS.search(text)
    return int(match.group(1)) if match else None


def _code(text: str) -> str:
    match = _CODE.search(text)
    return next((group for group in match.groups() if group), "") if match else ""


def _reason(text: str) -> str:
    if _status(text) is not None:
        return ""
    return next((words for pattern, words in _REASONS if pattern.search(text)), "")


def _summary(text: str, status: int | None, code: str, place: Place) -> str:
    """The server's message if it sent one, else the first line of the library's."""
    if status is not None:
        message = _MESSAGE.search(text)
        words = [f"status {status}", *([code] if code else []), *([message.group(1)] if message else [])]
        return redact(", ".join(words), place.environment)
    line = text.split("\n", 1)[0]
    return redact(line, place.environment)[:300]
