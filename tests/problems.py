"""A federation without a language model: two matrices of low rank, to be found by least squares from noisy examples."""

import functools

import torch
from safetensors.torch import save_file

from hf_fedlarge.adapters import ADAPTER_WEIGHTS, CARRY_WEIGHTS, AdapterReader
from hf_fedlarge.aggregate import trained_in
from hf_fedlarge.combine import Part, combine
from hf_fedlarge.config import AggregationSettings, LoraSettings
from hf_fedlarge.tensors import Factors

LORA = LoraSettings(rank=4, alpha=4.0)
SHAPES = {"first": (12, 10), "second": (8, 14)}  # out, in
EXAMPLES = 250


def make_factors(rank, out_features, in_features, seed):
    generator = torch.Generator().manual_seed(seed)
    A_RI = torch.randn(rank, in_features, generator=generator)
    return Factors(A_RI, torch.randn(out_features, rank, generator=generator))


def product(factors, scale=1.0):
    return scale * factors.B_OR.double() @ factors.A_RI.double()


def write(directory, factors):
    """An adapter's weights, without manifest or configuration."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{module}.lora_{letter}.weight": factor
        for module, pair in factors.items()
        for letter, factor in zip("AB", pair, strict=True)
    }
    save_file(tensors, directory / ADAPTER_WEIGHTS)
    return directory


def read(directory, name=ADAPTER_WEIGHTS):
    reader = AdapterReader(directory, name)
    return {module: reader.read(module) for module in reader.modules}


def start(directory, lora=LORA):
    """A fresh adapter."""
    factors = {}
    for module, shape in SHAPES.items():
        A_RI = make_factors(lora.rank, *shape, seed=99).A_RI / shape[1] ** 0.5
        factors[module] = Factors(A_RI, torch.zeros(shape[0], lora.rank))
    return write(directory, factors)


def state(directory, lora=LORA):
    """Adapter and carry together, dense."""
    found = {module: product(pair, lora.scale) for module, pair in read(directory).items()}
    for module, pair in read(directory, CARRY_WEIGHTS).items():
        found[module] = found[module] + product(pair, lora.scale)
    return found


@functools.cache
def examples(client, skew=0.0):
    """Inputs and noisy outputs of one client; with `skew` its own inputs are larger in some directions."""
    data = {}
    for module, (out_features, in_features) in SHAPES.items():
        generator = torch.Generator().manual_seed(1000 + client)
        X = torch.randn(EXAMPLES, in_features, generator=generator, dtype=torch.float64)
        X = X * (1 + skew * torch.rand(in_features, generator=generator, dtype=torch.float64))
        noise = torch.randn(EXAMPLES, out_features, generator=generator, dtype=torch.float64)
        W = product(make_factors(3, out_features, in_features, seed=5)) / in_features**0.5
        data[module] = X, X @ W.T + noise
    return data


def loss(directory, clients=range(5), lora=LORA):
    """Mean squared error of the whole state on the examples of `clients`."""
    found = state(directory, lora)
    errors = [X @ found[module].T - Y for client in clients for module, (X, Y) in examples(client).items()]
    return sum(error.square().mean() for error in errors).item() / len(errors)


def train(adapter, output, client, trained="both", lora=LORA, steps=15, rate=0.05, skew=0.0):
    """A client's round: some steps of gradient descent on its own examples."""
    after = {}
    for module, (X, Y) in examples(client, skew).items():
        A_RI, B_OR = (factor.double() for factor in read(adapter)[module])
        square, cross = X.T @ X / len(X), Y.T @ X / len(X)
        for _ in range(steps):
            gradient = rate * lora.scale / 2 * (product(Factors(A_RI, B_OR), lora.scale) @ square - cross)
            step_A, step_B = B_OR.T @ gradient, gradient @ A_RI.T
            A_RI = A_RI - step_A if trained in ("both", "A") else A_RI
            B_OR = B_OR - step_B if trained in ("both", "B") else B_OR
        after[module] = Factors(A_RI.float(), B_OR.float())
    return write(output, after)


def scaled(update, by):
    """What a hostile client sends in place of `update`."""
    write(update, {module: Factors(A_RI, by * B_OR) for module, (A_RI, B_OR) in read(update).items()})


def federate(path, rounds=12, clients=5, hostile=(), by=1.0, lora=LORA, skew=0.0, **choices):
    """Run rounds in `path`; the `hostile` send their update times `by`. Returns the last adapter's directory."""
    settings = AggregationSettings(**choices)
    adapter = start(path / "0", lora)
    for number in range(1, rounds + 1):
        trained = trained_in(settings.aggregator, number)
        parts = []
        for client in range(clients):
            update = train(adapter, path / f"{number}-{client}", client, trained, lora, skew=skew)
            if client in hostile:
                scaled(update, by)
            parts.append(Part(AdapterReader(update), 1.0, lora.scale))
        output = path / str(number)
        output.mkdir()
        combine(parts, adapter, output, lora, settings, trained)
        adapter = output
    return adapter
