"""The server's side of rounds with clients that a store or messages reach, and updates that were made beforehand."""

import shutil

from federation import LORA, make_examples, make_federation, make_update
from round_driver import CLIENTS, config

from hf_fedlarge.clients import write_check_ins
from hf_fedlarge.collect import aggregate_updates
from hf_fedlarge.jobs import Jobs, Tier
from hf_fedlarge.journal import Journal
from hf_fedlarge.lineage import start_adapter
from hf_fedlarge.plan import CheckIn
from hf_fedlarge.serve import StoreClients
from hf_fedlarge.server import RoundServer
from hf_fedlarge.update import validate_update


def make_home(path):
    """A package, the adapter to start from, and the updates of four clients."""
    make_federation(path)
    start_adapter(path / "package", path / "start", LORA, seed=0)
    make_examples(path / "data.jsonl")
    for number, client in enumerate(CLIENTS):
        make_update(path / client, path / "package", client, seed=number, adapter=path / "start")


class Server:
    """The server's side of rounds over a store, without a checkpoint to evaluate."""

    def __init__(self, home, run, store, said=None, packages=None, start=None, key=None, **changes):
        self.home, self.store, self.said = home, store, [] if said is None else said
        shutil.copytree(start or home / "start", run / "rounds" / "0000" / "adapter", dirs_exist_ok=True)
        changes = {"eval_data": str(home / "data.jsonl"), "clients": dict.fromkeys(CLIENTS, 10)} | changes
        self.config = config(**{"cohort": None, "min_updates": 1} | changes)
        self.run, self.journal = run, Journal(run / "journal.jsonl")
        self.clients = StoreClients(store, self.said.append, poll=0.02, packages=packages, key=key)
        self.clients.check(self.config, run)
        self.clients.prepare(self.config, run, lambda *examples: None)
        self.jobs = Jobs(self.config, run, self.adapter, [Tier("", home / "package", LORA, 0)], self.journal)

    def adapter(self, number):
        return self.run / "rounds" / f"{number:04d}" / "adapter"

    def validate(self, number, client, update):
        return validate_update(update, self.jobs.expected(client, number))

    def open(self, number=1):
        self.round = RoundServer(self.run / "rounds", number, self.journal, self.config, self.validate)
        if not (self.run / "check_ins.json").exists():
            write_check_ins(self.run, [CheckIn(client, 10) for client in CLIENTS])
        self.order = self.round.open(list(self.jobs.check_ins.values()))
        return self.order

    def ask(self):
        """Until nobody is waited for."""

        def asked(client):
            size = self.jobs.missing_bytes(self.journal, client, self.order.round, self.clients.down)
            self.round.asked(client, size)

        for client, problem in self.clients.answers(self.jobs, self.round, self.order, asked):
            if problem is None:
                self.round.receive(self.order, client, self.round.work / client, in_time=True)
            else:
                self.round.fail(self.order, client, problem)

    def close(self, **how):
        def aggregate(updates, late, adapter):
            older = [self.adapter(n - 1) for n in set(late.values())]
            settings = how | {"round_number": self.order.round, "older": older}
            previous = self.adapter(self.order.round - 1)
            aggregate_updates([*updates, *late], self.home / "package", adapter, previous=previous, **settings)

        return self.round.close(self.order, aggregate, lambda _: {}, lambda *_: {})
