"""No credential gets into a message: every shape in which store libraries and servers quote them."""

from __future__ import annotations

import pytest

from kdcache.share.stores.store_client import redact

SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
TEXTS = [
    f"https://user:{SECRET}@host/path",
    f"Error performing GET https://acc.blob.core.windows.net/c/k?sv=2024-11-04&se=2027&sr=c&sp=rl&sig={SECRET}: "
    "refused",
    f"https://b.s3.amazonaws.com/k?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=x%2F20260101&X-Amz-Signature={SECRET}",
    f"<Error><AWSAccessKeyId>{SECRET}</AWSAccessKeyId><StringToSign>AWS4-HMAC-SHA256\n2026\n{SECRET}</StringToSign></Error>",
    f"<SignatureProvided>{SECRET}</SignatureProvided>",
    f'{{"secret_access_key": "{SECRET}", "session_token": "{SECRET}", "AccountKey": "{SECRET}"}}',
    f"authorization: Bearer {SECRET}",
    f"Authorization: AWS4-HMAC-SHA256 Credential={SECRET}/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, "
    f"Signature={SECRET}",
    f"aws_secret_access_key = {SECRET}",
    f"DefaultEndpointsProtocol=https;AccountName=x;AccountKey={SECRET};EndpointSuffix=core.windows.net",
    f"SharedKey account:{SECRET}",
    f"password={SECRET} and more",
]


@pytest.mark.parametrize("text", TEXTS)
def test_secrets_are_taken_out(text: str) -> None:
    assert SECRET not in redact(text, {})
    assert SECRET[:12] not in redact(text, {})


def test_access_key_ids_are_taken_out() -> None:
    assert redact("the key AKIAIOSFODNN7EXAMPLE is unknown", {}) == "the key *** is unknown"


@pytest.mark.parametrize(
    "name",
    [
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "AWS_SESSION_TOKEN",
        "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_SAS_TOKEN",
        "AZURE_CLIENT_SECRET",
        "GOOGLE_SERVICE_ACCOUNT_KEY",
        "GOOGLE_BEARER_TOKEN",
    ],
)
def test_values_of_the_environment_are_taken_out_wherever_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert SECRET not in redact(f"gibberish({SECRET})", {name: SECRET})
    monkeypatch.setenv(name, SECRET)
    assert SECRET not in redact(f"gibberish({SECRET})")


@pytest.mark.parametrize(
    "text",
    [
        "s3://team-bucket/kdcache",
        "cannot read 'refs/sst2/3.json' on s3://team/kd at http://127.0.0.1:8333: status 500, InternalError",
        "/mnt/team/caches",
        "https://acc.blob.core.windows.net/container/prefix",
        "tokens/part-00000.arrow has 12 bytes",
        "nothing to hide",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text, {"AWS_REGION": "us-east-1", "AWS_PROFILE": "team", "HOME": "/root"}) == text
