"""A client that is late in three rounds running holds up nobody, not even itself afterwards."""

import json
import re

import pytest
import yaml

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'hf-fedlarge[flower]'")

from families import make_checkpoint
from federation import events, make_examples, make_update
from flower_nodes import Prepared
from flower_processes import Flower

from hf_fedlarge.cli import main
from hf_fedlarge.config import load_federation

DEADLINE, LATE = 12, 3  # seconds; rounds
# A ClientApp that is never done in the first rounds, and sends what lies there afterwards.
SLOW_CLIENT = """
import json
import time
from pathlib import Path

from flwr.clientapp import ClientApp

from hf_fedlarge.flower import client
from hf_fedlarge.orders import ORDER, OrderDocument, inbox, read_document

app = ClientApp()


def take_part(settings, mailbox, work, report):
    order = read_document(mailbox, ORDER, OrderDocument)
    report(f"at work on round {{order.round}}")
    if order.round <= {late}:
        time.sleep(3600)
    made = Path({updates!r}) / settings.client / str(order.round)
    files = {{path.name: path.read_bytes() for path in made.iterdir()}}
    manifest = json.loads(files["fedlarge.json"]) | {{"adapter": work.adapter}}
    for name, raw in (files | {{"fedlarge.json": json.dumps(manifest).encode()}}).items():
        mailbox.write(f"{{inbox(order.round, settings.client, order.attempt)}}/{{name}}", raw)


@app.query()
def query(message, context):
    return client.app(message, context)


@app.train()
def train(message, context):
    client.take_part = take_part
    return client.app(message, context)
"""


def test_a_client_late_in_three_rounds_holds_up_no_later_one_and_counts_in_the_fourth(tmp_path):
    """The slow one is a SuperNode with its ClientApp; the others are threads."""
    make_checkpoint(tmp_path / "checkpoint", layers=2, tokenizer=True)
    app, run, updates = tmp_path / "app", tmp_path / "app" / "run", tmp_path / "updates"
    federation = {
        "checkpoint": str(tmp_path / "checkpoint"),
        "eval_data": str(make_examples(tmp_path / "public.jsonl", 4)),
        "clients": dict.fromkeys(("ann", "ben", "slow"), 6),
        "keep_layers": 1.0,
        "lora": {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]},
        "rounds": LATE + 1,
        "deadline_seconds": DEADLINE,
        "min_updates": 1,
        "codec": "fp32",
    }
    assert main(["flower", "init", str(app), "--store", str(tmp_path / "packages")]) == 0
    (app / "federation.yaml").write_text(yaml.safe_dump(federation))
    (app / "fedlarge_app" / "client.py").write_text(SLOW_CLIENT.format(late=LATE, updates=str(updates)))
    with (app / "pyproject.toml").open("a") as file:
        file.write("stop = false\npoll = 0.1\n")
    processes = Flower(tmp_path)
    others = Prepared(processes, updates, ("ann", "ben"))
    try:
        processes.superlink()
        processes.superexec()
        processes.supernode("slow", data=tmp_path / "public.jsonl", cache=tmp_path / "cache")
        processes.run(app)
        processes.until((run / "package" / "fedlarge.json").exists)
        lora = load_federation(app / "federation.yaml").lora
        for number in range(1, LATE + 2):
            for seed, name in enumerate(federation["clients"]):
                how = {"seed": seed, "round_number": number, "lora": lora, "examples": 4}
                make_update(updates / name / str(number), run / "package", name, **how)
        others.start()
        processes.until((run / "summary.json").exists)
        said = (tmp_path / "slow.log").read_text()
    finally:
        others.end()
        processes.end()
    accepted = [(entry["round"], entry["client"]) for entry in events(run, "validated") if entry["accepted"]]
    everybody = {(number, name) for number in range(1, LATE + 2) for name in ("ann", "ben")}
    assert sorted(accepted) == sorted(everybody | {(LATE + 1, "slow")})
    # The first one waits for nodes to check in as well.
    seconds = [entry["seconds"] for entry in json.loads((run / "summary.json").read_text())["rounds"]][1:]
    assert max(seconds) < DEADLINE + 5
    assert seconds[-1] < DEADLINE
    assert re.findall("at work on round ([0-9])", said) == [str(number) for number in range(1, LATE + 2)]
    assert said.count("The round was closed before the update was ready.") == LATE
    begun = [float(found) for found in re.findall("begun ([0-9.]+) s after the order was sent", said)]
    assert max(begun[: LATE + 1]) < DEADLINE
