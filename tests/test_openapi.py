"""`server.control.openapi`: the description is valid, and says what the server does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator, validate

from aiouffd.server.control.actions import ACTIONS
from aiouffd.server.control.openapi import document
from aiouffd.server.control.values import NewSession, decode


@pytest.fixture(scope="module")
def described() -> Any:
    """Return the document as a client gets it."""
    return msgspec.json.decode(msgspec.json.encode(document("1.2")))


def test_it_is_valid(described: Any) -> None:
    """By a validator; and each action is in it, with what comes and goes."""
    validate(described, cls=OpenAPIV31SpecValidator)
    operations = {
        operation["operationId"]: (method, path)
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    }
    assert operations.pop("events") == ("get", "/v1/events")
    assert operations == {action.name: (action.method.lower(), action.path) for action in ACTIONS}
    create = described["paths"]["/v1/sessions"]["post"]
    assert set(create["responses"]) == {"201", "default"}
    assert create["requestBody"]["required"]


def test_it_is_in_the_reference(described: Any) -> None:
    """Each request with what comes and goes, and each field of a new session with its default."""
    page = (Path(__file__).parent.parent / "docs" / "reference" / "control.md").read_text()
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            (row,) = re.findall(rf"^\| `{method.upper()} {re.escape(path)}` \|.*$", page, re.MULTILINE)
            assert operation["summary"] in row
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            assert body.get("$ref", "").rpartition("/")[2] in row
            assert f" {next(iter(operation['responses']))} " in row
    for name, field in described["components"]["schemas"]["NewSession"]["properties"].items():
        (row,) = re.findall(rf"^\| `{name}` \|(.*?)\|", page, re.MULTILINE)
        default = field.get("default")
        shown = json.loads(row.strip(" `")) if row.strip() else None
        assert shown == default, name


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"readhead": 1},
        {"name": ""},
        {"readahead": -1},
        {"source": []},
        {"background": "most"},
        {"owner": {"uid": 3, "x": 4}},
    ],
)
def test_the_schema_and_the_server_agree(described: Any, change: dict[str, Any]) -> None:
    """What the one refuses, the other does, too."""
    body = {"name": "a", "socket": "/s", "source": ["/a", "/b"], "owner": {"uid": 3}, "background": "max", **change}
    schema = {"$ref": "#/components/schemas/NewSession", "components": described["components"]}
    good = jsonschema.Draft202012Validator(schema).is_valid(body)
    try:
        decode(msgspec.json.encode(body), NewSession)
    except msgspec.ValidationError:
        assert not good
    else:
        assert good
    assert good is not bool(change)
