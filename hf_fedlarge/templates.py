"""A chat template is a program that came with a package: what it may take on a client's machine is bounded here.

Jinja's sandbox keeps a template from Python's objects, from files, and from one loop of over 100,000 steps; it bounds
neither loops inside loops nor how long a text becomes. So a template is first rendered with the client's own examples
in a process of its own, which the system ends at its limits of time and memory. Only then does it come near the
training process.

Left out: rendering all of many examples there. What a template does for the later ones alone is not bounded.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any

from hf_fedlarge.errors import ArtifactError

MAX_TEMPLATE_BYTES = 2**17  # the longest published ones have some 20,000
MAX_SECONDS = 10  # of CPU, for the examples together
MAX_MEMORY_BYTES = 2**28
MAX_ADDED_LETTERS = 2**18  # to an example as JSON
EXAMPLES = 64
_START_SECONDS = 120  # that starting the process may take besides, on a busy machine
_TOO_LONG, _TOO_MUCH = 3, 4
_passed: set[str] = set()

_Chat = tuple[list[Any], bool, list[Any] | None]
Template = str | Mapping[str, str] | None  # a tokenizer's: one, several by name, or none


def check_length(template: Template, where: object) -> None:
    """Refuse a tokenizer's template, or any of several, that is longer than a template would be.

    Raises:
        ArtifactError: it is.
    """
    for text in template.values() if isinstance(template, Mapping) else [template or ""]:
        if (length := len(text.encode(errors="replace"))) > MAX_TEMPLATE_BYTES:
            raise ArtifactError(
                f"The chat template of {where} has {length} bytes; expected at most {MAX_TEMPLATE_BYTES}."
            )


def check_rendering(template: Template, examples: Iterable[Mapping[str, Any]], variables: Mapping[str, Any]) -> None:
    """Render the first examples in a process of its own, once for each template.

    What else is wrong with a template, whoever renders it next will say.

    Args:
        template: the tokenizer's; of several the one named `default`, and for examples with tools `tool_use`: what
            trainers take.
        examples: with `messages`, or `prompt` and `completion` as messages; of others a template has nothing to render.
        variables: what else a template sees, such as the special tokens.

    Raises:
        ArtifactError: it took more time or memory than it may, or made a longer text.
    """
    chats = [chat for example in islice(examples, EXAMPLES) for chat in _chats(example)]
    templates = template if isinstance(template, Mapping) else {"default": template}
    _try_out(templates.get("default"), chats, variables)
    _try_out(templates.get("tool_use"), [chat for chat in chats if chat[2] is not None], variables)


def tools_of(example: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The descriptions of tools that a chat comes with, which may be written as JSON; None: it has none."""
    tools = example.get("tools")
    return json.loads(tools) if isinstance(tools, str) else tools


def _try_out(template: str | None, chats: list[_Chat], variables: Mapping[str, Any]) -> None:
    if template is None or template in _passed or not chats:
        return
    request = {"template": template, "chats": chats, "variables": dict(variables), "seconds": MAX_SECONDS}
    command = [sys.executable, "-P", "-m", "hf_fedlarge.templates"]
    try:
        raw, limit = json.dumps(request, default=str).encode(), MAX_SECONDS + _START_SECONDS
        done = subprocess.run(command, input=raw, capture_output=True, timeout=limit)
        ended = done.returncode
    except subprocess.TimeoutExpired:
        ended = -signal.SIGXCPU
    if ended == -signal.SIGXCPU:
        raise _refuse(f"took more than {MAX_SECONDS} s")
    if ended == _TOO_LONG:
        raise _refuse(f"made a text longer than the example by more than {MAX_ADDED_LETTERS} letters")
    if ended == _TOO_MUCH:
        raise _refuse(f"took more than {MAX_MEMORY_BYTES / 2**20:.0f} MiB of memory")
    if ended:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {ended}"]
        raise _refuse(f"ended the process that it was tried in ({said[-1]:.200})")
    _passed.add(template)


def _refuse(what: str) -> ArtifactError:
    return ArtifactError(
        f"The package's chat template {what}, tried on the first {EXAMPLES} examples or fewer; it is not used: ask who "
        "made the package."
    )


def _chats(example: Mapping[str, Any]) -> list[_Chat]:
    """What a trainer has rendered of an example: messages, whether the beginning of an answer follows, and tools."""
    if isinstance(example.get("messages"), list):
        return [(example["messages"], False, tools_of(example))]
    if isinstance(example.get("prompt"), list):
        prompt, tools = example["prompt"], tools_of(example)
        return [(prompt, True, tools), (prompt + example["completion"], False, tools)]
    return []


def _render() -> int:
    """The process of its own: its exit status."""
    import psutil
    from transformers.utils.chat_template_utils import render_jinja_template

    request = json.load(sys.stdin)
    process = psutil.Process()
    used = process.cpu_times()
    seconds = int(used.user + used.system) + request["seconds"]
    with suppress(ValueError, OSError):  # stricter limits are there already, or the system has none for memory
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        resource.setrlimit(resource.RLIMIT_AS, (process.memory_info().vms + MAX_MEMORY_BYTES,) * 2)
    for chat, asks, tools in request["chats"]:
        how = {"chat_template": request["template"], "add_generation_prompt": asks, **request["variables"]}
        try:
            [text], _ = render_jinja_template([chat], tools, **how)
        except MemoryError:
            return _TOO_MUCH
        except Exception:  # the template's own; whoever renders it next says so
            continue
        if len(text) > len(json.dumps([chat, tools])) + MAX_ADDED_LETTERS:
            return _TOO_LONG
    return 0


if __name__ == "__main__":
    sys.exit(_render())
