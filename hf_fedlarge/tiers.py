"""What a client's memory is enough for: an estimate, and the largest package and adapter within it.

The estimate adds up what `docs/performance.md` lists: libraries, the package's pages (mapped; with less memory they are
read again every step), the arena, hidden states, one block's activations, what is kept of them, and the adapters with
gradients and moments. Parts were measured, not the sum: `_SPARE` is what measured peaks had above the sum of the parts.

Clients of different tiers meet in one aggregate: adapters speak in the base's layer numbers and are averaged as
products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from hf_fedlarge.adapters import AdapterReader, expected_shapes, in_package, write_adapter
from hf_fedlarge.architectures import Architecture, describe, load_config
from hf_fedlarge.arena import UNASKED_BLOCK_BYTES
from hf_fedlarge.artifacts import (
    AdapterManifest,
    PackageManifest,
    describe_files,
    read_manifest,
    staged_directory,
    write_manifest,
)
from hf_fedlarge.budget import FULL_RATE_TOKENS, UNASKED_BYTES, WORKING
from hf_fedlarge.config import Embeddings, LoraSettings
from hf_fedlarge.errors import ConfigError
from hf_fedlarge.layers import format_ranges
from hf_fedlarge.package import package_architecture
from hf_fedlarge.products import Term, truncate
from hf_fedlarge.shrink import ShrinkPlan, plan_shrink
from hf_fedlarge.tensors import Factors

_LIBRARIES = 600 * 10**6
_SPARE = 1.25
_ADAPTER_BYTES = 16  # a value, its gradient and two moments in fp32
_STATE_BYTES = 2  # bf16
_MIN_RANK = 4
# From the best down: leaving out neurons costs less of what is learned than leaving out layers (docs/transfer.md).
_SHARES = (
    (1.0, 1.0),
    (1.0, 5 / 6),
    (1.0, 2 / 3),
    (1.0, 1 / 2),
    (1.0, 3 / 8),
    (3 / 4, 1 / 2),
    (2 / 3, 1 / 2),
    (1 / 2, 1 / 2),
)


@dataclass(frozen=True)
class Fit:
    """The package and the adapter for an amount of memory.

    Attributes:
        keep_layers, keep_neurons: the shares that stay.
        rank: of the adapter.
        plan: of the package.
        needed_bytes: the estimate of what a client takes.
    """

    keep_layers: float
    keep_neurons: float
    rank: int
    plan: ShrinkPlan
    needed_bytes: int


def client_bytes(
    architecture: Architecture, layers: int, package_bytes: int, lora: LoraSettings, tokens: int, together: int
) -> int:
    """An estimate of a client's peak memory on the CPU without `--memory_budget`.

    Args:
        architecture: of the full model.
        layers: how many the package has.
        package_bytes: its size.
        lora: rank and targets of the adapter.
        tokens: of one optimizer step, all its sequences together.
        together: of one micro-batch; more are computed together only up to `FULL_RATE_TOKENS`.
    """
    together = min(tokens, max(FULL_RATE_TOKENS, together))
    block = [
        math.prod(architecture.parameters[f"{architecture.blocks}.0.{path}.weight"]) for path in architecture.linears
    ]
    shapes = expected_shapes(architecture, [0], lora)
    width = architecture.parameters[f"{architecture.embedding}.weight"][-1]
    # Every matrix's output once in bf16, and the block's width in fp32 and bf16 around norms and sums.
    outputs = sum(values // width for values in block)
    activations = together * (2 * outputs + 16 * width)
    # In bf16 a block is held whole; where products are of fp32 only a small one is, and values pass through buffers.
    arena = max(2 * sum(block), min(4 * sum(block), UNASKED_BLOCK_BYTES))
    casts = 12 * together * max(values // width for values in block)
    own = (
        arena
        + casts
        + tokens * width * _STATE_BYTES * (layers + 2)
        + WORKING * activations
        + UNASKED_BYTES
        + layers * sum(a[0] * a[1] + b[0] * b[1] for a, b in shapes.values()) * _ADAPTER_BYTES
    )
    return int(_LIBRARIES + package_bytes + _SPARE * own)


def fit_memory(
    checkpoint: Path, memory_bytes: int, tokens: int, lora: LoraSettings, embeddings: Embeddings, together: int = 0
) -> Fit:
    """The best package and the highest rank, up to `lora.rank`, that fit into `memory_bytes`.

    The package comes first: a lower rank costs less of what is learned than a smaller package. `tokens` and `together`
    are those of a step and of a micro-batch.

    Raises:
        ConfigError: not even half of the layers and rank 4 fit; the message has what they need.
        FedLargeError: as `plan_shrink`.
    """
    architecture = describe(load_config(checkpoint))
    needed = 0
    for keep_layers, keep_neurons in _SHARES:
        if keep_neurons < 1 and architecture.feed_forward is None:
            if keep_layers == 1:
                continue
            keep_neurons = 1.0
        plan = plan_shrink(checkpoint, keep_layers=keep_layers, keep_neurons=keep_neurons, embeddings=embeddings)
        rank = lora.rank
        while rank >= min(_MIN_RANK, lora.rank):
            settings = lora.model_copy(update={"rank": rank})
            needed = client_bytes(architecture, len(plan.kept), plan.package_bytes, settings, tokens, together)
            if needed <= memory_bytes:
                return Fit(keep_layers, keep_neurons, rank, plan, needed)
            rank //= 2
    raise ConfigError(
        f"{memory_bytes / 1e6:.0f} MB are too few for a client of {checkpoint} with {tokens} tokens a step: the "
        f"smallest package needs {needed / 1e6:.0f} MB. Lower max_length or the batch, or leave such clients out."
    )


def derive_adapter(adapter: Path, package: Path, lora: LoraSettings, output: Path) -> AdapterManifest:
    """A tier's part of the federation's adapter: the layers and neurons that its package has, in its rank.

    Of each product the best approximation in `lora.rank` (Eckart-Young), with A near the first rows of the adapter's,
    which it has where B is still zero. What is left out stays with the server: a client's change is what it made of
    its part, and counts as a change of the whole.

    Args:
        adapter: of `exact` or `svd`, or one that was just started.
        package: the tier's, whose layers must be among the adapter's.
        lora: the tier's settings; the targets are the adapter's.
        output: the directory to make.

    Raises:
        ConfigError: layers, rank or targets are not the adapter's or below.
        OutputError: `output` exists or can't be written.
    """
    whole, small = read_manifest(adapter, AdapterManifest), read_manifest(package, PackageManifest)
    architecture = package_architecture(package, small)
    if (
        not set(small.kept_layers) <= set(whole.layers)
        or lora.rank > whole.lora.rank
        or lora.targets != whole.lora.targets
    ):
        raise ConfigError(
            f"A tier with the layers {format_ranges(small.kept_layers)} and rank {lora.rank} is no part of an adapter "
            f"with the layers {format_ranges(whole.layers)} and rank {whole.lora.rank}; make the first the largest."
        )
    reader, factors = AdapterReader(adapter), {}
    for module in expected_shapes(architecture, small.kept_layers, lora):
        entire = reader.read(module)
        part = Factors(entire.A_RI[: lora.rank].contiguous(), entire.B_OR[:, : lora.rank].contiguous())
        if entire.B_OR.any():
            part = truncate([Term(whole.lora.scale, entire)], lora.rank, lora.scale, like=part.A_RI).factors
        # Clients leave out what belongs to neurons they don't have, and send zeros there: no change.
        factors[module] = in_package(module, part, architecture, small.kept_layers)
    with staged_directory(output) as staging:
        write_adapter(staging, factors, lora, architecture, small.base)
        manifest = AdapterManifest(
            files=describe_files(staging),
            base=small.base,
            package=small.digest,
            parent=whole.digest,
            round=whole.round,
            layers=small.kept_layers,
            lora=lora,
            aggregator=whole.aggregator,
        )
        write_manifest(staging, manifest)
    return manifest


@dataclass(frozen=True)
class Pace:
    """Why a client gets a smaller tier than its memory is enough for: seconds a round would take, by tier.

    Attributes:
        seconds: in the tier that it gets.
        above: in the smallest one that is too slow.
        missed: nothing came before a deadline, so that both can be more.
    """

    seconds: float
    above: float
    missed: bool = False


def describe_pace(
    pace: Pace, memory_bytes: int, tokens: int, deadline: float, package: PackageManifest, lora: LoraSettings
) -> str:
    """A client's tier in a line, as the server prints it where the deadline made it a smaller one."""
    layers = f"{len(package.kept_layers)} of {len(package.layers)} layers"
    seconds = f"{pace.seconds:.0f} s a round, where the tier above would take {pace.above:.0f} s"
    said = (
        f"at least {seconds} or more, as nothing came before the last deadline" if pace.missed else f"about {seconds}"
    )
    return (
        f"fits in {memory_bytes / 1e9:.1f} GB at {tokens} tokens and {deadline:g} s: keep {layers}, r={lora.rank}: "
        f"{said}"
    )


def describe_fit(fit: Fit, memory_bytes: int, tokens: int) -> str:
    """The fit in a line, as the server prints it."""
    neurons = f" with {fit.keep_neurons:.0%} of their neurons" if fit.keep_neurons < 1 else ""
    return (
        f"fits in {memory_bytes / 1e9:.1f} GB at {tokens} tokens: keep {len(fit.plan.kept)} of {fit.plan.layers} layers"
        f"{neurons}, r={fit.rank}: {fit.plan.package_bytes / 1e6:.0f} MB to download, about "
        f"{fit.needed_bytes / 1e6:.0f} MB in use"
    )
