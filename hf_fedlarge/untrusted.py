"""What others wrote: JSON bounded before it is read and without a key twice, text for a terminal, which files to take.

Of a key that stands twice Python takes the last, other parsers the first: two programs would check different things.
"""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from hf_fedlarge.errors import ArtifactError

# Of files that some program might run if it found them; nothing here needs one.
CODE_SUFFIXES = (".py", ".pyc", ".pyd", ".so", ".dll", ".pkl", ".pickle", ".joblib", ".bin", ".pt", ".pth", ".ckpt")
# What a model needs besides config and weights, to be used and passed on. No other file is taken from its directory,
# where training data, logs and credentials may lie, too.
COMPANIONS = (
    *("tokenizer.json", "tokenizer.*.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model*", "*.model", "*.tiktoken", "tekken.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
    *("LICENSE*", "NOTICE*", "Notice*", "USE_POLICY*"),
)
FilesT = TypeVar("FilesT", bound=dict[str, Any])


def read_json(path: Path, limit: int) -> Any:
    """What a file of at most `limit` bytes holds.

    Raises:
        ArtifactError: it has more bytes, or is not JSON, or has a key twice.
        OSError: the system can't read it.
    """
    with path.open("rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise ArtifactError(f"{path} has {path.stat().st_size} bytes; expected at most {limit}.")
    return parse_json(raw, str(path))


def parse_json(raw: bytes, what: str) -> Any:
    """What `raw`, which errors call `what`, says; the caller has bounded its length.

    Raises:
        ArtifactError: not JSON, nested too deeply, a number too long, or a key that stands twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ArtifactError(f"{what} holds a key twice; expected each once.")
        return found

    try:
        return json.loads(raw, object_pairs_hook=unique)
    except ArtifactError:
        raise
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{what} is not JSON: {error}.") from error


def printable(text: str) -> str:
    """`text` on one line, a question mark for what a terminal or a log would not show as it is, such as escapes."""
    return "".join(letter if letter.isprintable() else " " if letter.isspace() else "?" for letter in text)


def is_companion(name: str) -> bool:
    """Whether a file of this name is one of `COMPANIONS`, and no code."""
    matches = any(fnmatchcase(name, pattern) for pattern in COMPANIONS)
    return matches and not name.lower().endswith(CODE_SUFFIXES)


def without_code(files: FilesT) -> FilesT:
    """The files by name, none of which may be code or a pickle.

    Raises:
        ValueError: one may be.
    """
    for name in files:
        if name.lower().endswith(CODE_SUFFIXES):
            raise ValueError(f"{name:.200} may be code or a pickle; expected data alone")
    return files
