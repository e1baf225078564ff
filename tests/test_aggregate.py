"""Every aggregator against the dense fp64 sum, which the library never makes."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fedlarge.aggregate import Change, exact, fedavg, shares
from hf_fedlarge.config import LoraSettings
from hf_fedlarge.errors import ConfigError
from hf_fedlarge.privacy import with_noise
from hf_fedlarge.products import Term, decompose, distance, inner
from hf_fedlarge.tensors import Factors

HOW = ("svd", "fedavg")
reproducible = settings(deadline=None, derandomize=True, max_examples=60)

RELATIVE = 1e-6  # what fp32 factors keep of an fp64 product


def make_factors(rank, out_features, in_features, seed):
    generator = torch.Generator().manual_seed(seed)
    A_RI = torch.randn(rank, in_features, generator=generator)
    return Factors(A_RI, torch.randn(out_features, rank, generator=generator))


def product(factors, scale):
    return scale * factors.B_OR.double() @ factors.A_RI.double()


def dense_sum(factors, weights, scales):
    """The oracle: normalised weights times dense products, added up."""
    total = sum(weights)
    return sum(
        weight / total * product(client, scale) for client, weight, scale in zip(factors, weights, scales, strict=True)
    )


def make_changes(factors, weights, scales, base=None):
    return [
        Change(share, own, client, base) for share, own, client in zip(shares(weights), scales, factors, strict=True)
    ]


def aggregate(how, factors, weights, scales, rank, scale):
    changes = make_changes(factors, weights, scales)
    return exact(changes, rank, scale, carry_rank=0) if how == "svd" else fedavg(changes, rank, scale)


def assert_close(found, expected, reference=None):
    size = (expected if reference is None else reference).norm().item()
    assert (found - expected).norm().item() <= RELATIVE * size


@st.composite
def federations(draw):
    """Clients of mixed ranks, scales (alpha / r or rsLoRA) and weights, and what is wanted of the aggregate."""
    out_features, in_features = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    count = draw(st.integers(1, 5))
    seed = draw(st.integers(0, 2**32))
    ranks = draw(st.lists(st.integers(1, 6), min_size=count, max_size=count))
    factors = [make_factors(rank, out_features, in_features, seed + i) for i, rank in enumerate(ranks)]
    weights = draw(st.lists(st.floats(1e-3, 1e3), min_size=count, max_size=count))
    scales = [
        LoraSettings(rank=rank, alpha=draw(st.floats(0.5, 64)), rslora=draw(st.booleans())).scale for rank in ranks
    ]
    return factors, weights, scales, draw(st.integers(1, 14)), draw(st.floats(0.1, 10))


@reproducible
@given(federations())
def test_exact_is_the_best_approximation_of_the_dense_sum(federation):
    factors, weights, scales, rank, scale = federation
    found = aggregate("svd", *federation)
    dense = dense_sum(factors, weights, scales)
    out_features, in_features = dense.shape
    assert found.factors.A_RI.shape == (rank, in_features)
    assert found.factors.B_OR.shape == (out_features, rank)
    assert found.factors.A_RI.dtype == found.factors.B_OR.dtype == torch.float32

    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    best = U[:, :rank] * S[:rank] @ Vh[:rank]
    error = (product(found.factors, scale) - dense).norm().item()
    assert error == pytest.approx((best - dense).norm().item(), abs=RELATIVE * dense.norm().item())
    assert found.energy == pytest.approx(S.square().sum().item(), rel=1e-9)
    assert found.dropped == pytest.approx(S[rank:].square().sum().item(), abs=1e-9 * found.energy)


@reproducible
@given(federations())
def test_rows_of_a_are_orthonormal_whatever_the_rank(federation):
    A_RI = aggregate("svd", *federation).factors.A_RI.double()
    rank, in_features = A_RI.shape
    first = A_RI[:in_features]
    torch.testing.assert_close(first @ first.T, torch.eye(len(first), dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(A_RI.norm(dim=1), torch.ones(rank, dtype=torch.float64), atol=1e-6, rtol=0)


@reproducible
@given(federations(), st.randoms(use_true_random=False))
def test_order_of_clients_is_irrelevant(federation, random):
    factors, weights, scales, _, scale = federation
    dense = dense_sum(factors, weights, scales)
    order = random.sample(range(len(factors)), len(factors))
    shuffled = ([values[i] for i in order] for values in (factors, weights, scales))
    # In full rank: where two singular values are equal, which direction a truncation drops is anybody's choice.
    one = aggregate("svd", factors, weights, scales, min(dense.shape), scale)
    other = aggregate("svd", *shuffled, min(dense.shape), scale)
    assert_close(product(one.factors, scale), product(other.factors, scale))
    assert one.energy == pytest.approx(other.energy, rel=1e-9)


def test_order_of_clients_is_irrelevant_to_the_factors_too():
    factors = [make_factors(4, 20, 30, seed) for seed in range(3)]
    aggregates = [
        aggregate("svd", [factors[i] for i in order], [1.0, 1.0, 1.0], [2.0] * 3, 4, 2.0).factors
        for order in itertools.permutations(range(3))
    ]
    for other in aggregates[1:]:
        torch.testing.assert_close(other.A_RI, aggregates[0].A_RI, atol=1e-6, rtol=0)
        torch.testing.assert_close(other.B_OR, aggregates[0].B_OR, atol=1e-5, rtol=0)


@reproducible
@given(federations())
def test_one_client_comes_back_as_it_was(federation):
    factors, weights, scales, _, scale = federation
    client, own = factors[0], scales[0]
    found = aggregate("svd", [client], weights[:1], [own], len(client.A_RI), scale)
    assert_close(product(found.factors, scale), product(client, own))
    same = aggregate("fedavg", [client], weights[:1], [own], len(client.A_RI), own)
    assert torch.equal(same.factors.A_RI, client.A_RI)
    assert torch.equal(same.factors.B_OR, client.B_OR)


@reproducible
@given(federations())
def test_identical_updates_average_to_themselves(federation):
    factors, weights, scales, _, scale = federation
    client, own, rank = factors[0], scales[0], len(factors[0].A_RI)
    count = len(weights)
    found = aggregate("svd", [client] * count, weights, [own] * count, rank, scale)
    assert_close(product(found.factors, scale), product(client, own))
    assert found.dropped <= 1e-12 * found.energy
    mean = aggregate("fedavg", [client] * count, weights, [own] * count, rank, own)
    assert_close(product(mean.factors, own), product(client, own))
    assert mean.dropped <= 1e-12 * mean.energy


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_client_of_weight_zero_has_no_influence(how, position):
    factors = [make_factors(4, 10, 8, seed) for seed in range(2)]
    poison = Factors(torch.full((7, 8), torch.nan), torch.full((10, 7), torch.inf))
    without = aggregate(how, factors, [1.0, 3.0], [2.0, 2.0], 4, 2.0)
    crowd = [*factors[:position], poison, *factors[position:]]
    weights, scales = [1.0, 3.0], [2.0, 2.0]
    weights.insert(position, 0.0)
    scales.insert(position, 99.0)
    found = aggregate(how, crowd, weights, scales, 4, 2.0)
    assert torch.equal(found.factors.A_RI, without.factors.A_RI)
    assert torch.equal(found.factors.B_OR, without.factors.B_OR)
    assert (found.energy, found.dropped) == (without.energy, without.dropped)


@pytest.mark.parametrize("how", HOW)
@reproducible
@given(factor=st.floats(1e-6, 1e6))
def test_only_the_ratio_of_weights_counts(how, factor):
    factors = [make_factors(3, 6, 9, seed) for seed in range(3)]
    weights = [1.0, 2.5, 0.5]
    one = aggregate(how, factors, weights, [2.0] * 3, 3, 2.0)
    other = aggregate(how, factors, [weight * factor for weight in weights], [2.0] * 3, 3, 2.0)
    assert_close(product(one.factors, 2.0), product(other.factors, 2.0))


@reproducible
@given(scale=st.floats(1e-3, 1e3))
def test_the_scale_asked_for_does_not_change_the_product(scale):
    factors = [make_factors(3, 6, 9, seed) for seed in range(3)]
    one = aggregate("svd", factors, [1.0, 2.0, 3.0], [0.5, 1.0, 4.0], 4, 1.0)
    other = aggregate("svd", factors, [1.0, 2.0, 3.0], [0.5, 1.0, 4.0], 4, scale)
    assert_close(product(one.factors, 1.0), product(other.factors, scale))
    assert (one.energy, one.dropped) == (other.energy, other.dropped)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (3, 2), (1, 1)])
def test_no_update_at_all_gives_a_fresh_adapter(shape):
    silent = [Factors(make_factors(4, *shape, seed).A_RI, torch.zeros(shape[0], 4)) for seed in range(2)]
    found = aggregate("svd", silent, [1.0, 2.0], [2.0, 2.0], 4, 2.0)
    assert not found.factors.B_OR.any()
    assert found.factors.A_RI.norm(dim=1).gt(0.9).all()
    assert found.energy == found.dropped == 0
    again = aggregate("svd", silent[::-1], [2.0, 1.0], [2.0, 2.0], 4, 2.0)
    assert torch.equal(found.factors.A_RI, again.factors.A_RI)


def test_clients_that_cancel_give_zero_and_not_noise():
    client = make_factors(4, 30, 20, 0)
    opposite = Factors(client.A_RI, -client.B_OR)
    found = aggregate("svd", [client, opposite], [1.0, 1.0], [2.0, 2.0], 4, 2.0)
    assert not found.factors.B_OR.any()
    assert found.energy == 0


def test_a_direction_of_no_weight_can_still_learn():
    client = make_factors(2, 10, 12, 0)
    found = aggregate("svd", [client], [1.0], [1.0], 5, 1.0)
    assert not found.factors.B_OR[:, 2:].any()
    A_RI = found.factors.A_RI.clone().requires_grad_()
    B_OR = found.factors.B_OR.clone().requires_grad_()
    (B_OR @ A_RI @ torch.randn(12, 3, generator=torch.Generator().manual_seed(1))).square().sum().backward()
    assert B_OR.grad[:, 2:].norm(dim=0).gt(0).all()


def test_signs_are_those_of_the_largest_entries_of_b():
    B_OR = aggregate("svd", [make_factors(4, 9, 7, 0)], [1.0], [1.0], 4, 1.0).factors.B_OR
    assert B_OR.gather(0, B_OR.abs().argmax(0, keepdim=True)).gt(0).all()


@reproducible
@given(st.integers(0, 2**32), st.lists(st.floats(0.01, 100), min_size=2, max_size=5))
def test_fedavg_is_the_mean_of_the_factors(seed, weights):
    factors = [make_factors(3, 7, 5, seed + i) for i in range(len(weights))]
    scale = 1.5
    found = aggregate("fedavg", factors, weights, [scale] * len(weights), 3, scale)
    shares = [weight / sum(weights) for weight in weights]
    mean_A = sum(share * client.A_RI.double() for share, client in zip(shares, factors, strict=True))
    mean_B = sum(share * client.B_OR.double() for share, client in zip(shares, factors, strict=True))
    assert_close(found.factors.A_RI.double(), mean_A)
    assert_close(found.factors.B_OR.double(), mean_B)

    dense = dense_sum(factors, weights, [scale] * len(weights))
    assert found.energy == pytest.approx(dense.square().sum().item(), rel=1e-9)
    lost = dense - scale * mean_B @ mean_A
    assert found.dropped == pytest.approx(lost.square().sum().item(), rel=1e-9, abs=1e-12 * found.energy)


def test_averaging_factors_is_not_averaging_products():
    factors = [make_factors(8, 64, 48, seed) for seed in range(8)]
    found = aggregate("fedavg", factors, [1.0] * 8, [2.0] * 8, 8, 2.0)
    assert found.dropped > 0.5 * found.energy
    assert aggregate("svd", factors, [1.0] * 8, [2.0] * 8, 48, 2.0).dropped == 0


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("weights", [[1.0, -1.0], [1.0, float("nan")], [1.0, float("inf")], [1e308, 1e308]])
def test_bad_weights_are_refused(how, weights):
    with pytest.raises(ConfigError, match="finite ones, none negative"):
        aggregate(how, [make_factors(2, 3, 4, seed) for seed in range(2)], weights, [1.0, 1.0], 2, 1.0)


@pytest.mark.parametrize("how", HOW)
def test_where_all_weights_are_zero_all_count_alike(how):
    factors = [make_factors(2, 3, 4, seed) for seed in range(2)]
    zero, alike = (aggregate(how, factors, [weight] * 2, [1.0, 1.0], 2, 1.0).factors for weight in (0.0, 1.0))
    assert all(map(torch.equal, zero, alike))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(("rank", "scale"), [(0, 1.0), (-1, 1.0), (2, 0.0), (2, float("nan")), (2, -1.0)])
def test_bad_rank_or_scale_is_refused(how, rank, scale):
    with pytest.raises(ConfigError, match="expected positive numbers"):
        aggregate(how, [make_factors(2, 3, 4, 0)], [1.0], [1.0], rank, scale)


@pytest.mark.parametrize(("ranks", "scales"), [((2, 3), (1.0, 1.0)), ((2, 2), (1.0, 2.0)), ((3, 3), (1.0, 1.0))])
def test_fedavg_refuses_mixed_ranks_and_scales(ranks, scales):
    factors = [make_factors(rank, 5, 6, rank) for rank in ranks]
    with pytest.raises(ConfigError, match="use the aggregator exact"):
        aggregate("fedavg", factors, [1.0, 1.0], list(scales), 2, 1.0)


# --- error feedback --------------------------------------------------------------------------------------------------


def state(found, scale):
    return product(found.factors, scale) + (product(found.carry, scale) if found.carry else 0)


@reproducible
@given(federations())
def test_what_does_not_fit_is_carried_and_nothing_is_lost(federation):
    factors, weights, scales, rank, scale = federation
    changes = make_changes(factors, weights, scales)
    found = exact(changes, rank, scale)
    dense = dense_sum(factors, weights, scales)
    assert_close(state(found, scale), dense)
    assert found.dropped <= 1e-20 * found.energy
    assert found.carried == pytest.approx(torch.linalg.svdvals(dense)[rank:].square().sum().item(), abs=1e-9)
    plain = aggregate("svd", *federation)
    assert torch.equal(found.factors.A_RI, plain.factors.A_RI)  # what clients get doesn't depend on the carry's bound
    assert torch.equal(found.factors.B_OR, plain.factors.B_OR)


@reproducible
@given(federations(), st.integers(0, 4), st.sampled_from([0.0, 1e-3, 0.1, 0.5]))
def test_a_bounded_carry_drops_what_it_says(federation, carry_rank, carry_energy):
    factors, weights, scales, rank, scale = federation
    changes = make_changes(factors, weights, scales)
    found = exact(changes, rank, scale, carry_rank=carry_rank, carry_energy=carry_energy)
    dense = dense_sum(factors, weights, scales)
    S = torch.linalg.svdvals(dense)
    carried = len(found.carry.A_RI) if found.carry else 0
    assert carried <= carry_rank
    lost = S[rank + carried :].square().sum().item()
    assert found.dropped == pytest.approx(lost, abs=1e-9 * found.energy)
    assert (dense - state(found, scale)).norm().item() == pytest.approx(lost**0.5, abs=RELATIVE * dense.norm().item())
    if carried:  # one direction less would have left more than the share
        assert S[rank + carried - 1 :].square().sum().item() > 0.999 * carry_energy * found.energy
    if carried < carry_rank:
        assert lost <= 1.001 * carry_energy * found.energy + 1e-12 * found.energy


@reproducible
@given(st.integers(0, 2**32), st.booleans())
def test_adapter_and_carry_are_the_oracle_after_twenty_rounds(seed, mixed):
    """Clients start from the adapter alone; the carry goes from round to round. Every round's change is random."""
    rank, scale, shape = 3, 2.0, (14, 11)
    parent, more, oracle = None, [], torch.zeros(shape, dtype=torch.float64)
    for round_number in range(20):
        ranks = [1 + (seed + i) % 5 if mixed else rank for i in range(4)]
        news = [make_factors(own, *shape, seed + 100 * round_number + i) for i, own in enumerate(ranks)]
        weights = [1.0 + (seed + i) % 3 for i in range(4)]
        started = [] if parent is None else [parent]
        clients = [  # what it started from, and what it learned beside
            Factors(
                torch.cat([start.A_RI for start in started] + [new.A_RI]),
                torch.cat([start.B_OR for start in started] + [new.B_OR], dim=1),
            )
            for new in news
        ]
        oracle = oracle + dense_sum(news, weights, [scale] * 4)
        found = exact(make_changes(clients, weights, [scale] * 4, parent), rank, scale, parent=parent, more=more)
        parent, more = found.factors, [Term(scale, found.carry)] if found.carry else []
        assert found.dropped <= 1e-20 * found.energy
    assert (state(found, scale) - oracle).norm() <= 1e-5 * oracle.norm()
    assert (product(found.factors, scale) - oracle).norm() > 1e-2 * oracle.norm()  # the carry is needed


@reproducible
@given(federations(), st.lists(st.floats(0.01, 1), min_size=5, max_size=5))
def test_changes_that_count_for_less_are_measured_from_what_they_started_from(federation, parts):
    """Clipping, lateness and a server's learning rate: parent + Σ share · part · (client − base)."""
    factors, weights, scales, rank, _ = federation
    own = scales[0]
    parent, old = (make_factors(2, *factors[0].B_OR.shape[:1], factors[0].A_RI.shape[1], seed) for seed in (7, 8))
    changes = [
        Change(share * part, own, client, old if i % 2 else parent)
        for i, (share, part, client) in enumerate(zip(shares(weights), parts, factors, strict=False))
    ]
    found = exact(changes, rank, own, parent=parent)
    expected = product(parent, own)
    for change in changes:
        expected = expected + change.share * (product(change.factors, own) - product(change.base, own))
    assert_close(state(found, own), expected, reference=expected.abs() + product(parent, own).abs())


# --- one factor frozen -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ["A", "B"])
@reproducible
@given(st.integers(0, 2**32), st.lists(st.floats(0.01, 100), min_size=1, max_size=5))
def test_with_one_factor_frozen_averaging_factors_is_exact(trained, seed, weights):
    parent, scale = make_factors(3, 7, 5, seed), 1.5
    own = [make_factors(3, 7, 5, seed + 1 + i) for i in range(len(weights))]
    if trained == "A":
        clients = [Factors(client.A_RI, parent.B_OR.clone()) for client in own]
    else:
        clients = [Factors(parent.A_RI.clone(), client.B_OR) for client in own]
    changes = make_changes(clients, weights, [scale] * len(weights), parent)
    found = fedavg(changes, 3, scale, parent=parent, trained=trained)
    assert_close(product(found.factors, scale), dense_sum(clients, weights, [scale] * len(weights)))
    assert torch.equal(found.factors["BA".index(trained)], parent["BA".index(trained)])
    assert found.dropped == 0
    assert found.energy == pytest.approx(product(found.factors, scale).square().sum().item(), rel=1e-5)


def test_a_factor_that_was_to_stay_is_not_averaged():
    clients = [make_factors(3, 7, 5, seed) for seed in range(2)]
    with pytest.raises(ConfigError, match="Clients' A differ, though only B was to be trained"):
        fedavg(make_changes(clients, [1.0, 1.0], [1.0, 1.0]), 3, 1.0, trained="B")


@pytest.mark.parametrize("trained", ["both", "A", "B"])
def test_one_client_comes_back_bit_for_bit(trained):
    parent = make_factors(3, 7, 5, 0)
    client = make_factors(3, 7, 5, 1)
    client = {"both": client, "A": Factors(client.A_RI, parent.B_OR), "B": Factors(parent.A_RI, client.B_OR)}[trained]
    found = fedavg([Change(1.0, 2.0, client, parent)], 3, 2.0, parent=parent, trained=trained)
    assert torch.equal(found.factors.A_RI.view(torch.int32), client.A_RI.view(torch.int32))
    assert torch.equal(found.factors.B_OR.view(torch.int32), client.B_OR.view(torch.int32))


# --- many columns ----------------------------------------------------------------------------------------------------


def make_crowd(count, falling=True):
    """Clients who agree on some directions and each add a little of their own; 400 columns or more."""
    common = make_factors(8, 90, 70, 0)
    noise = [make_factors(8, 90, 70, seed) for seed in range(1, count + 1)]
    size = 0.3 if falling else 30.0
    return [Term(1 / count, common)] * count + [Term(size / count, other) for other in noise]


def dense_terms(terms):
    return sum(coefficient * B_OR.double() @ A_RI.double() for coefficient, (A_RI, B_OR) in terms)


@pytest.mark.parametrize("falling", [True, False])
def test_many_columns_are_decomposed_nearly_as_well_and_the_energy_is_known(falling):
    terms = make_crowd(60, falling)
    dense = dense_terms(terms)
    U_OK, S_K, V_KI, energy = decompose(terms, 8)
    kept = U_OK[:, :8] * S_K[:8] @ V_KI[:8]
    best = torch.linalg.svdvals(dense)[8:].norm().item()
    # Where singular values don't fall, which directions are kept hardly matters.
    assert (dense - kept).norm().item() <= (1.001 if falling else 1.1) * best
    assert energy == pytest.approx(dense.square().sum().item(), rel=0.01 if falling else 0.15)
    again = decompose(terms, 8)
    assert torch.equal(again.V_KI, V_KI)
    torch.testing.assert_close(V_KI @ V_KI.T, torch.eye(len(V_KI), dtype=torch.float64), atol=1e-5, rtol=0)


def test_many_columns_of_a_low_rank_are_exact_to_fp32():
    client = make_factors(8, 90, 70, 0)
    terms = [Term(1 / 60, Factors(client.A_RI.clone(), client.B_OR.clone())) for _ in range(60)]
    U_OK, S_K, V_KI, energy = decompose(terms, 12)
    dense = dense_terms(terms)
    assert len(S_K) == 8
    assert (dense - U_OK * S_K @ V_KI).norm() <= 1e-5 * dense.norm()
    assert energy == pytest.approx(dense.square().sum().item(), rel=1e-5)


@reproducible
@given(federations(), st.integers(0, 2**32))
def test_inner_products_and_distances_are_those_of_dense_matrices(federation, seed):
    factors, weights, scales, rank, scale = federation
    left = [Term(weight, client) for weight, client in zip(weights, factors, strict=True)]
    right = [Term(own, client) for own, client in zip(scales, factors, strict=True)]
    size = dense_terms(left).norm() * dense_terms(right).norm()
    expected = (dense_terms(left) * dense_terms(right)).sum().item()
    assert inner(left, right) == pytest.approx(expected, rel=1e-9, abs=1e-9 * size.item())
    other = Term(scale, make_factors(rank, *factors[0].B_OR.shape[:1], factors[0].A_RI.shape[1], seed))
    energy, apart = distance(left, other)
    assert energy == pytest.approx(dense_terms(left).square().sum().item(), rel=1e-9)
    expected = (dense_terms(left) - dense_terms([other])).square().sum().item()
    assert apart == pytest.approx(expected, rel=1e-9, abs=1e-9 * energy)


def test_of_clients_that_started_from_the_same_each_column_counts_once():
    """17 clients of rank 16 are few enough for exact norms, although their changes have twice the columns."""
    parent = make_factors(16, 20, 30, seed=99)
    clients = [make_factors(16, 20, 30, seed) for seed in range(17)]
    result = fedavg([Change(1 / 17, 2.0, client, parent) for client in clients], 16, 2.0, parent=parent)
    dense = dense_terms([Term(2.0 / 17, client) for client in clients])
    assert result.energy == pytest.approx(dense.square().sum().item(), rel=1e-9)
    lost = dense - 2.0 * result.factors.B_OR.double() @ result.factors.A_RI.double()
    assert result.dropped == pytest.approx(lost.square().sum().item(), rel=1e-5)


def test_the_norm_of_many_columns_is_estimated():
    terms = make_crowd(70)
    mean = Term(1.0, make_factors(8, 90, 70, 0))
    energy, apart = distance(terms, mean)
    dense = dense_terms(terms)
    assert energy == pytest.approx(dense.square().sum().item(), rel=0.5)
    assert apart == pytest.approx((dense - dense_terms([mean])).square().sum().item(), rel=0.2)


@pytest.mark.parametrize("trained", ["B", "both"])
def test_noise_in_fp64_is_added_to_however_many_clients(trained):
    """40 clients of rank 16 have more columns than are summed in fp64, among which privacy's noise is one change."""
    parent = make_factors(16, 20, 30, seed=99)
    clients = [make_factors(16, 20, 30, seed) for seed in range(40)]
    if trained == "B":
        clients = [Factors(parent.A_RI, B_OR) for _, B_OR in clients]
    noisy = with_noise(parent, trained, 0.1)
    changes = [Change(1 / 50, 2.0, client, parent) for client in clients] + [Change(1.0, 2.0, noisy, parent)]
    result = fedavg(changes, 16, 2.0, parent=parent, trained=trained)
    for found, before, noise, own in zip(result.factors, parent, noisy, zip(*clients, strict=True), strict=True):
        expected = noise + sum(factor.double() - before for factor in own) / 50
        torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=1e-6)


def test_a_stays_as_near_to_the_parent_s_as_a_rotation_allows():
    """Of all A with rows of one length and the same products, none is nearer; so clients' coordinates stay."""
    parent = make_factors(4, 20, 30, seed=0)
    noise = [make_factors(4, 20, 30, seed) for seed in (1, 2, 3)]
    clients = [Factors(parent.A_RI + 0.05 * A_RI, parent.B_OR + B_OR) for A_RI, B_OR in noise]
    plain, near = (
        exact([Change(1 / 3, 2.0, client, base) for client in clients], 4, 2.0, parent=base, carry_rank=0).factors
        for base in (None, parent)
    )
    torch.testing.assert_close(near.B_OR @ near.A_RI, plain.B_OR @ plain.A_RI, atol=1e-4, rtol=1e-4)
    length = parent.A_RI.norm() / 2
    torch.testing.assert_close(near.A_RI @ near.A_RI.T, length**2 * torch.eye(4), atol=1e-3, rtol=1e-4)
    distance = torch.dist(near.A_RI, parent.A_RI)
    for seed in range(20):
        Q_RR, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)))
        assert torch.dist(Q_RR @ near.A_RI, parent.A_RI) >= distance
