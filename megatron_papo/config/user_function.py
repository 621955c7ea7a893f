"""Functions of the user's own, which a setting names as `module:function`: a reward, a mask, a metric and the like.

The name is looked up here, and whether the function takes the arguments that it will be given. What each function
receives and returns is said by the setting that names it.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def load_user_function(
    key: str, name: str, *forms: Sequence[str], options: Mapping[str, Any] | None = None
) -> tuple[Callable[..., Any], Sequence[str]]:
    """The function that setting `key` names, modules of the working directory included, and which of `forms` it takes.

    A form is the names of positional arguments; the first that the function's signature accepts, with `options` as
    arguments by keyword, counts. Raises ValueError naming `key`: for a name of another form, what cannot be imported,
    and a function that takes none of `forms`.
    """
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise ValueError(f"{key}: {name!r} is not written module:function")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # an installed command does not look there by itself
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # the user's module runs as it is imported, and may raise anything
        raise ValueError(f"{key}: cannot import {name}: {error}") from error
    if not callable(function):
        raise ValueError(f"{key}: {name} is no function")
    faults = [_fault(function, form, options or {}) for form in forms]
    for form, fault in zip(forms, faults, strict=True):
        if fault is None:
            return function, form
    raise ValueError(f"{key}: {name} does not take {' or '.join(map(_listed, forms))}: {faults[0]}")


def name_of_function(function: Callable[..., Any]) -> str:
    """The function as a setting would name it, for messages."""
    return f"{function.__module__}:{getattr(function, '__qualname__', type(function).__name__)}"


def _fault(function: Callable[..., Any], form: Sequence[str], options: Mapping[str, Any]) -> str | None:
    """Why `function` cannot be called with the positional arguments of `form` and `options`; None where it can."""
    try:
        inspect.signature(function).bind(*form, **options)
    except (TypeError, ValueError) as error:  # ValueError: a builtin without a signature
        return str(error)
    return None


def _listed(form: Sequence[str]) -> str:
    return f"({', '.join(form)})"
