"""The built-in corpus: the Python standard library as (signature, docstring) pairs.

It is real text, on every machine, without a network, and falls apart by itself into clients of different sizes and
styles: one top-level package each ("each team's private code"). The pairs are those of the running interpreter, so
another Python version gives a somewhat different corpus.

Left out: tests, installed packages, pip's bundled wheels, and directories that can't be imported (`lib-dynload`,
`config-3.11-…`). Docstrings under 30 characters say too little to learn from; over 800 they outgrow a short context.
"""

from __future__ import annotations

import ast
import copy
import os
import random
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_fedlarge.errors import DataError

INSTRUCTION = "Write the docstring."
MIN_CHARACTERS, MAX_CHARACTERS = 30, 800

_SKIPPED = {"test", "tests", "idle_test", "_bundled", "__pycache__"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def standard_library_pairs() -> list[dict[str, Any]]:
    """Collect every documented function and method of the running interpreter's standard library.

    Equal pairs are kept once, in the order of file path and line. A file that doesn't parse is skipped without an
    error: the library ships a few that are broken on purpose.

    Returns:
        Rows of `prompt` and `completion`, each a list of one chat message, so that a trainer labels only the
        docstring, and `package`, the top-level package or module.

    Raises:
        DataError: the interpreter came without its library's source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    pairs: dict[tuple[str, str], str] = {}
    for path in _source_files(root):
        package = path.relative_to(root).parts[0].removesuffix(".py")
        for pair in _documented_functions(path):
            pairs.setdefault(pair, package)
    if not pairs:
        raise DataError(f"{root} holds no Python source with docstrings; use another interpreter or your own data.")
    return [
        {
            "prompt": [{"role": "user", "content": f"{INSTRUCTION}\n{signature}"}],
            "completion": [{"role": "assistant", "content": docstring}],
            "package": package,
        }
        for (signature, docstring), package in pairs.items()
    ]


def _source_files(root: Path) -> list[Path]:
    """Every importable source file under `root`, sorted; `os.walk` lets us cut off what is skipped."""
    found = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name.isidentifier() and name not in _SKIPPED]
        found += [Path(directory, name) for name in names if name.endswith(".py")]
    return sorted(found)


def _documented_functions(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # others' invalid escapes are not our user's concern
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for function, class_name in _functions(tree, None):
        docstring = ast.get_docstring(function) or ""
        if MIN_CHARACTERS <= len(docstring) <= MAX_CHARACTERS:
            yield _signature(function, class_name), docstring


def _functions(parent: ast.AST, class_name: str | None) -> Iterator[tuple[Function, str | None]]:
    """Every function under `parent` in source order, with the class it is a method of, if it is one."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, Function):
            yield node, class_name
            yield from _functions(node, None)
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, node.name)
        elif not isinstance(node, ast.expr):  # an expression holds no function, and most nodes are expressions
            yield from _functions(node, class_name)


def _signature(function: Function, class_name: str | None) -> str:
    """`def name(arguments) -> type:` without decorators; a method stands indented under its class's name."""
    header = copy.copy(function)
    header.body, header.decorator_list = [ast.Pass()], []
    text = ast.unparse(header).removesuffix("\n    pass")
    return text if class_name is None else f"class {class_name}:\n    {text}"


def standard_library_prose() -> list[dict[str, str]]:
    """The language reference that `help()` shows, as rows of `text`: prose to calibrate on, in a fixed random order.

    Raises:
        DataError: the interpreter came without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError("This interpreter has no pydoc_data; give calibration text of your own.") from error
    names = sorted(topics)
    random.Random(0).shuffle(names)
    return [{"text": topics[name]} for name in names]
