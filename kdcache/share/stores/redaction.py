"""Texts that may hold credentials, made fit for messages: errors of a store library quote URLs, headers and answers of
the server.

What is taken out: user and password of a URL, its whole query (signatures travel there), values that are named like
secrets, authorization headers, access key ids, and the values of the secrets in this process's own environment wherever
they turn up.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

HIDDEN = "***"
_SECRET_NAMES = r"(?:[\w-]*(?:secret|password|passwd|token|signature|credential|authorization|access[_-]?key|account[_-]?key|sas[_-]?key|api[_-]?key)[\w-]*|sig|sas)"
_ENVIRONMENT = re.compile(
    r"^(AWS|AZURE|AZURITE|GOOGLE|GCS|GCLOUD)_.*(KEY|SECRET|TOKEN|PASSWORD|SAS|CREDENTIALS?)(_|$)|^(AWS|AZURE).*KEY_ID$"
)
_RULES = (
    (re.compile(r"(?<=://)[^\s\"'<>]*@"), f"{HIDDEN}@"),
    (re.compile(r"(\w+://[^\s\"'<>?]*)\?[^\s\"'<>)]*"), rf"\1?{HIDDEN}"),
    (re.compile(r"(?i)<([\w]*(?:AccessKeyId|StringToSign|Signature|CanonicalRequest|Token)[\w]*)>.*?</\1>", re.S), rf"<\1>{HIDDEN}</\1>"),
    (re.compile(r"(?i)\b(bearer|basic|sharedkey|sharedaccesssignature)\s+[\w.~+/=:%&-]+"), rf"\1 {HIDDEN}"),
    (re.compile(r"AWS4-HMAC-SHA256[^\n\"]*"), f"AWS4-HMAC-SHA256 {HIDDEN}"),
    (re.compile(rf"(?i)([\"']?\b{_SECRET_NAMES}[\"']?\s*[=:]\s*)(?:\"[^\"]*\"|'[^']*'|[^\s,;&)}}<]+)"), rf"\1{HIDDEN}"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b"), HIDDEN),
)  # fmt: skip


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """``text`` without credentials.

    ``environment`` (by default that of this process) names secrets that are taken out literally.
    """
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
