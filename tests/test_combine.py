"""Adapters on disk to the next one: what goes from round to round, against dense matrices kept beside."""

import math
import weakref

import pytest
import torch
from problems import LORA, SHAPES, federate, loss, make_factors, product, read, start, state, train, write
from pydantic import ValidationError

from hf_fedlarge import products
from hf_fedlarge.adapters import AdapterReader
from hf_fedlarge.aggregate import trained_in
from hf_fedlarge.artifacts import CARRY_WEIGHTS, MOMENTUM_WEIGHTS, VARIANCE_WEIGHTS
from hf_fedlarge.combine import AGGREGATORS, Part, combine
from hf_fedlarge.config import AggregationSettings, FederationConfig
from hf_fedlarge.errors import ConfigError
from hf_fedlarge.options import AGGREGATION
from hf_fedlarge.server_optimizer import OPTIMIZERS, Rates
from hf_fedlarge.tensors import Factors

RATES = Rates(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-3)


def random_updates(path, count, seed=0, frozen=None, shapes=SHAPES):
    """`count` updates that have nothing to do with each other; `frozen` is (letter, adapter)."""
    updates = []
    for client in range(count):
        factors = {m: make_factors(LORA.rank, *shape, seed * 100 + client) for m, shape in shapes.items()}
        if frozen:
            field = Factors._fields["AB".index(frozen[0])]
            own = {module: {field: getattr(pair, field)} for module, pair in read(frozen[1]).items()}
            factors = {module: pair._replace(**own[module]) for module, pair in factors.items()}
        updates.append(write(path / f"{seed}-{client}", factors))
    return updates


def step(parts, parent, output, trained="both", **choices):
    output.mkdir()
    return combine(parts, parent, output, LORA, AggregationSettings(**choices), trained)


def assert_close(found, expected, relative=1e-6):
    assert found.keys() == expected.keys()
    for module, matrix in expected.items():
        assert (found[module] - matrix).norm() <= relative * matrix.norm()


def dense(directory):
    return {module: product(pair, LORA.scale) for module, pair in read(directory).items()}


def weighted(updates, weights):
    total = sum(weights)
    parts = [dense(update) for update in updates]
    return {m: sum(w / total * part[m] for w, part in zip(weights, parts, strict=True)) for m in SHAPES}


def test_every_aggregator_that_can_be_set_is_there():
    names = AggregationSettings.model_fields["aggregator"].annotation.__args__
    assert set(AGGREGATORS) == set(names)
    assert set(OPTIMIZERS) | {"none"} == set(AggregationSettings.model_fields["server_optimizer"].annotation.__args__)
    # What the command line offers; what privacy spends only a run knows, which drew the cohort.
    assert set(AGGREGATION) | {"privacy"} == set(AggregationSettings.model_fields)


def test_twenty_rounds_on_disk_lose_nothing(tmp_path):
    """Clients replace the adapter by something of their own; what was carried stays and is added to."""
    adapter = start(tmp_path / "start")
    carry = {module: torch.zeros(shape, dtype=torch.float64) for module, shape in SHAPES.items()}
    for number in range(20):
        updates = random_updates(tmp_path, 3, seed=number)
        weights = [1.0, 2.0, 0.0 if number % 4 == 0 else 3.0]
        expected = {m: carry[m] + mean for m, mean in weighted(updates, weights).items()}
        parts = [
            Part(AdapterReader(update), weight, LORA.scale) for update, weight in zip(updates, weights, strict=True)
        ]
        combined = step(parts, adapter, tmp_path / f"next-{number}", carry_rank=100)
        adapter = tmp_path / f"next-{number}"
        assert combined.dropped == 0
        assert_close(state(adapter), expected, relative=1e-5)
        # From here on the oracle's own carry: everything but the adapter that clients get.
        carry = {m: expected[m] - dense(adapter)[m] for m in SHAPES}


@pytest.mark.parametrize("aggregator", ["exact", "svd", "krum", "multi_krum"])
def test_updates_that_are_not_kept_in_memory_give_the_same_bytes(tmp_path, monkeypatch, aggregator):
    parent = start(tmp_path / "start")
    updates = random_updates(tmp_path, 7)
    byzantine = 2 if "krum" in aggregator else None
    found = []
    for at_once in (2**26, 0):
        monkeypatch.setattr("hf_fedlarge.combine._AT_ONCE", at_once)
        output = tmp_path / str(at_once)
        parts = [Part(AdapterReader(update), 1.0, LORA.scale) for update in updates]
        choices = {"aggregator": aggregator, "byzantine": byzantine, "weighting": "equal"}
        step(parts, parent, output, **choices)
        found.append({file.name: file.read_bytes() for file in output.iterdir()})
    assert found[0] == found[1]


@pytest.mark.parametrize("aggregator", ["exact", "fedavg", "ffa"])
def test_of_very_many_updates_some_are_in_memory(tmp_path, monkeypatch, aggregator):
    parent = start(tmp_path / "start")
    updates = random_updates(tmp_path, 4, frozen=("A", parent) if aggregator == "ffa" else None)
    alive, most, columns, stacked, beside = set(), 0, 0, products._read_stack, products._side_by_side
    held = []
    values = max(sum(shape) for shape in SHAPES.values()) * LORA.rank

    def counted(group, *memory):
        nonlocal most, columns
        stack = stacked(group, *memory)
        alive.add(id(stack.B_GOR))
        weakref.finalize(stack.B_GOR, alive.discard, id(stack.B_GOR))
        most = max(most, len(alive))
        columns = max(columns, len(group) * LORA.rank)
        return stack

    def measured(terms, largest, memory):
        found = beside(terms, largest, memory)
        held.append((found.A_RI.nbytes + found.B_OR.nbytes, 4 * len(memory)))
        return found

    room = 20 * values * 4
    monkeypatch.setattr(products, "_side_by_side", measured)
    monkeypatch.setattr("hf_fedlarge.combine._AT_ONCE", room)
    monkeypatch.setattr(products, "_TOGETHER", 3 * LORA.rank)
    monkeypatch.setattr(products, "_read_stack", counted)
    # So many columns that their products are not decomposed at once.
    parts = [Part(AdapterReader(update), 1.0, LORA.scale) for update in updates * (600 // (4 * LORA.rank))]
    step(parts, parent, tmp_path / "next", "B" if aggregator == "ffa" else "both", aggregator=aggregator)
    assert columns == 3 * LORA.rank
    assert bool(held) == (aggregator == "exact")
    assert all(size <= there <= room for size, there in held)
    # Of each thread the one that is computed with, and the next one that is read.
    assert most <= 2 * torch.get_num_threads()


@pytest.mark.parametrize("aggregator", ["exact", "fedavg", "ffa", "alternate"])
def test_updates_read_together_or_each_alone_give_the_same(tmp_path, monkeypatch, aggregator):
    parent = start(tmp_path / "start")
    updates = random_updates(tmp_path, 4, frozen=("A", parent) if aggregator in ("ffa", "alternate") else None)
    parts = [Part(AdapterReader(update), 1.0 + i % 3, LORA.scale) for i, update in enumerate(updates * 40)]
    found = []
    for columns, room in ((64, 2**26), (64, 2**14), (1, 0)):
        monkeypatch.setattr(products, "_TOGETHER", columns)
        monkeypatch.setattr("hf_fedlarge.combine._AT_ONCE", room)
        output = tmp_path / f"{columns}-{room}"
        step(parts, parent, output, "B" if aggregator in ("ffa", "alternate") else "both", aggregator=aggregator)
        found.append(output)
    for output in found[1:]:
        assert_close(state(output), state(found[0]))


def test_svd_drops_what_exact_carries_and_says_how_much(tmp_path):
    parts = [Part(AdapterReader(update), 1.0, LORA.scale) for update in random_updates(tmp_path, 3)]
    plain = step(parts, None, tmp_path / "svd", aggregator="svd")
    carried = step(parts, None, tmp_path / "exact", carry_rank=100)
    bounded = step(parts, None, tmp_path / "bounded", carry_rank=2)
    assert plain.dropped == pytest.approx(carried.carried)
    assert bounded.carried + bounded.dropped == pytest.approx(carried.carried)
    assert 0 < bounded.dropped < plain.dropped
    assert (plain.carry_rank, bounded.carry_rank) == (0, 2)
    assert not (tmp_path / "svd" / CARRY_WEIGHTS).exists()
    assert {len(pair.A_RI) for pair in read(tmp_path / "bounded", CARRY_WEIGHTS).values()} == {2}


def test_an_update_of_some_modules_counts_there_alone(tmp_path):
    """Weights are normalised among those who have a module; what nobody trained stays, with its carry."""
    before = tmp_path / "before"
    step([Part(AdapterReader(update), 1.0, LORA.scale) for update in random_updates(tmp_path, 3)], None, before)
    both, one = random_updates(tmp_path, 2, seed=1)
    write(one, {"first": read(one)["first"]})
    step(
        [Part(AdapterReader(both), 1.0, LORA.scale), Part(AdapterReader(one), 3.0, LORA.scale)],
        before,
        tmp_path / "after",
    )
    kept = {m: state(before)[m] - dense(before)[m] for m in SHAPES}
    expected = {
        "first": kept["first"] + 0.25 * dense(both)["first"] + 0.75 * dense(one)["first"],
        "second": kept["second"] + dense(both)["second"],
    }
    assert_close(state(tmp_path / "after"), expected)
    write(both, {"first": read(both)["first"]})
    step(
        [Part(AdapterReader(both), 1.0, LORA.scale), Part(AdapterReader(one), 3.0, LORA.scale)],
        before,
        tmp_path / "none",
    )
    for name in ("adapter_model.safetensors", CARRY_WEIGHTS):
        for old, new in zip(read(before, name)["second"], read(tmp_path / "none", name)["second"], strict=True):
            assert torch.equal(old, new)
    mixed = [Part(AdapterReader(update), 1.0, LORA.scale) for update in [*random_updates(tmp_path, 4, seed=2), one]]
    with pytest.raises(ConfigError, match="krum compares whole updates, but clients have trained different modules"):
        step(mixed, before, tmp_path / "krum", aggregator="krum", byzantine=1, weighting="equal")


@pytest.mark.parametrize("aggregator", ["ffa", "alternate"])
def test_one_factor_at_a_time_is_exact_and_the_other_stays(tmp_path, aggregator):
    adapter = start(tmp_path / "start")
    for number in range(1, 5):
        trained = trained_in(aggregator, number)
        frozen = "BA"["AB".index(trained)]
        assert trained == ("B" if aggregator == "ffa" or number % 2 else "A")
        updates = random_updates(tmp_path, 3, seed=number, frozen=(frozen, adapter))
        parts = [
            Part(AdapterReader(update), weight, LORA.scale) for update, weight in zip(updates, (1, 2, 3), strict=True)
        ]
        combined = step(parts, adapter, tmp_path / f"next-{number}", trained, aggregator=aggregator)
        before, adapter = adapter, tmp_path / f"next-{number}"
        assert combined.dropped == 0
        assert_close(dense(adapter), weighted(updates, (1, 2, 3)))
        for module, pair in read(adapter).items():
            assert torch.equal(pair["AB".index(frozen)], read(before)[module]["AB".index(frozen)])


@pytest.mark.parametrize("aggregator", ["exact", "svd", "fedavg", "ffa", "alternate"])
def test_federations_learn_whatever_the_aggregator(tmp_path, aggregator):
    assert loss(federate(tmp_path / "run", rounds=6, aggregator=aggregator)) < 0.8 * loss(start(tmp_path / "start"))


# --- late updates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregator", ["exact", "fedavg"])
def test_a_late_change_counts_from_what_it_started_from_and_for_less(tmp_path, aggregator):
    old, parent = start(tmp_path / "old"), write(tmp_path / "parent", read(random_updates(tmp_path, 1, seed=9)[0]))
    fresh, late = random_updates(tmp_path, 2)
    if aggregator == "fedavg":  # where A is the same, averages of factors are those of products
        fresh, late, parent = (
            write(
                directory,
                {m: Factors(read(old)[m].A_RI, pair.B_OR) for m, pair in read(directory).items()},
            )
            for directory in (fresh, late, parent)
        )
    parts = [Part(AdapterReader(fresh), 1.0, LORA.scale), Part(AdapterReader(late), 1.0, LORA.scale, base=old, late=3)]
    combined = step(parts, parent, tmp_path / "next", aggregator=aggregator)
    assert combined.shares == [0.5, 0.25]  # (1 + 3)^-1/2
    there = {name: dense(directory) for name, directory in {"f": fresh, "l": late, "p": parent, "o": old}.items()}
    expected = {
        m: there["p"][m] + 0.5 * (there["f"][m] - there["p"][m]) + 0.25 * (there["l"][m] - there["o"][m])
        for m in SHAPES
    }
    assert_close(state(tmp_path / "next"), expected)


def test_training_with_late_clients_ends_where_training_without_does(tmp_path):
    """Every client but one is a round late: what they learned is added to the newest, not put in its place."""
    adapters = [start(tmp_path / "0")]
    for number in range(1, 16):
        base = adapters[max(0, number - 2)]
        parts = []
        for client in range(5):
            late = client > 0 and number > 1
            update = train(base if late else adapters[-1], tmp_path / f"{number}-{client}", client)
            parts.append(Part(AdapterReader(update), 1.0, LORA.scale, base if late else None, int(late)))
        step(parts, adapters[-1], tmp_path / str(number))
        adapters.append(tmp_path / str(number))
    assert loss(adapters[-1]) <= 1.05 * loss(federate(tmp_path / "prompt", rounds=15))


# --- server optimizers -----------------------------------------------------------------------------------------------


def reference(name, changes, rates):
    """The papers' rules in plain numbers: the steps for one coordinate's changes."""
    m = v = 0.0
    steps = []
    for change in changes:
        if name == "momentum":
            m = rates.beta1 * m + change
            steps.append(rates.lr * m)
            continue
        m = rates.beta1 * m + (1 - rates.beta1) * change
        if name == "adam":
            v = rates.beta2 * v + (1 - rates.beta2) * change**2
        elif name == "yogi":
            v -= (1 - rates.beta2) * change**2 * math.copysign(1, v - change**2) if v != change**2 else 0
        else:
            v += change**2
        steps.append(rates.lr * m / (math.sqrt(v) + rates.eps))
    return steps


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_step_is_the_paper_s(name):
    changes = [1.0, -0.5, 0.25, 3.0, 0.0, -1e-4]
    found, state = [], (torch.zeros(1, dtype=torch.float64),) * 2
    for change in changes:
        moved, state = OPTIMIZERS[name](torch.tensor([change], dtype=torch.float64), state, RATES)
        found.append(moved.item())
    assert found == pytest.approx(reference(name, changes, RATES), rel=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("aggregator", ["fedavg", "alternate"])
def test_averages_go_from_round_to_round_on_disk(tmp_path, name, aggregator):
    """Every coordinate of A and B follows the paper's rule; one that is frozen this round neither moves nor decays."""
    adapter = start(tmp_path / "start")
    first = read(adapter)
    history = {module: ([], []) for module in SHAPES}
    for number in range(1, 5):
        trained = trained_in(aggregator, number)
        frozen = None if trained == "both" else ("BA"["AB".index(trained)], adapter)
        updates = random_updates(tmp_path, 2, seed=number, frozen=frozen)
        now = read(adapter)
        for module in SHAPES:
            means = [sum(read(update)[module][i].double() for update in updates) / 2 for i in (0, 1)]
            for i, letter in enumerate("AB"):
                if trained in ("both", letter):
                    history[module][i].append((means[i] - now[module][i].double())[0, 0].item())
        parts = [Part(AdapterReader(update), 1.0, LORA.scale) for update in updates]
        choices = {"server_optimizer": name, "server_lr": 0.1, "aggregator": aggregator}
        step(parts, adapter, tmp_path / f"next-{number}", trained, **choices)
        adapter = tmp_path / f"next-{number}"
    assert (adapter / VARIANCE_WEIGHTS).exists() == (name != "momentum")
    for module in SHAPES:
        for i in (0, 1):
            moved = (read(adapter)[module][i] - first[module][i])[0, 0].item()
            assert moved == pytest.approx(sum(reference(name, history[module][i], RATES)), rel=1e-4, abs=1e-6)


def test_momentum_on_products_is_that_of_dense_matrices(tmp_path):
    adapter = start(tmp_path / "start")
    whole, m = state(adapter), {module: torch.zeros(shape, dtype=torch.float64) for module, shape in SHAPES.items()}
    for number in range(5):
        updates = random_updates(tmp_path, 2, seed=number)
        here = dense(adapter)
        m = {k: 0.9 * m[k] + mean - here[k] for k, mean in weighted(updates, (1, 1)).items()}
        whole = {k: whole[k] + 0.5 * m[k] for k in SHAPES}
        choices = {"server_optimizer": "momentum", "server_lr": 0.5, "carry_rank": 20}
        step(
            [Part(AdapterReader(update), 1.0, LORA.scale) for update in updates],
            adapter,
            tmp_path / f"next-{number}",
            **choices,
        )
        adapter = tmp_path / f"next-{number}"
        assert_close(state(adapter), whole, relative=1e-5)
    assert read(adapter, MOMENTUM_WEIGHTS).keys() == SHAPES.keys()


def test_a_server_learning_rate_takes_a_part_of_the_way(tmp_path):
    parent, update = random_updates(tmp_path, 2)
    for aggregator in ("exact", "median"):
        more = {"weighting": "equal"} if aggregator == "median" else {}
        step(
            [Part(AdapterReader(update), 1.0, LORA.scale)],
            parent,
            tmp_path / aggregator,
            server_lr=0.25,
            aggregator=aggregator,
            **more,
        )
        expected = {m: 0.75 * dense(parent)[m] + 0.25 * dense(update)[m] for m in SHAPES}
        assert_close(state(tmp_path / aggregator), expected)


@pytest.mark.parametrize("choices", [{"server_optimizer": "adam"}, {"server_optimizer": "momentum"}, {}])
def test_steps_that_need_a_start_are_refused_without_one(tmp_path, choices):
    [update] = random_updates(tmp_path, 1)
    with pytest.raises(ConfigError, match="needs the adapter that clients started from"):
        step([Part(AdapterReader(update), 1.0, LORA.scale)], None, tmp_path / "next", aggregator="ffa", **choices)


# --- clipping --------------------------------------------------------------------------------------------------------


def test_a_change_is_clipped_over_all_modules_together(tmp_path):
    parent, *updates = random_updates(tmp_path, 4)
    norms = [
        math.sqrt(sum((dense(update)[m] - dense(parent)[m]).square().sum().item() for m in SHAPES))
        for update in updates
    ]
    bound = sorted(norms)[1]
    parts = [Part(AdapterReader(update), 1.0, LORA.scale) for update in updates]
    combined = step(parts, parent, tmp_path / "next", clip="median", carry_rank=100)
    factors = [min(1.0, bound / norm) for norm in norms]
    assert combined.shares == pytest.approx([factor / 3 for factor in factors])
    expected = {
        m: dense(parent)[m]
        + sum(f / 3 * (dense(update)[m] - dense(parent)[m]) for f, update in zip(factors, updates, strict=True))
        for m in SHAPES
    }
    assert_close(state(tmp_path / "next"), expected)


def test_krum_s_choice_is_the_aggregate(tmp_path):
    updates = random_updates(tmp_path, 5)
    parts = [Part(AdapterReader(update), 1.0, LORA.scale) for update in updates]
    combined = step(parts, None, tmp_path / "next", aggregator="krum", byzantine=1, weighting="equal")
    assert sorted(combined.shares) == [0, 0, 0, 0, 1]
    assert_close(state(tmp_path / "next"), dense(updates[combined.shares.index(1)]))


# --- settings that make no sense -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        ({"aggregator": "median"}, "median counts every client once, .* needs weighting: equal"),
        ({"aggregator": "krum", "weighting": "equal"}, "krum needs byzantine"),
        ({"byzantine": 1}, "byzantine is for trimmed_mean, krum and multi_krum; exact doesn't use it"),
        ({"aggregator": "median", "weighting": "equal", "byzantine": 1}, "median doesn't use it"),
        ({"aggregator": "svd", "carry_rank": 4}, "svd has no carry"),
        ({"aggregator": "ffa", "carry_energy": 0.1}, "ffa has no carry"),
        ({"aggregator": "fedavg", "clip": 1.0}, "clip bounds the change of products, which fedavg"),
        (
            {"server_optimizer": "adam"},
            "adam scales each coordinate by its history, but exact takes factors from an SVD",
        ),
        ({"server_optimizer": "yogi", "aggregator": "svd"}, "use momentum, or one of fedavg, ffa, alternate"),
        ({"weighting": "love"}, "weighting 'love' is not known; choose among tokens, examples, equal, loss, or module"),
        ({"weighting": "a:b:c"}, "is not known"),
        ({"clip": 0.0}, "clip"),
        ({"clip": "mean"}, "clip"),
        ({"server_lr": 0.0}, "server_lr"),
        ({"carry_energy": 1.0}, "carry_energy"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_a_sentence(choices, sentence):
    with pytest.raises(ValidationError, match=sentence):
        AggregationSettings(**choices)


def test_a_cohort_too_small_for_the_aggregator_is_refused_before_a_run():
    choices = {"checkpoint": "x", "data": {"source": "y"}, "weighting": "equal", "byzantine": 1, "cohort": 4}
    FederationConfig(aggregator="trimmed_mean", **choices)
    with pytest.raises(
        ValidationError, match="krum needs 5 updates to stand 1 hostile clients, but a cohort has only 4"
    ):
        FederationConfig(aggregator="krum", **choices)
