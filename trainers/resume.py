"""The work directory beside an update: whether training that was interrupted goes on from a checkpoint in it."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fedlarge.artifacts import write_json

if TYPE_CHECKING:
    from hf_fedlarge.trainers.streaming_trainer import StreamingLoraConfig

logger = logging.getLogger(__name__)


def prepare_work(work: Path, state: dict[str, Any], config: StreamingLoraConfig) -> str | None:
    """The checkpoint to resume from, if `work` holds one of the very same training; otherwise `work` is emptied.

    Another `memory_budget` is the same training, though it may round otherwise: a budget that turns out too small is
    raised without losing what was trained.

    Only the first process changes anything: the others' `state` may differ from its.
    """
    with config.main_process_first(local=False, desc="preparing the work directory"):
        if config.process_index == 0:
            before, budget = _read_json(work / "client.json"), {"memory_budget": state["memory_budget"]}
            if before != state:
                if not isinstance(before, dict) or before | budget != state:
                    if work.exists():
                        shutil.rmtree(work)
                    work.mkdir(parents=True)
                else:
                    logger.warning("The memory budget is another; the last bits of what is trained may be, too.")
                write_json(work / "client.json", state)
            for checkpoint in work.glob("checkpoint-*"):
                if not _is_whole(checkpoint):
                    shutil.rmtree(checkpoint)
    checkpoints = [checkpoint for checkpoint in work.glob("checkpoint-*") if _is_whole(checkpoint)]
    if not checkpoints:
        return None
    newest = max(checkpoints, key=lambda checkpoint: int(checkpoint.name.removeprefix("checkpoint-")))
    logger.warning("Resuming from %s.", newest)
    return str(newest)


def _is_whole(checkpoint: Path) -> bool:
    """Whether transformers finished it: it writes this file last, though not in one piece."""
    return _read_json(checkpoint / "trainer_state.json") is not None


def _read_json(path: Path) -> Any:
    """What the file holds; None where it is missing or was cut short."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
