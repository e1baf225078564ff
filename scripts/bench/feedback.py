"""What codecs cost a federation, and ways to give back what they lose, on a problem small enough to repeat.

    python scripts/bench/feedback.py [--rounds 20] [--seeds 2] [--codecs nf4 topk=0.05 topk=0.2] [--json feedback.json]

Four clients fit B A to matrices that differ a little, a dozen steps of Adam between two rounds. A figure is the share
of fp32's gain on their mean that is left. Ways:

    none     what is lost is forgotten
    add      it is added to the next change (arXiv 1901.09847)
    start    the client starts from the adapter plus what is lost (`hf_fedlarge/feedback.py`)

and the latter two with what is lost turned into the aggregate's basis (`+turn`) or as it was. `exact` has its carry and
no server optimizer. With `--json` a run that was stopped goes on when it is begun again.
"""

from __future__ import annotations

import argparse
import itertools
from functools import partial
from pathlib import Path

import torch
from harness import Figures, Rows, write_report

from hf_fedlarge.aggregate import Change, exact, fedavg
from hf_fedlarge.codec import decode, encode
from hf_fedlarge.config import Codec
from hf_fedlarge.feedback import Lost, turn
from hf_fedlarge.products import Term
from hf_fedlarge.tensors import Factors

OUT, IN, RANK, CLIENTS = 48, 64, 8, 4
CARRY_RANK = 4 * RANK
AGGREGATORS = ("exact", "fedavg")
WAYS = ("none", "add", "add+turn", "start", "start+turn")


def federate(aggregator: str, taking_part: float, codec: Codec, way: str, seed: int, rounds: int) -> Figures:
    """Squared distances from the clients' mean, beyond that of the best B A: at the end, and at the start."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    U, V = torch.linalg.qr(normal(OUT, OUT))[0], torch.linalg.qr(normal(IN, IN))[0]
    sizes = 2 * 0.75 ** torch.arange(OUT)
    mean_OI = (U * sizes) @ V[:, :OUT].T
    targets = [mean_OI + 0.02 * normal(OUT, IN) for _ in range(CLIENTS)]
    bound = IN**-0.5
    parent = Factors(torch.empty(RANK, IN).uniform_(-bound, bound, generator=generator), torch.zeros(OUT, RANK))
    carry: Factors | None = None
    lost: dict[int, Lost] = {}
    for _ in range(rounds):
        cohort = [client for client in range(CLIENTS) if torch.rand(1, generator=generator).item() < taking_part] or [0]
        updates = []
        for client in cohort:
            carried = Factors(*map(torch.zeros_like, parent))
            if way != "none" and client in lost:
                carried = turn(lost[client], parent.A_RI) if way.endswith("turn") else lost[client].factors
            start = Factors(*map(torch.add, parent, carried)) if way.startswith("start") else parent
            trained = train(start, targets[client], generator)
            if way.startswith("add"):
                trained = Factors(*map(torch.add, trained, carried))
            received = trained
            if codec.name != "fp32":
                received = Factors(
                    parent.A_RI + there_and_back(trained.A_RI - parent.A_RI, codec),
                    parent.B_OR + there_and_back((trained.B_OR - parent.B_OR).T, codec).T,
                )
            lost[client] = Lost(Factors(*map(torch.sub, trained, received)), received.A_RI)
            updates.append(received)
        changes = [Change(1 / len(updates), 1.0, update, parent) for update in updates]
        if aggregator == "exact":
            more = [Term(1.0, carry)] if carry else []
            parent, _, _, carry, _ = exact(changes, RANK, 1.0, parent=parent, more=more, carry_rank=CARRY_RANK)
        else:
            parent = fedavg(changes, RANK, 1.0, parent=parent).factors
    best = sizes[RANK:].square().sum().item()
    distance = (parent.B_OR @ parent.A_RI - mean_OI).square().sum().item()
    return {"end": distance - best, "start": sizes.square().sum().item() - best}


def train(start: Factors, target_OI: torch.Tensor, generator: torch.Generator) -> Factors:
    """A dozen steps of Adam on fresh inputs."""
    A_RI, B_OR = (factor.clone().requires_grad_() for factor in start)
    optimizer = torch.optim.Adam([A_RI, B_OR], lr=4e-3)
    for _ in range(12):
        X_IN = torch.randn(IN, 32, generator=generator)
        optimizer.zero_grad()
        (B_OR @ (A_RI @ X_IN) - target_OI @ X_IN).square().mean().backward()
        optimizer.step()
    return Factors(A_RI.detach(), B_OR.detach())


def there_and_back(change_RX: torch.Tensor, codec: Codec) -> torch.Tensor:
    """A change as it arrives."""
    return decode(encode(change_RX, codec), codec, tuple(change_RX.shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--codecs", nargs="+", default=["int8", "nf4", "topk=0.05", "topk=0.2"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, and go on with those in it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pairs = [("fp32", "none"), *itertools.product(options.codecs, WAYS)]
    planned = [
        {"aggregator": aggregator, "taking_part": taking_part, "codec": codec, "way": way, "seed": seed}
        for aggregator, taking_part, (codec, way), seed in itertools.product(
            AGGREGATORS, (1.0, 0.5), pairs, range(options.seeds)
        )
    ]
    rows = Rows(options.json, {"rounds": options.rounds}, planned)
    for key in planned:
        rows.row(key, partial(federate, **key | {"codec": parse(key["codec"])}, rounds=options.rounds))
    report = rows.report()
    report["shares"] = show(report["rows"], options.codecs)
    if options.json:
        write_report(options.json, report)
    print(f"{report['seconds']:.0f} s in all")


def parse(text: str) -> Codec:
    """`topk=0.05`, or a name."""
    name, _, share = text.partition("=")
    return Codec(name=name, topk_share=float(share or 0.05))


def show(rows: list[Figures], codecs: list[str]) -> list[Figures]:
    """The table on standard output: what is left of fp32's gain, from the sums over seeds."""

    def gain(**key: object) -> float:
        return sum(row["start"] - row["end"] for row in rows if row.items() >= key.items())

    shares = []
    print(f"{'':34}" + "".join(f"{way:>12}" for way in WAYS))
    for aggregator, taking_part, codec in itertools.product(AGGREGATORS, (1.0, 0.5), codecs):
        which = {"aggregator": aggregator, "taking_part": taking_part}
        plain = gain(**which, codec="fp32")
        kept = {way: gain(**which, codec=codec, way=way) / plain for way in WAYS}
        shares.append(which | {"codec": codec} | kept)
        title = f"{aggregator}, {taking_part:.0%} take part, {codec}"
        print(f"{title:34}" + "".join(f"{share:12.3f}" for share in kept.values()))
    return shares


if __name__ == "__main__":
    main()
