"""Renders one chat template, in a process of its own: JSON request on standard input, JSON answer on standard output.

A template comes with a model, from anyone. Jinja's sandbox keeps it from reaching anything, but not from looping or
from building strings without end; a process can be limited and killed (`reference_engine.chat_template` does). It runs
as a script, so it imports nothing of ours.

The environment is that of transformers (utils/chat_template_utils.py), which templates are written for.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

TEMPLATE_NAME = "<template>"  # the file name that jinja gives a template from a string


class Generation(Extension):
    """``{% generation %}`` marks the assistant's text for training; here it is a scope and nothing else."""

    tags = {"generation"}  # noqa: RUF012 -- jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        """The body of the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class PublicNamespace(Namespace):
    """A namespace without names that begin with an underscore, which Python itself may look up."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *rest = args
        values = dict(*rest, **values)
        for name in values:
            _require_public(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)


def environment() -> ImmutableSandboxedEnvironment:
    """The jinja2 environment for chat templates."""
    result = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    result.filters["tojson"] = _to_json
    result.globals |= {
        "dict": _new_dict,
        "namespace": PublicNamespace,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    return result


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Render a template.

    Parameters
    ----------
    request : ``source``; ``variables``, by name; ``max_chars`` of output.

    Returns
    -------
    dict
        ``text``, or ``error`` with ``line`` (from 1, None where unknown).
    """
    try:
        parts, n_chars = [], 0
        for part in environment().from_string(request["source"]).generate(**request["variables"]):
            n_chars += len(part)
            if n_chars > request["max_chars"]:
                return {"error": f"gives more than {request['max_chars']} characters", "line": None}
            parts.append(part)
        return {"text": "".join(parts)}
    except jinja2.TemplateSyntaxError as error:
        return {"error": error.message, "line": error.lineno}
    except MemoryError:
        return {"error": "takes too much memory", "line": None}
    except RecursionError:
        return {"error": "is nested too deeply", "line": None}
    except Exception as error:  # noqa: BLE001 -- a template can raise whatever Python's operators can
        message = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
        return {"error": message, "line": _line_in_template(error)}


def main() -> None:
    """Answer the one request on standard input."""
    request = json.load(sys.stdin)
    with contextlib.suppress(OSError, ValueError):  # macOS does not limit address space
        resource.setrlimit(resource.RLIMIT_AS, (request["max_bytes"], request["max_bytes"]))
    json.dump(answer(request), sys.stdout)


def _line_in_template(error: BaseException) -> int | None:
    line, place = None, error.__traceback__
    while place is not None:
        if place.tb_frame.f_code.co_filename == TEMPLATE_NAME:
            line = place.tb_lineno
        place = place.tb_next
    return line


def _require_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.TemplateError(f"a namespace cannot hold {name!r}: it begins with an underscore")


def _new_dict(*args: Any, **values: Any) -> dict[Any, Any]:
    return dict(*args, **values)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes for HTML that jinja2's own filter adds."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


if __name__ == "__main__":
    main()
