"""The description of the control's HTTP interface, made of the actions and of the types of what comes and goes."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from aiouffd.server.control.actions import ACTIONS, Action
from aiouffd.server.control.values import Owner, Problem
from aiouffd.server.happenings import Happening

__all__ = ["document"]

_TITLE = "aiouffd serve"
_DESCRIPTION = "Sessions of a pager for the memory of other processes. On a Unix socket that only its owner may use."


def document(version: str) -> dict[str, Any]:
    """Return it: OpenAPI 3.1; version: of the package."""
    types = [item for action in ACTIONS for item in (action.body, action.answer) if item is not None]
    unique = list(dict.fromkeys([*types, Problem, Happening]))
    schemas, components = msgspec.json.schema_components(unique, ref_template="#/components/schemas/{name}")
    for kind in (action.body for action in ACTIONS if action.body is not None):
        components[kind.__name__]["additionalProperties"] = False  # as `decode` has it
    components[Owner.__name__]["additionalProperties"] = False
    of = dict(zip(unique, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for action in ACTIONS:
        paths.setdefault(action.path, {})[action.method.lower()] = _operation(action, of)
    paths["/v1/events"] = {"get": _events(of)}
    return {
        "openapi": "3.1.0",
        "info": {"title": _TITLE, "description": _DESCRIPTION, "version": version, "license": {"name": "MIT"}},
        "servers": [{"url": "http://localhost"}],
        "paths": paths,
        "components": {"schemas": components},
    }


def _operation(action: Action, of: dict[Any, Any]) -> dict[str, Any]:
    done: dict[str, Any] = {"description": action.summary}
    if action.answer is not None:
        done["content"] = {"application/json": {"schema": of[action.answer]}}
    operation: dict[str, Any] = {
        "operationId": action.name,
        "summary": action.summary,
        "responses": {str(action.status): done, "default": _problem(of)},
    }
    if names := re.findall(r"{(\w+)}", action.path):
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if action.body is not None:
        content = {"application/json": {"schema": of[action.body]}}
        operation["requestBody"] = {"required": action.body_needed, "content": content}
    return operation


def _events(of: dict[Any, Any]) -> dict[str, Any]:
    summary = "Tell what happens, as server-sent events, until the connection ends."
    schema = {"type": "string", "description": "`data` of each event is JSON.", "contentSchema": of[Happening]}
    return {
        "operationId": "events",
        "summary": summary,
        "parameters": [
            {
                "name": "Last-Event-ID",
                "in": "header",
                "description": "What came behind this one is told first, as far as it is kept still.",
                "schema": {"type": "integer", "minimum": 0},
            }
        ],
        "responses": {
            "200": {"description": summary, "content": {"text/event-stream": {"schema": schema}}},
            "default": _problem(of),
        },
    }


def _problem(of: dict[Any, Any]) -> dict[str, Any]:
    return {
        "description": "It was refused, or has failed.",
        "content": {"application/problem+json": {"schema": of[Problem]}},
    }
