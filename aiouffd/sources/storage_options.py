"""The options of stores: their names and types, and the check that finds a wrong name before anybody is asked."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, TypedDict

from aiouffd.errors import refuse_unknown, unknown_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import timedelta

__all__ = ["ClientOptions", "RetryOptions", "StorageOptions", "check_options"]


class ClientOptions(TypedDict, total=False):
    """Options of the HTTP client; a duration is a timedelta, or a string such as `30s`."""

    allow_http: bool
    allow_invalid_certificates: bool
    connect_timeout: str | timedelta
    default_content_type: str
    default_headers: Mapping[str, str] | Mapping[str, bytes]
    http1_only: bool
    http2_keep_alive_interval: str
    http2_keep_alive_timeout: str | timedelta
    http2_keep_alive_while_idle: str
    http2_only: bool
    pool_idle_timeout: str | timedelta
    pool_max_idle_per_host: str
    proxy_ca_certificate: str
    proxy_excludes: str
    proxy_url: str
    randomize_addresses: bool
    read_timeout: str | timedelta
    root_certificate: str | bytes
    timeout: str | timedelta
    user_agent: str


class RetryOptions(TypedDict, total=False):
    """Retries by the store itself, which nobody counts; by default there are none, and the source retries."""

    backoff: Mapping[str, Any]
    max_retries: int
    retry_timeout: timedelta


class _EachStore(TypedDict, total=False):
    client_options: ClientOptions
    config: Mapping[str, Any]
    credential_provider: Callable[..., Any]
    retry_config: RetryOptions


class _SomeClouds(TypedDict, total=False):
    bucket: str
    disable_tagging: bool
    endpoint: str
    skip_signature: bool
    token: str


class _S3(TypedDict, total=False):
    access_key_id: str
    checksum_algorithm: str
    conditional_put: str
    container_authorization_token_file: str
    container_credentials_full_uri: str
    container_credentials_relative_uri: str
    copy_if_not_exists: str
    default_region: str
    disable_bulk_delete: bool
    endpoint_url: str
    endpoint_url_sts: str
    imdsv1_fallback: bool
    metadata_endpoint: str
    region: str
    request_payer: bool | str
    role_arn: str
    role_session_name: str
    s3_express: bool
    secret_access_key: str
    server_side_encryption: str
    session_token: str
    sse_bucket_key_enabled: bool
    sse_customer_key_base64: str
    sse_kms_key_id: str
    unsigned_payload: bool
    virtual_hosted_style_request: bool
    web_identity_token_file: str


class _Google(TypedDict, total=False):
    application_credentials: str
    base_url: str
    bearer_token: str
    service_account: str
    service_account_key: str
    service_account_path: str


class _Azure(TypedDict, total=False):
    access_key: str
    account_key: str
    account_name: str
    authority_host: str
    client_id: str
    client_secret: str
    container_name: str
    credential_type: str
    encryption_key: str
    fabric_cluster_identifier: str
    fabric_session_token: str
    fabric_token_service_url: str
    fabric_workload_host: str
    federated_token_file: str
    msi_endpoint: str
    msi_resource_id: str
    object_id: str
    sas_key: str
    sas_token: str
    tenant_id: str
    use_azure_cli: bool
    use_emulator: bool
    use_fabric_endpoint: bool


class StorageOptions(_EachStore, _SomeClouds, _S3, _Google, _Azure, total=False):
    """Credentials, endpoint, region and the like: what `obstore.store.from_url` takes.

    Each cloud has its names, which also pass with its prefix, in any case: `region`, `aws_region`, `AWS_REGION`. What
    has no name here goes into `config`, which obstore alone checks.
    """


_CLOUDS: Final = {
    **dict.fromkeys(("s3", "s3a"), _S3.__optional_keys__),
    "gs": _Google.__optional_keys__,
    **dict.fromkeys(("az", "azure", "abfs", "abfss", "adl"), _Azure.__optional_keys__),
}
_OTHERS: Final = ("http", "https", "file")
_PREFIX: Final = re.compile(r"^(aws|google|azure)_(storage_)?")


def check_options(what: object, options: Mapping[str, Any] | None) -> None:
    """Refuse an option that no store of this kind has; no store is asked.

    Args:
        what: as for `aiouffd.open`. Options of a URL that fsspec reads are the affair of its filesystem.
        options: what `storage_options` was given.

    Raises:
        TypeError: a name is unknown; the text has the nearest one.
    """
    scheme, separator, rest = what.partition("://") if isinstance(what, str) and "://" in what else ("", "", "")
    if not options or (separator and (scheme not in (*_CLOUDS, *_OTHERS) or "::" in rest)):
        return
    known = _EachStore.__optional_keys__
    if scheme not in _OTHERS:
        known |= _SomeClouds.__optional_keys__ | _CLOUDS.get(scheme, StorageOptions.__optional_keys__)
    of_client = sorted(ClientOptions.__optional_keys__, key=len)
    for name in options:
        if name not in known and (meant := [own for own in of_client if f"_{own}".endswith(f"_{name}")]):
            raise TypeError(f"{name!r} is no option of a store; {{'client_options': {{{meant[0]!r}: ...}}}} is one")
        if _PREFIX.sub("", name.lower()) not in known:
            raise unknown_name(f"the store behind {scheme}://" if scheme else "a store", name, known)
    refuse_unknown("client_options", options.get("client_options", ()), ClientOptions.__optional_keys__)
