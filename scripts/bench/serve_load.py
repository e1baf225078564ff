"""Many clients that put updates into one served run at once: whether all count, and the memory that takes the server.

    python scripts/bench/serve_load.py --json serve_load.json           # 8 clients, then 64, of 20 MB each
    python scripts/bench/serve_load.py --clients 16 --megabytes 5

`hf-fedlarge serve` in a process of its own, over a shared directory, of a toy model whose LoRA rank makes updates as
large as asked. The updates are random numbers; nobody trains. When the round is open and all are made, as many threads
as there are clients send them at the same moment. Looked at 50 times a second is the server's anonymous memory, which
no file stands behind: until the last update was validated, and until the round was committed. It must not grow with
the number of clients, since the server takes one update at a time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from harness import workplace, write_report
from shapes import write_checkpoint

from hf_fedlarge.adapters import AdapterReader
from hf_fedlarge.architectures import Architecture, describe
from hf_fedlarge.artifacts import SERVER_FILES, AdapterManifest, PackageManifest, UpdateManifest
from hf_fedlarge.config import LoraSettings
from hf_fedlarge.data import from_rows, write_jsonl
from hf_fedlarge.orders import CHECK_INS, ORDER, CheckInDocument, OrderDocument, inbox, read_document, write_document
from hf_fedlarge.package import package_config
from hf_fedlarge.store import Store
from hf_fedlarge.tensors import Factors
from hf_fedlarge.update import write_update

BYTES_A_RANK = 16384  # of the toy's adapter in fp32


def main() -> int:
    """Serve a round to few clients and to many; print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--megabytes", type=float, default=20, help="of an update")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where to work; twice the updates' bytes are needed")
    options = parser.parse_args()
    if options.clients < 8:
        parser.error("--clients is the number of clients, 8 or more.")
    report = {"megabytes": options.megabytes, "runs": []}
    for clients in (options.clients // 8, options.clients):
        with workplace(options) as directory, tempfile.TemporaryDirectory(dir=directory) as work:
            report["runs"].append(serve(clients, options.megabytes, Path(work)))
        print(json.dumps(report["runs"][-1]), flush=True)
    if options.json:
        write_report(options.json, report)
    return 0


def serve(count: int, megabytes: float, work: Path) -> dict[str, Any]:
    """One round; how many counted, seconds, and the server's peaks."""
    names, store = [f"client-{number:03d}" for number in range(count)], Store(str(work / "store"))
    lora = LoraSettings(rank=round(megabytes * 1e6 / BYTES_A_RANK), alpha=8.0)
    write_checkpoint("tiny", work / "checkpoint")
    write_jsonl(from_rows([{"text": "a b c"}]), work / "public.jsonl")
    federation = {
        "checkpoint": str(work / "checkpoint"),
        "data": {"source": str(work / "public.jsonl")},
        "eval_data": str(work / "public.jsonl"),
        "clients": dict.fromkeys(names, 1000),
        "keep_layers": 1.0,
        "rounds": 1,
        "aggregator": "fedavg",
        "lora": lora.model_dump(),
        "training": {"max_steps": 1},
    }
    (work / "federation.yaml").write_text(json.dumps(federation))
    words = ["serve", work / "federation.yaml", "--store", store.url, "--output", work / "run", "--poll", "0.1"]
    with (work / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "hf_fedlarge.cli", *map(str, words), "--no-stop"], stdout=log, stderr=log
        )
        try:
            return _round(server, store, names, work)
        except Exception:
            sys.stderr.write((work / "log").read_text())
            raise
        finally:
            server.kill()
            server.wait()


def _order(server: subprocess.Popen[bytes], store: Store, state: str) -> OrderDocument:
    while (order := read_document(store, ORDER, OrderDocument)) is None or order.state != state:
        if server.poll() is not None:
            raise RuntimeError("The server ended.")
        time.sleep(0.1)
    return order


def _round(server: subprocess.Popen[bytes], store: Store, names: list[str], work: Path) -> dict[str, Any]:
    _order(server, store, "closed")  # before which a server forgets who checked in
    for name in names:
        write_document(store, f"{CHECK_INS}/{name}.json", CheckInDocument(client=name, examples=1000))
    order = _order(server, store, "open")
    order_work = order.work_of(names[0])
    store.get(order_work.package, work / "package", PackageManifest)
    adapter = store.get(order_work.adapter, work / "adapter", AdapterManifest, leave_out=SERVER_FILES)
    architecture = describe(package_config(work / "package"))
    sizes = {make(work / "updates" / name, name, adapter, architecture, work / "adapter") for name in names}
    peaks, began = {"idle": _anonymous(server.pid), "taking": 0, "all": 0}, time.monotonic()
    barrier = threading.Barrier(len(names) + 1)

    def send(name: str) -> None:
        barrier.wait()
        store.send(work / "updates" / name, inbox(1, name, order.attempt))

    with ThreadPoolExecutor(len(names)) as pool:
        sending = [pool.submit(send, name) for name in names]
        barrier.wait()
        took = None
        while not (work / "run" / "rounds" / "0001").exists():
            if server.poll() is not None:
                raise RuntimeError("The server ended.")
            used = _anonymous(server.pid)
            peaks["all"] = max(peaks["all"], used)
            if took is None:
                peaks["taking"] = max(peaks["taking"], used)
                if '"closed"' in (work / "run" / "journal.jsonl").read_text():
                    took = time.monotonic() - began
            time.sleep(0.02)
        for each in sending:
            each.result()
    lines = (work / "run" / "journal.jsonl").read_text().splitlines()
    entries = [entry for entry in map(json.loads, lines) if entry["event"] == "validated"]
    return {
        "clients": len(names),
        "update_mb": round(max(sizes) / 1e6, 2),
        "counted": sum(entry["accepted"] for entry in entries),
        "seconds_to_take_all": round(took or 0.0, 1),
        "server_mb_idle": round(peaks["idle"] / 1e6),
        "server_peak_mb_taking_updates": round(peaks["taking"] / 1e6),
        "server_peak_mb_until_committed": round(peaks["all"] / 1e6),
    }


def make(output: Path, client: str, adapter: AdapterManifest, architecture: Architecture, directory: Path) -> int:
    """Write an update of random numbers; its bytes."""
    reader, generator = AdapterReader(directory), torch.Generator().manual_seed(int(client[-3:]))
    factors = {}
    for module in reader.modules:
        A_RI, B_OR = reader.read(module)
        factors[module] = Factors(A_RI, torch.randn(B_OR.shape, generator=generator) / 100)
    manifest = UpdateManifest(
        files={},
        client=client,
        round=1,
        package=adapter.package,
        adapter=adapter.digest,
        lora=adapter.lora,
        examples=100,
        tokens=100,
    )
    return write_update(output, factors, manifest, architecture, adapter.base).total_bytes


def _anonymous(pid: int) -> int:
    """Bytes of a process that no file stands behind (Linux)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


if __name__ == "__main__":
    sys.exit(main())
