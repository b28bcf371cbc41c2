"""`sources.store_settings`: what URL, options and environment say about how to reach an object."""

from __future__ import annotations

import base64
import os
from typing import TYPE_CHECKING, Any

import pytest

from aiouffd.sources.store_settings import (
    client_options,
    obstore,
    proxy_of,
    require_credentials,
    split_url,
    user_of,
)

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment without any, and a home without files."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "AZURE_", "GCE_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_urls() -> None:
    """An http URL is sent as it is; of others the key is what is behind the last slash, decoded."""
    assert split_url("https://h/a%20b?sig=x#part") == ("https://h/a%20b?sig=x", "")
    assert split_url("s3://bucket/a/b%20c") == ("s3://bucket/a", "b c")
    for url in ("s3://bucket/a/", "http://h/", "http://h"):
        with pytest.raises(ValueError, match="names no object"):
            split_url(url)


@pytest.mark.parametrize(("scheme", "prefix"), [("s3", "AWS"), ("gs", "GOOGLE"), ("az", "AZURE")])
def test_client_options_of_the_environment(scheme: str, prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the URL's cloud; what is given comes first."""
    monkeypatch.setenv(f"{prefix}_ALLOW_HTTP", "true")
    monkeypatch.setenv("OTHER_ALLOW_HTTP", "true")
    monkeypatch.setenv(f"{prefix}_CONNECT_TIMEOUT", "3s")
    assert client_options(f"{scheme}://b/k", {}) == {"allow_http": "true", "connect_timeout": "3s"}
    assert client_options(f"{scheme}://b/k", {"connect_timeout": "9s"})["connect_timeout"] == "9s"
    assert client_options("http://h/x", {}) == {"allow_http": True}
    assert client_options("https://h/x", {}) == {}


def test_the_user_of_a_url() -> None:
    """It is no part of what is asked for, but of the headers, beside those that were given."""
    url = "https://me:p%40ss@h/a?b"
    assert split_url(url) == ("https://h/a?b", "")
    headers = {"Authorization": "Basic " + base64.b64encode(b"me:p@ss").decode()}
    assert client_options(url, {}) == {"default_headers": headers}
    assert client_options(url, {"default_headers": {"X-A": "b"}}) == {"default_headers": {"X-A": "b"} | headers}
    assert user_of("s3://me@bucket/a") == ("s3://me@bucket/a", {})


_ENOUGH: list[tuple[str, dict[str, str], dict[str, Any]]] = [
    ("s3", {"AWS_ACCESS_KEY_ID": "k"}, {}),
    ("s3a", {"AWS_WEB_IDENTITY_TOKEN_FILE": "f"}, {}),
    ("s3", {"AWS_METADATA_ENDPOINT": "http://169.254.169.254"}, {}),
    ("s3", {}, {"access_key_id": "k"}),
    ("s3", {}, {"aws_access_key_id": "k"}),
    ("s3", {}, {"AWS_SKIP_SIGNATURE": True}),
    ("s3", {}, {"config": {"skip_signature": True}}),
    ("s3", {}, {"credential_provider": print}),
    ("gs", {"GOOGLE_APPLICATION_CREDENTIALS": "f"}, {}),
    ("gs", {"GCE_METADATA_HOST": "metadata.google.internal"}, {}),
    ("gs", {}, {"service_account": "f"}),
    ("az", {"AZURE_STORAGE_ACCOUNT_KEY": "k"}, {}),
    ("abfss", {"IDENTITY_ENDPOINT": "http://localhost"}, {}),
    ("az", {}, {"skip_signature": True}),
    ("https", {}, {}),
]


@pytest.mark.parametrize(("scheme", "environment", "options"), _ENOUGH)
def test_credentials(
    scheme: str, environment: dict[str, str], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the environment or the options; a metadata service is asked if a setting says so."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    require_credentials(f"{scheme}://bucket/key", options)


@pytest.mark.parametrize("scheme", ["s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl"])
def test_no_credentials(scheme: str) -> None:
    """The text says what to set; settings of another kind are none."""
    with pytest.raises(ValueError, match=r"no credentials: set (AWS|GOOGLE|AZURE)_"):
        require_credentials(f"{scheme}://bucket/key", {"region": "x", "config": {"endpoint": "y"}})


def test_the_file_of_gcloud(tmp_path: Path) -> None:
    """`gcloud auth application-default login` writes it."""
    path = tmp_path / ".config/gcloud/application_default_credentials.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    require_credentials("gs://bucket/key", {})


def test_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """By scheme and host, as the environment says, or as given; without the password."""
    assert proxy_of("http://h/x", {}) is None
    monkeypatch.setenv("http_proxy", "http://me:secret@p:1")
    monkeypatch.setenv("no_proxy", "inner")
    assert proxy_of("http://h/x", {}) == "http://p:1"
    assert proxy_of("http://inner/x", {}) is None
    assert proxy_of("https://h/x", {}) is None
    assert proxy_of("https://h/x", {"proxy_url": "http://q:2"}) == "http://q:2"
    monkeypatch.setenv("all_proxy", "http://r:3")
    assert proxy_of("https://h/x", {}) == "http://r:3"
    assert proxy_of("s3://bucket/x", {}) == "http://r:3"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://inner:9000")
    assert proxy_of("s3://bucket/x", {}) is None


def test_the_library() -> None:
    """It is imported when it is needed."""
    assert obstore().store is not None
