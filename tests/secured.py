"""The server's side of secure aggregation, and updates that were made beforehand."""

import functools

import torch
from federation import LORA, make_examples, make_federation
from round_driver import CLIENTS
from served import Server

from hf_fedlarge.adapters import read_factors
from hf_fedlarge.architectures import describe
from hf_fedlarge.artifacts import AdapterManifest, PackageManifest, UpdateManifest, read_manifest
from hf_fedlarge.lineage import start_adapter
from hf_fedlarge.package import package_config
from hf_fedlarge.secure_sum import aggregate_sum
from hf_fedlarge.tensors import Factors
from hf_fedlarge.update import write_update

TOKENS = {"ann": 1000, "ben": 10, "cleo": 333, "dan": 7}
LIMIT = 0.05


def make_secure_home(path):
    """A package, an adapter to start from for each aggregator, and every client's update of each."""
    make_federation(path)
    make_examples(path / "data.jsonl")
    for aggregator in ("ffa", "fedavg"):
        own = path / aggregator
        start_adapter(path / "package", own / "start", LORA, seed=0, aggregator=aggregator)
        for number, client in enumerate(CLIENTS):
            train(own / client, path / "package", own / "start", client, number)


@functools.cache
def architecture_of(package):
    """Once, and in no thread: transformers changes torch's default dtype while it looks."""
    return describe(package_config(package))


def train(output, package, adapter, client, number, deviation=0.01, key=None):
    """An update as training leaves one: small changes of what is trained."""
    small, parent = read_manifest(package, PackageManifest), read_manifest(adapter, AdapterManifest)
    architecture = architecture_of(package)
    generator = torch.Generator().manual_seed(number)
    trained = {"both": (0, 1), "B": (1,)}[parent.trains]
    factors = {
        module: Factors(
            *(
                factor + deviation * torch.randn(factor.shape, generator=generator) * (index in trained)
                for index, factor in enumerate(pair)
            )
        )
        for module, pair in read_factors(adapter).items()
    }
    manifest = UpdateManifest(
        files={},
        client=client,
        round=parent.round + 1,
        package=small.digest,
        adapter=parent.digest,
        lora=parent.lora,
        examples=10,
        tokens=TOKENS[client],
        loss_before=2.0,
    )
    write_update(output, factors, manifest, architecture, small.base, key=key)


class SecureServer(Server):
    """The server's side with secure aggregation."""

    def __init__(self, home, run, store, aggregator="ffa", secure=None, start=None, **changes):
        secure = {"limit": LIMIT, "threshold": 0.5, "stage_seconds": 20.0} | (secure or {})
        changes = {"deadline_seconds": 20.0, "weighting": "equal"} | changes  # so that nobody is waited for for ever
        start = start or home / aggregator / "start"
        super().__init__(home, run, store, start=start, aggregator=aggregator, secure=secure, **changes)

    def close(self):
        def aggregate(updates, late, adapter):
            aggregate_sum(self.round, self.home / "package", adapter, self.adapter(self.order.round - 1), self.config)

        return self.round.close(self.order, aggregate, lambda _: {}, lambda *_: {})

    def whole(self, number=1):
        """A round."""
        self.open(number)
        self.ask()
        return self.close()
