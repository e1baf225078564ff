"""Differential privacy: epsilon against other ways to compute it, noise and clipping by statistics, what is refused."""

import functools
import inspect
import math
import os
import random
import sys

import dp_accounting
import mpmath
import numpy as np
import pytest
import torch
import yaml
from dp_accounting.rdp import RdpAccountant
from families import make_checkpoint
from federation import LORA, make_examples, make_federation, make_update
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import chi2, kstest, norm
from test_cards import make_adapter
from test_cards import make_checkpoint as make_merged

from hf_fedlarge.adapters import AdapterReader
from hf_fedlarge.artifacts import AdapterManifest, UpdateManifest, read_manifest
from hf_fedlarge.cards import PRIVACY, render_card
from hf_fedlarge.collect import aggregate_updates
from hf_fedlarge.config import AggregationSettings, DataConfig, FederationConfig, PrivacySettings, load_federation
from hf_fedlarge.errors import ArtifactError, ConfigError, DataError, UpdateRefusedError
from hf_fedlarge.evaluation import Evaluation
from hf_fedlarge.journal import Journal
from hf_fedlarge.ledger import Draw, PrivacyEntry, drawn_again
from hf_fedlarge.lineage import start_adapter
from hf_fedlarge.plan import CheckIn
from hf_fedlarge.privacy import clipped, normal, spent, squared_change, with_noise
from hf_fedlarge.relay import relay_update
from hf_fedlarge.rounds import run_federation
from hf_fedlarge.server import RoundServer
from hf_fedlarge.tensors import Factors
from hf_fedlarge.trainers.launch import LAUNCHERS

PRIVACY_OF = {"clip": 0.5, "noise_multiplier": 1.0, "delta": 1e-5}


def settings(**changes):
    return PrivacySettings(**PRIVACY_OF | changes)


@functools.cache
def epsilon(noise_multiplier, cohort, of, rounds, delta=1e-5):
    return spent(
        settings(noise_multiplier=noise_multiplier, delta=delta), [Draw(cohort=cohort, of=of, rounds=rounds)]
    ).epsilon


def private(**changes):
    return AggregationSettings(aggregator="fedavg", weighting="equal", privacy=settings(**changes))


# Epsilon


@pytest.mark.parametrize(
    ("noise_multiplier", "rounds", "delta", "published"),
    [
        # dp-accounting 0.6, pld/privacy_loss_mechanism_test.py, which was computed with Balle and Wang 2018: a Gaussian
        # of σ = 1 at sensitivity 1 is (1, 0.12693674) and (2, 0.020923636); for REPLACE the same takes twice the noise.
        (2.0, 1, 0.12693674, 1.0),
        (2.0, 1, 0.020923636, 2.0),
        # pld/pld_privacy_accountant_test.py, test_gaussian_basic: three of σ = √3 are (1, 0.126936).
        (2 * math.sqrt(3), 3, 0.126936, 1.0),
    ],
)
def test_without_chance_it_is_the_published_one_of_a_gaussian(noise_multiplier, rounds, delta, published):
    assert epsilon(noise_multiplier, 4, 4, rounds, delta) == pytest.approx(published, abs=1e-3)


@pytest.mark.parametrize(("noise_multiplier", "rounds"), [(2.0, 1), (4.0, 1), (6.0, 20), (20.0, 100)])
def test_without_chance_it_is_that_of_a_gaussian_whose_sum_moves_by_two_clips(noise_multiplier, rounds):
    """The privacy loss of N(1, σ²) against N(0, σ²) integrated as it is defined, by no formula of anybody."""
    sigma, delta = noise_multiplier / 2 / math.sqrt(rounds), 1e-5

    def delta_of(budget):  # ∫ max(0, p(x) − e^ε q(x)) dx; both are normal, and p is larger right of one point
        first = sigma**2 * budget + 0.5
        excess = lambda x: norm.pdf(x, 1, sigma) - math.exp(budget) * norm.pdf(x, 0, sigma)  # noqa: E731
        return quad(excess, first, first + 40 * sigma, epsabs=1e-14, limit=200)[0]

    found = brentq(lambda budget: delta_of(budget) - delta, 1e-6, 50)
    assert epsilon(noise_multiplier, 4, 4, rounds) == pytest.approx(found, abs=1e-3)


def theorem_27(q, sigma, orders):
    """Rényi DP of integer orders, as Wang et al. (1808.00087) write it; with digits enough for alternating sums."""
    of_gaussian = lambda i: mpmath.mpf(i) / (2 * mpmath.mpf(sigma) ** 2)  # noqa: E731

    @functools.cache
    def difference(n):
        signed = ((-1) ** i * mpmath.binomial(n, i) * mpmath.exp((i - 1) * of_gaussian(i)) for i in range(n + 1))
        return mpmath.fsum(signed)

    two = mpmath.exp(of_gaussian(2))
    factors = [1, 0, min(4 * (two - 1), 2 * two)]
    for j in range(3, max(orders) + 1):
        mixed = 4 * mpmath.sqrt(difference(2 * (j // 2)) * difference(2 * -(-j // 2)))
        factors.append(min(mixed, 2 * mpmath.exp((j - 1) * of_gaussian(j))))
    for order in orders:
        terms = (mpmath.mpf(q) ** j * mpmath.binomial(order, j) * factors[j] for j in range(order + 1))
        yield mpmath.log(mpmath.fsum(terms)) / (order - 1)


@pytest.mark.parametrize(
    ("noise_multiplier", "cohort", "of", "rounds"), [(4.0, 20, 1000, 50), (2.0, 20, 1000, 50), (2.0, 50, 10_000, 100)]
)
def test_with_chance_it_is_what_the_theorem_gives(noise_multiplier, cohort, of, rounds):
    """Converted as Canonne et al. 2020 (2004.00010) do, proposition 12."""
    delta, found = 1e-5, []
    with mpmath.workdps(80):
        orders = range(2, 48)
        renyi = theorem_27(mpmath.mpf(cohort) / of, noise_multiplier / 2, orders)
        for order, spent_at in zip(orders, renyi, strict=True):
            converted = mpmath.log(mpmath.mpf(order - 1) / order) - mpmath.log(delta * order) / (order - 1)
            found.append(float(rounds * spent_at + converted))
    assert found.index(min(found)) < len(found) - 1  # no larger order would give less
    assert epsilon(noise_multiplier, cohort, of, rounds) == pytest.approx(min(found), abs=1e-3)


def test_the_accountant_gives_what_abadi_et_al_publish():
    """1607.00133, figure 2: q = 0.01, σ = 4, 10,000 steps are (1.26, 1e-5), by moments up to 32."""
    accountant = RdpAccountant(orders=range(2, 34))
    accountant.compose(dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.GaussianDpEvent(4.0)), 10_000)
    moments = zip(accountant._orders, accountant._rdp, strict=True)
    found = min(spent_at - math.log(1e-5) / (order - 1) for order, spent_at in moments)
    assert found == pytest.approx(1.26, abs=5e-3)
    assert accountant.get_epsilon(1e-5) < found  # as Canonne et al. convert it


def test_the_published_sigma_of_a_gaussian_is_met():
    """σ = √(2 ln 1.25/δ) / ε gives (ε, δ) for ε < 1 (Dwork and Roth 2014, theorem A.1); an accountant needs no more."""
    for claimed in (0.3, 0.9):
        sigma = math.sqrt(2 * math.log(1.25 / 1e-5)) / claimed
        assert 0.6 * claimed < epsilon(2 * sigma, 4, 4, 1) < claimed


def test_chance_is_worth_what_the_theorem_says():
    """Theorem 27 of Wang et al. (1808.00087) at the order 2, the one written out there."""
    q, sigma, rounds, delta = 0.01, 2.0, 100, 1e-5
    two = math.log(1 + q**2 * min(4 * (math.exp(1 / sigma**2) - 1), 2 * math.exp(1 / sigma**2)))
    at_two = rounds * two + math.log1p(-1 / 2) - math.log(delta * 2)
    found = epsilon(2 * sigma, 10, 1000, rounds)
    assert 0.05 < found < at_two
    assert found < epsilon(2 * sigma, 1000, 1000, rounds) / 5


def test_more_noise_costs_less_and_more_rounds_or_a_larger_cohort_cost_more():
    base = epsilon(2.0, 10, 1000, 10)
    assert epsilon(3.0, 10, 1000, 10) < base < epsilon(2.0, 10, 1000, 20)
    assert base < epsilon(2.0, 50, 1000, 10) <= epsilon(2.0, 1000, 1000, 10)
    assert epsilon(0.2, 3, 4, 2) <= epsilon(0.2, 4, 4, 2)  # where the theorem is loose, chance does no harm
    assert spent(settings(), []).epsilon == 0


def test_draws_alike_are_counted_together():
    one, other = Draw(cohort=3, of=9), Draw(cohort=3, of=8)
    draws = drawn_again(drawn_again(drawn_again([], one), other), one)
    assert draws == [other, Draw(cohort=3, of=9, rounds=2)]
    assert spent(settings(), draws).settings == settings()


def test_without_its_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match="pip install dp-accounting"):
        spent(settings(), [])


# Noise and clipping


def test_noise_is_normal_and_nobody_can_repeat_it():
    first, second = normal((300, 400)), normal((300, 400))
    assert kstest(first.flatten().numpy(), "norm").pvalue > 1e-6
    assert first.mean().abs() < 6 / math.sqrt(120_000)
    assert first.std().item() == pytest.approx(1, abs=6 / math.sqrt(240_000))
    assert torch.unique(torch.cat([first, second])).numel() == 240_000
    assert (first * second).mean().abs() < 6 / math.sqrt(120_000)


def test_the_variance_of_noise_is_one_in_many_small_samples_and_no_seed_repeats_it():
    assert inspect.signature(normal).parameters["entropy"].default is os.urandom
    samples = normal((2000, 50))
    pvalue = kstest((50 * samples.var(dim=1, correction=0)).numpy(), chi2(49).cdf).pvalue
    assert pvalue > 1e-6
    assert kstest((samples.mean(dim=1) * math.sqrt(50)).numpy(), "norm").pvalue > 1e-6
    assert kstest((samples**2).flatten().numpy(), chi2(1).cdf).pvalue > 1e-6
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        drawn.append(normal((100,)))
    assert not torch.isclose(*drawn).any()


def test_noise_is_the_inverse_of_the_distribution_of_the_bits_it_is_given():
    """The same word four times is four times the same number; half of the sum is twice that."""
    words = [0, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**63 + 2**61]
    fixed = normal((6,), entropy=lambda count: b"".join(word.to_bytes(8, "little") for word in words))
    tails = [((word % 2**63) + 0.5) / 2**64 for word in words]
    signs = [1 if word >= 2**63 else -1 for word in words]
    reference = torch.tensor([2 * norm.ppf(tail) * sign for tail, sign in zip(tails, signs, strict=True)])
    torch.testing.assert_close(fixed, reference.double(), rtol=1e-6, atol=1e-9)
    assert fixed.isfinite().all()
    assert normal((0, 3)).shape == (0, 3)


def test_noise_comes_to_what_is_trained_alone():
    before = Factors(torch.zeros(2, 3), torch.zeros(4, 2))
    noised = with_noise(before, "B", 0.5)
    assert noised.A_RI is before.A_RI
    assert noised.B_OR.all()


def test_a_change_of_all_modules_together_is_clipped():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    before = {name: Factors(draw(2, 5), draw(7, 2)) for name in "ab"}
    after = {name: Factors(pair.A_RI, pair.B_OR + draw(7, 2)) for name, pair in before.items()}
    length = math.sqrt(sum(squared_change(after[name], before[name]) for name in "ab"))
    assert clipped(after, before, length * 1.01) is after
    short = clipped(after, before, length / 4)
    assert math.sqrt(sum(squared_change(short[name], before[name]) for name in "ab")) == pytest.approx(length / 4)
    for name in "ab":
        torch.testing.assert_close(short[name].B_OR - before[name].B_OR, (after[name].B_OR - before[name].B_OR) / 4)
        assert torch.equal(short[name].A_RI, before[name].A_RI)  # frozen: bit for bit
    assert clipped(before, before, 0.5) is before


def test_no_clipped_change_is_longer_than_the_bound_and_no_short_one_is_touched():
    generator = torch.Generator().manual_seed(1)
    lengths = []
    for power in torch.linspace(-6, 6, 200).tolist():
        before = {"a": Factors(torch.randn(2, 5, generator=generator), torch.randn(7, 2, generator=generator))}
        change = torch.randn(7, 2, generator=generator)
        after = {"a": Factors(before["a"].A_RI, before["a"].B_OR + change * 10**power / change.norm())}
        length = math.sqrt(squared_change(after["a"], before["a"]))
        short = clipped(after, before, 0.5)
        lengths.append(math.sqrt(squared_change(short["a"], before["a"])))
        assert lengths[-1] == pytest.approx(min(length, 0.5), rel=1e-4, abs=1e-6)
        direction = (short["a"].B_OR - before["a"].B_OR).flatten().double() @ change.flatten().double()
        assert length < 1e-3 or direction > 0.999 * lengths[-1] * change.norm()
    assert max(lengths) < 0.5 * (1 + 1e-5)
    assert min(lengths) < 1e-5


# The server


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    path = tmp_path_factory.mktemp("privacy")
    _, package = make_federation(path)
    start_adapter(package, path / "start", LORA, seed=1, aggregator="fedavg", privacy=settings())
    for seed, client in enumerate(("ann", "bob")):
        make_update(path / client, package, client, seed=seed, adapter=path / "start")
    return path


def aggregate(home, output, clients=("ann", "bob"), cohort=4, how=None, previous="start", **more):
    updates = [home / client for client in clients]
    more |= {"previous": home / previous, "draw": Draw(cohort=cohort, of=10)}
    return aggregate_updates(updates, home / "package", output, settings=how or private(), **more).manifest


def changes(directory, home):
    before, after = (AdapterReader(path) for path in (home / "start", directory))
    return {
        module: Factors(*(new.double() - old for new, old in zip(after.read(module), before.read(module), strict=True)))
        for module in before.modules
    }


def flat(parts):
    return torch.cat([factor.flatten() for module in sorted(parts) for factor in parts[module]])


def test_the_server_clips_what_no_client_clipped_and_divides_by_who_was_asked(home, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_fedlarge.privacy.normal", lambda shape: torch.zeros(shape, dtype=torch.float64))
    expected = 0
    for client in ("ann", "bob"):
        vector = flat(changes(home / client, home))
        assert vector.norm() > 10
        expected = expected + vector * 0.5 / vector.norm()
    aggregate(home, tmp_path / "both")
    torch.testing.assert_close(flat(changes(tmp_path / "both", home)), expected / 4, rtol=0, atol=1e-7)
    aggregate(home, tmp_path / "one", clients=["bob"])
    assert flat(changes(tmp_path / "one", home)).norm().item() == pytest.approx(0.5 / 4, rel=1e-4)


def test_its_noise_has_the_deviation_that_is_claimed_and_is_another_one_every_time(home, tmp_path):
    ends = []
    for name in ("first", "second"):
        manifest = aggregate(home, tmp_path / name)
        ends.append(flat(changes(tmp_path / name, home)))
    noise = (ends[0] - ends[1]) / math.sqrt(2)  # the clients' part is the same
    wanted = 1.0 * 0.5 / 4
    assert noise.std().item() == pytest.approx(wanted, rel=5 / math.sqrt(2 * len(noise)))
    assert noise.mean().abs() < 5 * wanted / math.sqrt(len(noise))
    assert kstest((noise / wanted).numpy(), "norm").pvalue > 1e-6
    assert manifest.contributions == []
    assert manifest.energy_dropped == 0


def open_round(where, clients, **more):
    config = {"cohort": 2, "aggregator": "fedavg", "weighting": "equal", "privacy": PRIVACY_OF} | more
    config = FederationConfig(checkpoint="c", data=DataConfig(source="s"), **config)
    validate = lambda number, client, update: read_manifest(update, UpdateManifest)  # noqa: E731
    server = RoundServer(where / "rounds", 1, Journal(where / "journal.jsonl"), config, validate)
    return server, server.open([CheckIn(client, 10) for client in clients])


def test_a_killed_round_takes_the_noise_that_it_has(home, tmp_path):
    seen = []

    def make(updates, late, adapter):
        how = {"settings": private(), "previous": home / "start", "draw": Draw(cohort=2, of=2)}
        aggregate_updates(updates, home / "package", adapter, **how)

    def killed(adapter):
        seen.append(read_manifest(adapter, AdapterManifest).digest)
        raise KeyboardInterrupt

    for _ in range(2):
        server, order = open_round(tmp_path, ["ann", "bob"])
        for client in server.unheard(order):
            server.receive(order, client, home / client)
        with pytest.raises(KeyboardInterrupt):
            server.close(order, make, killed, lambda *_: {})
    assert seen[0] == seen[1]


def test_nobody_can_foresee_whom_a_round_asks(tmp_path):
    drawn = []
    for run in range(10):
        (tmp_path / f"{run}").mkdir()
        server, order = open_round(tmp_path / f"{run}", [f"{index}" for index in range(300)])
        assert server.draw == Draw(cohort=2, of=300)
        drawn.append(order.clients)
    assert len(set(drawn)) > 5  # though the federation's seed is the same


def test_with_secure_aggregation_chance_is_not_counted_for_attempts_are_drawn_until_one_has_enough(tmp_path):
    server, order = open_round(tmp_path, [f"{index}" for index in range(300)], secure={})
    with pytest.raises(UpdateRefusedError):
        server.abandon(order, "0 clients have trained and advertised keys; at least 2 are needed.")
    assert server.open([CheckIn(f"{index}", 10) for index in range(300)]).attempt == 2
    assert server.draw == Draw(cohort=2, of=2)
    assert spent(settings(), [server.draw]).epsilon == epsilon(1.0, 300, 300, 1) > epsilon(1.0, 2, 300, 1)


# Refusals


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"aggregator": "exact"}, "exact doesn't make; use ffa or fedavg"),
        ({"aggregator": "alternate"}, "alternate doesn't make"),
        ({"weighting": "tokens"}, "it needs weighting: equal"),
        ({"aggregator": "ffa", "clip": 1.0}, "has a clip of its own"),
        ({"scaffold": True}, "can't be used with scaffold"),
        ({"selection": "data"}, "it needs selection: uniform"),
        ({"over_select": 0.5}, "leave out over_select"),
        ({"late": "buffer"}, "use late: refuse"),
        ({"cohort": 3, "min_updates": 2}, "leave min_updates at 1"),
        ({"privacy": PRIVACY_OF | {"noise_multiplier": 0.0}}, "greater than or equal to 0.01"),
    ],
)
def test_what_it_does_not_go_with_is_said(more, sentence):
    sound = {"aggregator": "fedavg", "weighting": "equal", "privacy": PRIVACY_OF}
    with pytest.raises(ValueError, match=sentence):
        FederationConfig(checkpoint="c", data={"source": "s"}, **sound | more)


def test_tiers_are_refused_whose_adapters_have_other_shapes():
    with pytest.raises(ValueError, match="tiers"):
        FederationConfig(
            checkpoint="c", data={"source": "s"}, tiers={"small": {"memory": "1GB"}}, aggregator="fedavg",
            weighting="equal", privacy=PRIVACY_OF,
        )  # fmt: skip


def test_it_can_not_be_begun_or_left_or_passed_on_between_two_rounds(home, tmp_path):
    with pytest.raises(ConfigError, match=r"was made with clip=0.5 .*; go on as it was"):
        aggregate(home, tmp_path / "next", how=AggregationSettings(aggregator="fedavg", weighting="equal"))
    with pytest.raises(ConfigError, match="go on as it was"):
        aggregate(home, tmp_path / "next", how=private(clip=9.0))
    with pytest.raises(ConfigError, match="privacy needs --adapter, the draw"):
        aggregate_updates([home / "ann"], home / "package", tmp_path / "next", settings=private())
    with pytest.raises(ConfigError, match="2 updates came of a cohort of 1"):
        aggregate(home, tmp_path / "next", cohort=1)
    aggregate(home, tmp_path / "made")
    with pytest.raises(ArtifactError, match="added once, by the server that clients trust"):
        relay_update(tmp_path / "made", "edge", tmp_path / "relayed")


# What is said


def test_adapters_without_it_keep_their_digests(tmp_path):
    start_dir = make_adapter(tmp_path / "adapter")
    assert b'"privacy"' not in read_manifest(start_dir, AdapterManifest).canonical


def test_a_card_says_epsilon_or_none_and_names_no_client(tmp_path):
    entry = spent(settings(noise_multiplier=8.0), [Draw(cohort=10, of=1000, rounds=3)])
    plain = make_adapter(tmp_path / "plain")
    made = make_adapter(tmp_path / "made", privacy=entry, contributions=[])
    summary = {"privacy": entry.model_dump(), "rounds": [{"refused": [{"client": "mallory", "reason": "bad"}]}]}
    assert PRIVACY in render_card(plain, "me/it", None)
    for directory in (made, make_merged(tmp_path / "merged")):
        card = render_card(directory, "me/it", summary)
        assert f"ε = {entry.epsilon:.3g} at δ = 1e-05, after 3 rounds" in card
        assert "10 of 1000 clients" in card
        assert "mallory" not in card


def test_a_run_reports_epsilon_and_clients_clip_what_they_send(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "checkpoint", layers=2, tokenizer=True)
    make_examples(tmp_path / "data.jsonl", count=12)
    federation = {
        "checkpoint": str(tmp_path / "checkpoint"),
        "data": {"source": str(tmp_path / "data.jsonl"), "clients": 3, "held_out": 0.2},
        "keep_layers": 2,
        "lora": {"rank": 4, "alpha": 8},
        "rounds": 2,
        "cohort": 2,
        "aggregator": "ffa",
        "weighting": "equal",
        "privacy": PRIVACY_OF | {"clip": 0.01},
        "client_eval_examples": 0,
        "training": {"max_steps": 1, "learning_rate": 1e-2, "max_length": 64, "disable_tqdm": True},
    }
    (tmp_path / "federation.yaml").write_text(yaml.safe_dump(federation))
    lines, lengths = [], []
    train = LAUNCHERS["inprocess"]()

    def watched(job):
        manifest = train(job)
        update, before = AdapterReader(job.output), AdapterReader(job.adapter)
        lengths.append(math.sqrt(sum(squared_change(update.read(name), before.read(name)) for name in before.modules)))
        return manifest

    config = load_federation(tmp_path / "federation.yaml")
    with monkeypatch.context() as patched:  # a broken adapter is no reason to draw again
        broken = lambda *_, **how: Evaluation(math.nan if how["adapter"] else 2.0, tokens=1, examples=1)  # noqa: E731
        patched.setattr("hf_fedlarge.rounds.evaluate", broken)
        with pytest.raises(DataError, match="the model or its adapter is broken"):
            run_federation(config, tmp_path / "run", watched)
    summary = run_federation(config, tmp_path / "run", watched, lines.append)
    assert lengths == pytest.approx([0.01] * 4, rel=1e-4)
    spents = [PrivacyEntry(**entry["privacy"]) for entry in summary["rounds"]]
    assert spents[1].draws == [Draw(cohort=2, of=3, rounds=2)]
    assert 0 < spents[0].epsilon < spents[1].epsilon == summary["privacy"]["epsilon"]
    said = [line for line in lines if "committed" in line]
    assert [f"ε = {entry.epsilon:.3g}" in line for entry, line in zip(spents, said, strict=True)] == [True, True]
    last = tmp_path / "run" / "rounds" / "0002" / "adapter"
    assert read_manifest(last, AdapterManifest).privacy == spents[1]
    for client in ("client-", "examples"):
        assert client not in (last / "fedlarge.json").read_text()
    first = AdapterReader(tmp_path / "run" / "rounds" / "0000" / "adapter")
    for name in first.modules:
        assert torch.equal(AdapterReader(last).read(name).A_RI, first.read(name).A_RI)
