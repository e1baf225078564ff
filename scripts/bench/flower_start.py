"""What a round costs a Flower client besides training: with a process for each message, and with a resident worker.

    python scripts/bench/flower_start.py --json flower_start.json       # a package of TinyLlama-1.1B's shape
    python scripts/bench/flower_start.py --shape tiny

Flower starts a process for each message. Here this program does, with the real ClientApp and an order to train one step
on one short example: without a worker, and then with one, whose first order still loads the package. Timed is each
process from start to end. Left out are Flower's own processes and the 3 s between a node's looks, the same both ways.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import workplace, write_report
from shapes import SHAPES, write_checkpoint

from hf_fedlarge.artifacts import SERVER_FILES, AdapterManifest, PackageManifest, read_manifest
from hf_fedlarge.cli import main as command
from hf_fedlarge.config import LoraSettings
from hf_fedlarge.data import from_rows, write_jsonl
from hf_fedlarge.lineage import start_adapter
from hf_fedlarge.orders import ORDER, OrderDocument, TrainingOrder, Work, as_bytes
from hf_fedlarge.store import Store, artifact_path, object_path

ANSWER = """
import json, sys
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hf_fedlarge.flower.client import app
from hf_fedlarge.flower.letters import put_in
from hf_fedlarge.store import Store

settings, mailbox, paths = json.loads(sys.argv[1])
TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
files = {path: Store(mailbox).read(path, 2**30) for path in paths}
reply = app(Message(put_in(files), 2, "train", ttl=3600), Context(1, 2, settings, RecordDict(), {}))
assert any(path.endswith("/fedlarge.json") for path in reply.content["files"]), list(reply.content["files"])
"""


def main() -> int:
    """Time some rounds both ways; print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--rounds", type=int, default=4, help="each way; the first one of each is left out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where to work")
    options = parser.parse_args()
    with workplace(options) as directory, tempfile.TemporaryDirectory(dir=directory) as work:
        found = measure(options.shape, options.rounds, Path(work))
    print(json.dumps(found))
    if options.json:
        write_report(options.json, found)
    return 0


def measure(shape: str, rounds: int, work: Path) -> dict[str, Any]:
    """Seconds of a message's process each way."""
    write_checkpoint(shape, work / "checkpoint")
    layers = SHAPES[shape]["num_hidden_layers"]
    words = ["shrink", work / "checkpoint", "-o", work / "package", "--keep-layers", layers, "--surrogate", "none"]
    if command([str(word) for word in words]):
        raise RuntimeError("The package could not be made.")
    start_adapter(work / "package", work / "adapter", LoraSettings(), seed=0)
    write_jsonl(from_rows([{"text": "a b c"}] * 2), work / "data.jsonl")
    settings = {"client": "lab", "data": str(work / "data.jsonl"), "eval-data": str(work / "data.jsonl")}
    settings |= {"cache": str(work / "cache"), "store": str(work / "store")}
    Store(settings["store"]).put(work / "package")
    seconds = {"own": [one(number, work, settings) for number in range(rounds)]}
    worker = [sys.executable, "-m", "hf_fedlarge.cli", "flower", "worker", str(work / "worker")]
    with subprocess.Popen(worker, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()  # it is ready
        try:
            settings |= {"worker": str(work / "worker")}
            seconds["worker"] = [one(number, work, settings) for number in range(rounds, 2 * rounds)]
        finally:
            process.terminate()
    figures = {f"{name}_seconds": round(statistics.median(all[1:]), 2) for name, all in seconds.items()}
    return {"shape": shape, **figures, "first_with_worker": round(seconds["worker"][0], 2), "rounds": rounds - 1}


def one(number: int, work: Path, settings: dict[str, str]) -> float:
    """Seconds from the start of a message's process to its end."""
    package, adapter = (
        read_manifest(work / "package", PackageManifest),
        read_manifest(work / "adapter", AdapterManifest),
    )
    asked = Work(
        clients=["lab"],
        package=package.digest,
        package_bytes=package.total_bytes,
        adapter=adapter.digest,
        adapter_bytes=adapter.total_bytes,
        update_bytes=2**30,
    )
    training = TrainingOrder(max_steps=1, per_device_train_batch_size=1, max_length=16, disable_tqdm=True)
    mailbox = Store(str(work / "mailbox"))
    # Every order is one of a federation of its own, for the adapter that all begin with.
    order = OrderDocument(run=f"{number:032x}", state="open", round=1, attempt=1, work=[asked], training=training)
    mailbox.write(ORDER, as_bytes(order))
    mailbox.put(work / "adapter", leave_out=SERVER_FILES)
    hashes = {entry.sha256 for name, entry in adapter.files.items() if name not in SERVER_FILES}
    paths = [ORDER, artifact_path(adapter.digest), *map(object_path, hashes)]
    began = time.perf_counter()
    given = json.dumps([settings, mailbox.url, paths])
    subprocess.run([sys.executable, "-c", ANSWER, given], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
