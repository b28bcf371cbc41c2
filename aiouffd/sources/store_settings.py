"""How to reach an object: what its URL, the options and the environment say."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urldefrag, urlsplit, urlunsplit
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined,unused-ignore]

from aiouffd.errors import SourceError
from aiouffd.sources.store_errors import hide_secrets

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["client_options", "obstore", "proxy_of", "require_credentials", "split_url", "user_of"]

_PREFIXES = {
    **dict.fromkeys(("s3", "s3a"), "AWS"),
    "gs": "GOOGLE",
    **dict.fromkeys(("az", "azure", "abfs", "abfss", "adl"), "AZURE"),
}
_CLIENT_OPTIONS = (
    *("allow_http", "allow_invalid_certificates", "connect_timeout", "http1_only", "http2_only", "pool_idle_timeout"),
    *("pool_max_idle_per_host", "proxy_ca_certificate", "proxy_excludes", "proxy_url", "read_timeout", "timeout"),
    "user_agent",
)
_CREDENTIALS = {
    "AWS": (
        *("ACCESS_KEY_ID", "WEB_IDENTITY_TOKEN_FILE", "CONTAINER_CREDENTIALS_RELATIVE_URI"),
        *("CONTAINER_CREDENTIALS_FULL_URI", "SKIP_SIGNATURE", "METADATA_ENDPOINT"),
    ),
    "GOOGLE": (
        *("SERVICE_ACCOUNT", "SERVICE_ACCOUNT_PATH", "SERVICE_ACCOUNT_KEY", "APPLICATION_CREDENTIALS"),
        "SKIP_SIGNATURE",
    ),
    "AZURE": (
        *("STORAGE_ACCOUNT_KEY", "STORAGE_ACCESS_KEY", "STORAGE_MASTER_KEY", "STORAGE_SAS_KEY", "STORAGE_SAS_TOKEN"),
        *("STORAGE_TOKEN", "CLIENT_ID", "STORAGE_CLIENT_ID", "USE_AZURE_CLI", "SKIP_SIGNATURE", "MSI_ENDPOINT"),
    ),
}
"""The settings of each cloud that give credentials, or say where to ask for them."""
_ADVICE = {
    "AWS": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; AWS_SKIP_SIGNATURE=true reads a public bucket;"
    " AWS_METADATA_ENDPOINT=http://169.254.169.254 asks EC2 for the role of this instance",
    "GOOGLE": "set GOOGLE_APPLICATION_CREDENTIALS; GOOGLE_SKIP_SIGNATURE=true reads a public bucket;"
    " GCE_METADATA_HOST=metadata.google.internal asks Compute Engine for the account of this instance",
    "AZURE": "set AZURE_STORAGE_ACCOUNT_KEY; AZURE_SKIP_SIGNATURE=true reads a public container;"
    " AZURE_MSI_ENDPOINT=http://169.254.169.254/metadata/identity/oauth2/token asks for the identity of this machine",
}
_OTHER_VARIABLES = {
    "AWS": (),
    "GOOGLE": ("GCE_METADATA_HOST", "GCE_METADATA_ROOT", "GCE_METADATA_IP"),
    "AZURE": ("IDENTITY_ENDPOINT",),
}
_GCLOUD = ".config/gcloud/application_default_credentials.json"


def obstore() -> Any:
    """Import obstore, which only the extra `http` installs."""
    try:
        import obstore  # noqa: PLC0415 - an extra
        import obstore.store  # noqa: PLC0415
    except ImportError as error:
        raise SourceError(
            "ObjectSource", 0, 0, "needs the library obstore: install it with `pip install 'aiouffd[http]'`"
        ) from error
    return obstore


def user_of(url: str) -> tuple[str, dict[str, str]]:
    """Return a URL of http(s) without its user and password, and the headers that send them; obstore sends none."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    if not at or parts.scheme not in ("http", "https"):
        return url, {}
    headers = {"Authorization": "Basic " + base64.b64encode(unquote(user).encode()).decode()}
    return urlunsplit((parts.scheme, host, parts.path, parts.query, parts.fragment)), headers


def split_url(url: str) -> tuple[str, str]:
    """Return (URL of the store, key of the object in it).

    Raises:
        ValueError: the URL names no object.
    """
    parts = urlsplit(url)
    base, _, key = parts.path.rpartition("/")
    if not key:
        raise ValueError("the URL names no object, only where objects are: add the name of one")
    if parts.scheme in ("http", "https"):
        # A store of one object, so that the URL is sent as it was given: a signed one has a query.
        return urldefrag(user_of(url)[0]).url, ""
    return urlunsplit((parts.scheme, parts.netloc, base, "", "")), unquote(key)  # the store encodes the key again


def client_options(url: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the HTTP client: those that were given, then those of the environment.

    obstore ignores the environment's (AWS_ALLOW_HTTP, for example) as soon as it is given any.
    """
    scheme = urlsplit(url).scheme
    prefix = _PREFIXES.get(scheme)
    found: dict[str, Any] = {"allow_http": True} if scheme == "http" else {}
    for name in _CLIENT_OPTIONS if prefix is not None else ():
        value = os.environ.get(f"{prefix}_{name.upper()}")
        if value is not None:
            found[name] = value
    found |= given
    _, user = user_of(url)
    if user:
        found["default_headers"] = {**given.get("default_headers", {}), **user}
    return found


def require_credentials(url: str, options: Mapping[str, Any]) -> None:
    """Check that there is something to sign requests with, before obstore asks the metadata service of the cloud.

    That service answers only on the cloud's own machines; elsewhere the request for it takes seconds and fails with an
    error that nobody understands. So it is asked only if a setting says so.

    Raises:
        ValueError: there are no credentials; the text says what to set.
    """
    prefix = _PREFIXES.get(urlsplit(url).scheme)
    if prefix is None or "credential_provider" in options:
        return
    given = {name.upper() for name in (*options, *options.get("config", {}))}
    names = {f"{prefix}_{name}" for name in _CREDENTIALS[prefix]}
    if given & names or {f"{prefix}_{name}" for name in given} & names:
        return
    if any(name in os.environ for name in (*names, *_OTHER_VARIABLES[prefix])):
        return
    if prefix == "GOOGLE" and Path.home().joinpath(_GCLOUD).exists():
        return
    raise ValueError(f"there are no credentials: {_ADVICE[prefix]}")


def proxy_of(url: str, options: Mapping[str, Any]) -> str | None:
    """Return the proxy that requests for a URL go through, without its password; None: they go to the server."""
    found = options.get("proxy_url")
    parts = urlsplit(url)
    if found is None and parts.hostname is not None:
        # A bucket has no host of its own here; its endpoint is reached by https unless it is set.
        scheme = parts.scheme if parts.scheme in ("http", "https") else "https"
        endpoint = urlsplit(os.environ.get("AWS_ENDPOINT_URL", ""))
        host = parts.hostname if parts.scheme in ("http", "https") else endpoint.hostname or ""
        proxies = getproxies_environment()
        if not proxy_bypass_environment(host):
            found = proxies.get(scheme) or proxies.get("all")
    return None if not found else hide_secrets(str(found))
