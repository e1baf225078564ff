"""`hf-fedlarge flower init`: a directory that `flwr run` starts a federation from.

Its two modules are a line each, for Flower sends them to every client and runs them there. Nothing else is sent
(`fab-include`): the federation's file and what comes of it stay on the server, so their paths are absolute.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from hf_fedlarge.errors import ConfigError, OutputError

_MODULES = "fedlarge_app"
# Flower looks for a name that is assigned, or listed.
_MODULE = """\
from hf_fedlarge.flower.{side} import app

__all__ = ["app"]
"""
_PROJECT = """\
[project]
name = {name}
version = "1.0.0"
description = "A federation of hf-fedlarge."
license = "Apache-2.0"
dependencies = ["hf-fedlarge[flower]"]

[tool.flwr.app]
publisher = "hf-fedlarge"
fab-include = ["{modules}/*.py"]

[tool.flwr.app.components]
serverapp = "{modules}.server:app"
clientapp = "{modules}.client:app"

# The server's: paths on its machine, and the store that clients read packages from.
[tool.flwr.app.config]
federation = {federation}
output = {output}
store = {store}
"""
_FEDERATION = """\
# All keys are in hf_fedlarge/config.py; docs/deployment.md says what a federation of real machines needs.
checkpoint: {checkpoint}
eval_data: public-held-out.jsonl   # an absolute path: what starts the ServerApp may run anywhere
# clients:                         # who may take part, with the most examples each is believed to have (whoever joins)
#   lab-1: 2000
#   lab-2: 500
# keys: allowed.json               # updates must be signed with these keys (none)
cohort: 2
min_updates: 2
deadline_seconds: 3600
rounds: 3
training: {{max_steps: 50, per_device_train_batch_size: 2, learning_rate: 2.0e-4, max_length: 1024}}
"""


def write_app(directory: Path, store: str, checkpoint: str) -> None:
    """Write the app.

    Args:
        directory: to make, or an empty one.
        store: the URL that packages are put to and read from, or a directory that all share.
        checkpoint: the model, for `federation.yaml`: a directory here, or a Hub id.

    Raises:
        ConfigError: a name that Flower doesn't take for an app.
        OutputError: `directory` is there and holds something.
    """
    directory = directory.absolute()
    name = directory.name
    if not re.fullmatch("[a-z][a-z0-9-]{0,31}", name):
        raise ConfigError(f"{name!r:.200} can't be an app's name; expected up to 32 small letters, digits and hyphens.")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise OutputError(f"{directory} is there already; choose another directory.")
    if os.path.isdir(local := os.path.expanduser(checkpoint)):
        checkpoint = os.path.abspath(local)
    values = {
        "name": name,
        "federation": str(directory / "federation.yaml"),
        "output": str(directory / "run"),
        "store": store if "://" in store else str(Path(store).absolute()),
    }
    quoted = {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}
    files = {
        "pyproject.toml": _PROJECT.format(modules=_MODULES, **quoted),
        "federation.yaml": _FEDERATION.format(checkpoint=json.dumps(checkpoint)),
        f"{_MODULES}/__init__.py": "",
        f"{_MODULES}/server.py": _MODULE.format(side="server"),
        f"{_MODULES}/client.py": _MODULE.format(side="client"),
    }
    for path, text in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text(text, encoding="utf-8")
