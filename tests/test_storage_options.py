"""`sources.storage_options`: wrong names are found before anybody is asked, and the names are those of obstore."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import obstore
import pytest

import aiouffd
from aiouffd import store
from aiouffd.sources.storage_options import ClientOptions, RetryOptions, StorageOptions, check_options

STUBS_ONLY = {"aws_endpoint_url_s3", "sts_endpoint"}
"""obstore 0.12 itself does not know these."""
STUBS = Path(obstore.__file__).parent / "_store"


def names_of(module: str, name: str) -> set[str]:
    """Return the keys of a TypedDict of obstore, which has them in its stubs only."""
    for node in ast.parse((STUBS / f"{module}.pyi").read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}  # type: ignore[union-attr]
    raise AssertionError(name)


def test_they_are_those_of_obstore() -> None:
    """Each of its names has a type here, and obstore knows each name that is here."""
    clouds = {"s3": ("_aws", "S3Config"), "gs": ("_gcs", "GCSConfig"), "az": ("_azure", "AzureConfig")}
    for scheme, place in clouds.items():
        check_options(f"{scheme}://bucket/key", dict.fromkeys(names_of(*place) - STUBS_ONLY))
    assert names_of("_client", "ClientConfig") == ClientOptions.__optional_keys__
    assert names_of("_retry", "RetryConfig") == RetryOptions.__optional_keys__
    for name in StorageOptions.__optional_keys__ - {"client_options", "config", "credential_provider", "retry_config"}:
        known = 0
        for scheme in clouds:
            try:
                check_options(f"{scheme}://bucket/key", {name: ""})
                obstore.store.from_url(f"{scheme}://bucket", config={name: ""})  # type: ignore[call-overload]
            except (TypeError, obstore.exceptions.UnknownConfigurationKeyError):
                continue
            except Exception:  # noqa: BLE001 - it knows the name; the value is no good
                pass
            known += 1
        assert known, name


@pytest.mark.parametrize(
    ("what", "options", "said"),
    [
        ("s3://bucket/key", {"regoin": "x"}, "the store behind s3:// got .* 'regoin'; the nearest .* is 'region'"),
        ("az://bucket/key", {"acount_name": "x"}, "'acount_name'; the nearest .* 'account_name'"),
        ("gs://bucket/key", {"region": "x"}, "the store behind gs:// got .* 'region'"),
        ("https://host/x", {"client_options": {"tiemout": "3s"}}, "client_options got .* 'tiemout'; .* 'timeout'"),
        (
            "https://host/x",
            {"headers": {}},
            "'headers' is no option.*'client_options': {'default_headers': ...}} is one",
        ),
        ("http://host/x", {"region": "x"}, "http:// got .* 'region'; it takes client_options, config, "),
        ("s3://bucket/key", {"read_timeout": 5}, "'read_timeout' is no option.*{'read_timeout'"),
        ("a path", {"endpiont": "x"}, "a store got .* 'endpiont'; .* 'endpoint'"),
        (b"bytes", {"endpiont": "x"}, "a store got .* 'endpiont'; .* 'endpoint'"),
    ],
)
def test_a_wrong_name_is_refused_before_anybody_is_asked(what: Any, options: Any, said: str) -> None:
    """By each function that takes options, at the call: no block is entered, no obstore is needed."""
    for function in (aiouffd.open, aiouffd.map):
        with pytest.raises(TypeError, match=said):
            function(what, storage_options=options)
    if isinstance(what, str) and "://" in what:
        with pytest.raises(TypeError, match=said):
            aiouffd.ObjectSource(what, **options)
        with pytest.raises(TypeError, match=said):
            store.verify_sync(f"{what}.snap", storage_options=options)


def test_what_passes() -> None:
    """Names with the prefix of their cloud, in any case; what goes to obstore alone; and what fsspec reads."""
    check_options("s3://bucket/key", {"AWS_REGION": "x", "aws_endpoint_url": "x", "config": {"any": 1}})
    check_options("az://bucket/key", {"AZURE_STORAGE_ACCOUNT_KEY": "x", "azure_client_id": "x"})
    check_options("hf://org/model", {"anything": 1})
    check_options("simplecache::s3://bucket/key", {"s3": {}})
    check_options("s3://bucket/key", None)
