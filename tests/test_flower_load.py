"""Many clients that send large updates over one SuperLink at the same moment: all count, one at a time in memory.

A node is a thread (`flower_nodes.py`), for 64 of Flower's processes would need some 15 GB. There are fewer and smaller
ones here than `LOAD_CLIENTS=64 LOAD_MB=20` has, which takes minutes; `LOAD_AT_ONCE=8` lets so many send at the same
time.
"""

import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'hf-fedlarge[flower]'")

from families import make_checkpoint
from federation import LORA, events, make_examples, make_update
from flower_nodes import connected
from flower_processes import Flower

from hf_fedlarge.artifacts import AdapterManifest, PackageManifest, UpdateManifest, read_manifest, write_manifest
from hf_fedlarge.cli import main
from hf_fedlarge.flower.client import _LETTER
from hf_fedlarge.flower.letters import put_in, take_out
from hf_fedlarge.orders import CHECK_INS, ORDER, CheckInDocument, OrderDocument, as_bytes, inbox
from hf_fedlarge.store import Store

MEGABYTES = float(os.environ.get("LOAD_MB", "8"))
BYTES_A_RANK = 8_704  # of the toy's adapter in fp32
CLIENTS = int(os.environ.get("LOAD_CLIENTS", "16"))
AT_ONCE = int(os.environ.get("LOAD_AT_ONCE", f"{CLIENTS}"))


class Crowd:
    """Nodes that say who they are, make an update when they are asked, and send it when all others have theirs."""

    def __init__(self, path, processes, store):
        self.path, self.processes, self.store = path, processes, store
        self.barrier, self.lock, self.over = threading.Barrier(CLIENTS + 1), threading.Lock(), threading.Event()
        self.sending, self.sizes = threading.Semaphore(AT_ONCE), set()

    def take_part(self, name):
        with connected(self.processes, self.lock) as line:  # what they read is small
            asked = False
            while not self.over.wait(3.0):  # as often as a SuperNode looks
                if (found := line.next()) is None:
                    continue
                message, files = found
                if message.metadata.message_type == "query":
                    said = CheckInDocument(client=name, examples=12)
                    content = put_in({f"{CHECK_INS}/{name}.json": as_bytes(said)})
                elif asked:
                    return  # it is over
                else:
                    content, asked = self.update(name, take_out(files, _LETTER)), True
                send = line.prepared(message, content)
                if message.metadata.message_type == "train":
                    self.barrier.wait(120)
                with self.sending:
                    send()

    def update(self, name, files):
        order, output = OrderDocument.model_validate_json(files[ORDER]), self.path / "updates" / name
        with self.lock:
            package, adapter = self.path / "package", self.path / "adapter"
            mailbox = Store(str(self.path / "mailbox"))
            for path, raw in files.items():
                mailbox.write(path, raw)
            self.store.get(order.work[0].package, package, PackageManifest)
            mailbox.get(order.work[0].adapter, adapter, AdapterManifest)
            if not (self.path / "made").exists():
                make_update(self.path / "made", package, name, lora=lora(), adapter=adapter)
            shutil.copytree(self.path / "made", output)
            write_manifest(output, read_manifest(output, UpdateManifest).model_copy(update={"client": name}))
        made = {f"{inbox(1, name, 1)}/{path.name}": path.read_bytes() for path in output.iterdir()}
        self.sizes.add(round(sum(map(len, made.values())) / 1e6, 1))
        return put_in(made)


def lora():
    return LORA.model_copy(update={"rank": int(MEGABYTES * 1e6 / BYTES_A_RANK)})


def anonymous(pid):
    """Megabytes of a process that no file stands behind."""
    return int(Path(f"/proc/{pid}/status").read_text().split("RssAnon:")[1].split()[0]) / 1000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process's memory as Linux has it")
def test_updates_that_come_at_once_all_count_and_take_the_memory_of_few(tmp_path):
    start = time.monotonic()
    make_checkpoint(tmp_path / "checkpoint", layers=2, tokenizer=True)
    app, run = tmp_path / "app", tmp_path / "app" / "run"
    assert main(["flower", "init", str(app), "--store", str(tmp_path / "packages")]) == 0
    federation = {
        "checkpoint": str(tmp_path / "checkpoint"),
        "eval_data": str(make_examples(tmp_path / "public.jsonl", 4)),
        "keep_layers": 1.0,
        "lora": {"rank": lora().rank, "alpha": LORA.alpha},
        "aggregator": "fedavg",
        "cohort": CLIENTS,
        "min_updates": CLIENTS,
        "rounds": 1,
    }
    (app / "federation.yaml").write_text(yaml.safe_dump(federation))
    with (app / "pyproject.toml").open("a") as file:
        file.write("stop = false\npoll = 0.2\n")
    processes = Flower(tmp_path)
    crowd = Crowd(tmp_path, processes, Store(str(tmp_path / "packages")))
    with ThreadPoolExecutor(CLIENTS) as pool:
        try:
            processes.superlink()
            processes.superexec()
            nodes = [pool.submit(crowd.take_part, f"client-{number:02d}") for number in range(CLIENTS)]
            processes.run(app)
            print(f"submitted after {time.monotonic() - start:.1f} s")
            crowd.barrier.wait(300)
            print(f"all made after {time.monotonic() - start:.1f} s")
            server, superlink, peaks = processes.server_app().pid, processes.processes["superlink"].pid, {}
            idle, began = (anonymous(server), anonymous(superlink)), time.monotonic()
            while len(events(run, "validated")) < CLIENTS:
                assert time.monotonic() - began < 400, processes.logs()
                for name, pid in (("server", server), ("superlink", superlink)):
                    peaks[name] = max(peaks.get(name, 0), anonymous(pid))
                time.sleep(0.05)
            took = time.monotonic() - began
            processes.until((run / "summary.json").exists)
        finally:
            crowd.over.set()
            crowd.barrier.abort()
            for node in nodes:
                with suppress(Exception):
                    node.result(30)
            processes.end()
    print(f"{CLIENTS} updates of {crowd.sizes} MB counted after {took:.1f} s")
    for number, name in enumerate(peaks):
        print(f"{name}: {idle[number]:.0f} MB, then up to {peaks[name]:.0f} MB")
    assert sum(entry["accepted"] for entry in events(run, "validated")) == CLIENTS
    assert peaks["server"] - idle[0] < 60 + 4 * MEGABYTES < CLIENTS * MEGABYTES
