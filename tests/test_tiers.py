"""What a client's memory is enough for."""

import time
from types import SimpleNamespace

import pytest
import torch
from families import make_checkpoint
from federation import make_update

from hf_fedlarge.adapters import read_factors, read_state
from hf_fedlarge.artifacts import AdapterManifest, read_manifest
from hf_fedlarge.clients import write_check_ins
from hf_fedlarge.collect import aggregate_updates
from hf_fedlarge.config import FederationConfig, LoraSettings
from hf_fedlarge.errors import ConfigError, UpdateRefusedError
from hf_fedlarge.jobs import Jobs, Tier
from hf_fedlarge.journal import Journal
from hf_fedlarge.lineage import start_adapter
from hf_fedlarge.plan import CheckIn
from hf_fedlarge.server import RoundServer
from hf_fedlarge.shrink import plan_shrink, shrink
from hf_fedlarge.tiers import derive_adapter, describe_fit, fit_memory
from hf_fedlarge.update import read_update

LORA = LoraSettings(rank=32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiers") / "checkpoint", layers=6)


def fit(checkpoint, memory, tokens=512, lora=LORA):
    return fit_memory(checkpoint, memory, tokens, lora, "int8")


def test_more_memory_never_fits_less_and_what_fits_is_within_it(checkpoint):
    most = fit(checkpoint, 10**12)
    assert (most.keep_layers, most.keep_neurons, most.rank) == (1, 1, 32)
    seen = [most]
    while len(seen) < 8:
        found, last = fit(checkpoint, seen[-1].needed_bytes - 1), seen[-1]
        assert found.needed_bytes < last.needed_bytes
        assert (found.keep_layers, found.keep_neurons, found.rank) < (last.keep_layers, last.keep_neurons, last.rank)
        seen.append(found)
    assert seen[-1].rank == 4
    assert len(seen[-1].plan.kept) == 3
    with pytest.raises(ConfigError, match="the smallest package needs"):
        fit(checkpoint, seen[-1].needed_bytes - 1)


def test_more_tokens_need_more(checkpoint):
    assert fit(checkpoint, 10**12, tokens=4096).needed_bytes > fit(checkpoint, 10**12).needed_bytes


def test_the_rank_asked_for_is_the_most_and_may_be_below_the_least(checkpoint):
    assert fit(checkpoint, 10**12, lora=LoraSettings(rank=2)).rank == 2


def test_layers_go_where_neurons_cannot(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "phi3", layers=6)
    most = fit(checkpoint, 10**12)
    fits = fit(checkpoint, most.needed_bytes - most.plan.package_bytes // 4, lora=LoraSettings(rank=4))
    assert fits.keep_neurons == 1


def test_the_line_that_the_server_prints(checkpoint):
    line = describe_fit(fit(checkpoint, 3 * 10**9), 3 * 10**9, 512)
    assert line.startswith("fits in 3.0 GB at 512 tokens: keep 6 of 6 layers, r=32: ")


@pytest.fixture(scope="module")
def uneven(checkpoint, tmp_path_factory):
    """A large package, a small one without two layers, and the large one's adapter after a round."""
    path = tmp_path_factory.mktemp("uneven")
    shrink(plan_shrink(checkpoint, keep_layers=6), path / "large")
    shrink(plan_shrink(checkpoint, keep_layers="0,1,3,5"), path / "small")
    lora = LoraSettings(rank=8, alpha=16.0)
    start_adapter(path / "large", path / "start", lora, seed=0)
    make_update(path / "first", path / "large", "ann", seed=1, adapter=path / "start", lora=lora)
    aggregate_updates([path / "first"], path / "large", path / "one", previous=path / "start")
    return path


def product(factors, lora):
    return {module: lora.scale * (B_OR.double() @ A_RI.double()) for module, (A_RI, B_OR) in factors.items()}


def whole(directory, lora):
    """The products of adapter and carry together."""
    settings, factors = read_state(directory, lora)
    return product(factors, settings)


def test_a_tier_gets_the_best_part_of_the_adapter_in_its_rank(uneven, tmp_path):
    lora = LoraSettings(rank=3, alpha=16.0)
    manifest = derive_adapter(uneven / "one", uneven / "small", lora, tmp_path / "part")
    assert manifest.layers == [0, 1, 3, 5]
    full_lora = read_manifest(uneven / "one", AdapterManifest).lora
    for module, part in product(read_factors(tmp_path / "part"), lora).items():
        full = product({module: read_factors(uneven / "one")[module]}, full_lora)[module]
        singular = torch.linalg.svdvals(full)
        assert torch.linalg.norm(full - part).item() == pytest.approx(singular[3:].norm().item(), rel=1e-4)


def second_round(uneven, path, **choices):
    """Aggregate the updates `a` and `b`; `part` is what the small tier's client started from."""
    return aggregate_updates(
        [path / "a", path / "b"],
        uneven / "large",
        path / "two",
        previous=uneven / "one",
        tiers={path / "part": uneven / "small"},
        **choices,
    )


def test_tiers_meet_in_one_adapter_as_the_dense_sum_says(uneven, tmp_path):
    """A large client and a small one: each layer is the mean of the changes of those that have it."""
    lora, small = read_manifest(uneven / "one", AdapterManifest).lora, LoraSettings(rank=3, alpha=16.0)
    part = tmp_path / "part"
    derive_adapter(uneven / "one", uneven / "small", small, part)
    make_update(tmp_path / "a", uneven / "large", "ann", seed=2, adapter=uneven / "one", round_number=2, lora=lora)
    make_update(tmp_path / "b", uneven / "small", "ben", seed=3, adapter=part, round_number=2, lora=small, tokens=300)
    collected = second_round(uneven, tmp_path, carry_rank=64)
    assert collected.refused == ()
    ann, ben = product(read_factors(tmp_path / "a"), lora), product(read_factors(tmp_path / "b"), small)
    parent, had = product(read_factors(uneven / "one"), lora), product(read_factors(part), small)
    before, after = (whole(path, lora) for path in (uneven / "one", tmp_path / "two"))
    assert len(ben) < len(ann)
    for module, found in after.items():
        change = ann[module] - parent[module]
        if module in ben:
            change = 0.25 * change + 0.75 * (ben[module] - had[module])
        torch.testing.assert_close(found, before[module] + change, rtol=1e-4, atol=1e-5)


def test_an_update_of_a_tier_must_have_its_package(uneven, tmp_path):
    lora, small = read_manifest(uneven / "one", AdapterManifest).lora, LoraSettings(rank=3, alpha=16.0)
    part = tmp_path / "part"
    derive_adapter(uneven / "one", uneven / "small", small, part)
    make_update(tmp_path / "a", uneven / "large", "ann", adapter=uneven / "one", round_number=2, lora=lora)
    make_update(tmp_path / "b", uneven / "large", "ben", adapter=part, round_number=2, lora=small)
    collected = second_round(uneven, tmp_path)
    [(client, reason)] = collected.refused
    assert client == "ben"
    assert "it was trained on the package" in reason


def test_a_tier_larger_than_the_first_is_refused(uneven, tmp_path):
    with pytest.raises(ConfigError, match="rank 9 is no part of an adapter with the layers 0-5 and rank 8"):
        derive_adapter(uneven / "one", uneven / "small", LoraSettings(rank=9), tmp_path / "part")


# Speed


class _KilledError(Exception):
    pass


class Paced:
    """Rounds of a run with three tiers, whose packages have 120, 80 and 40 MB, and its jobs."""

    def __init__(self, path, update, deadline=40.0, memory=None, **changes):
        config = {"checkpoint": "x", "data": {"source": "x"}, "deadline_seconds": deadline, "cohort": None}
        config["training"] = {"max_length": 128, "per_device_train_batch_size": 4}
        self.config = FederationConfig.model_validate(config | {"min_updates": 1} | changes)
        self.path, self.update = path, update
        self.tiers = []
        for number, (layers, memory_bytes) in enumerate(((30, 3 * 10**9), (20, 2 * 10**9), (10, 10**9))):
            tier = Tier(f"{number}", path / f"{number}", LoraSettings(rank=8 * (3 - number)), memory_bytes)
            kept = {"kept_layers": range(layers), "layers": range(30), "total_bytes": layers * 4 * 10**6}
            tier.__dict__["manifest"] = SimpleNamespace(**kept)
            self.tiers.append(tier)
        self.check_in(ann=memory, ben=memory)
        self.start()

    def start(self):
        """Start the server, or start it again."""
        self.journal = Journal(self.path / "journal.jsonl")
        self.jobs = Jobs(self.config, self.path, None, self.tiers, self.journal)

    def check_in(self, **memory):
        write_check_ins(self.path, [CheckIn(client, 10, most) for client, most in memory.items()])
        if hasattr(self, "jobs"):
            self.jobs.read_check_ins()

    def begin(self, number, seconds=None):
        """A round whose clients are asked."""

        def validate(number, client, directory):
            took = (seconds or {}).get(client)
            return read_update(directory).model_copy(update={"measured": {} if took is None else {"seconds": took}})

        server = RoundServer(self.path / "rounds", number, self.journal, self.config, validate)
        order = server.open(list(self.jobs.check_ins.values()))
        for client in order.clients:
            server.asked(client, 1, self.tier(client, number))
        return server, order

    def round(self, number, late=(), failed=(), **seconds):
        """A round that clients answer after so many seconds; of those that are not named nothing comes."""
        server, order = self.begin(number, seconds)
        for client in seconds:
            assert server.receive(order, client, self.update).accepted
        for client in failed:
            server.fail(order, client, "no battery")
        if self.config.deadline_seconds is not None:
            server.begin_wait(-1.0)
        for client in late:
            assert not server.receive(order, client, self.update).accepted

        def killed(*_):
            raise _KilledError

        with pytest.raises(_KilledError if seconds else UpdateRefusedError):
            server.close(order, killed, None, None)

    def tier(self, client, number):
        return self.tiers.index(self.jobs.tier_of(client, number))


@pytest.fixture
def make_paced(uneven, tmp_path):
    return lambda **choices: Paced(tmp_path, uneven / "first", **choices)


def test_who_would_not_be_done_in_time_gets_a_smaller_tier_and_the_server_says_so(make_paced):
    paced = make_paced(memory=3 * 10**9)
    assert [paced.tier(client, 1) for client in ("ann", "ben")] == [0, 0]  # nobody knows yet
    paced.round(1, ann=39.0, ben=58.5)
    assert [paced.tier(client, 2) for client in ("ann", "ben")] == [0, 1]
    assert paced.jobs.describe_pace("ann", 2) is None
    assert paced.jobs.describe_pace("ben", 2) == (
        "ben: fits in 3.0 GB at 512 tokens and 40 s: keep 20 of 30 layers, r=16: about 39 s a round, where the tier "
        "above would take 58 s"
    )
    paced.round(2, ann=39.0, ben=38.0)  # in the smaller tier, so it stays there
    assert paced.tier("ben", 3) == 1
    paced.round(3, ann=39.0, ben=20.0)  # and 30 s in the one above
    assert paced.tier("ben", 4) == 0
    assert paced.tier("ben", 2) == 1


@pytest.mark.parametrize("late", [(), ("ben",)])
def test_who_missed_a_deadline_gets_a_smaller_tier_after_a_kill_as_well(make_paced, late):
    paced = make_paced(memory=3 * 10**9)
    for number in (1, 2, 3):
        paced.round(number, late, ann=30.0)
        if number == 1:
            said = paced.jobs.describe_pace("ben", 2)
    assert said == (
        "ben: fits in 3.0 GB at 512 tokens and 40 s: keep 20 of 30 layers, r=16: at least 27 s a round, where the tier "
        "above would take 40 s or more, as nothing came before the last deadline"
    )
    for _ in range(2):
        assert [paced.tier("ann", number) for number in range(1, 5)] == [0, 0, 0, 0]
        assert [paced.tier("ben", number) for number in range(1, 5)] == [0, 1, 2, 2]
        paced.start()


def test_a_round_of_which_nothing_came_slows_its_clients_too(make_paced):
    paced = make_paced()
    paced.round(1)
    assert [paced.tier(client, 2) for client in ("ann", "ben")] == [1, 1]


def test_another_deadline_holds_for_rounds_that_begin_later(make_paced):
    paced = make_paced(memory=3 * 10**9)
    paced.round(1, ann=30.0)
    RoundServer(paced.path / "rounds", 2, paced.journal, paced.config, None).open(list(paced.jobs.check_ins.values()))
    paced.config = paced.config.model_copy(update={"deadline_seconds": 50.0})
    paced.start()  # before anybody was asked
    assert paced.tier("ben", 2) == 1
    assert "at 512 tokens and 40 s" in paced.jobs.describe_pace("ben", 2)
    assert paced.tier("ben", 3) == 0  # for it missed one of 40 s


def test_another_deadline_holds_for_an_open_round_whose_server_is_started_again_with_it(make_paced):
    paced = make_paced(memory=3 * 10**9)
    paced.round(1, ann=30.0)
    paced.begin(2)
    assert paced.tier("ben", 2) == 1
    paced.config = paced.config.model_copy(update={"deadline_seconds": 25.0})
    paced.start()
    paced.round(2, ann=20.0)
    assert [paced.tier(client, 2) for client in ("ann", "ben")] == [0, 1]  # as they were asked
    assert paced.journal.find("changed")[0]["deadline_seconds"] == 25.0
    # It missed one of 25 s, not of 40 s, with a package of 80 MB.
    assert "at least 12 s a round, where the tier above would take 25 s" in paced.jobs.describe_pace("ben", 3)


def test_a_reason_is_no_missed_deadline(make_paced):
    paced = make_paced()
    paced.round(1, failed=["ben"], ann=30.0)
    assert paced.tier("ben", 2) == 0


def test_who_was_not_waited_for_until_the_deadline_did_not_miss_it(make_paced):
    paced = make_paced(cohort=1, over_select=1.0)
    paced.round(1, ann=30.0)
    assert {entry["client"] for entry in paced.journal.find("asked")} == {"ann", "ben"}
    assert paced.tier("ben", 2) == 0


def test_many_rounds_take_no_time(make_paced):
    paced = make_paced()
    for number in range(1, 301):
        paced.round(number, ann=50.0 if number % 2 else 20.0)
    paced.start()
    since = time.process_time()
    assert [paced.tier("ann", number) for number in (2, 3, 300, 301)] == [1, 0, 1, 0]
    assert paced.tier("ben", 301) == 2
    assert time.process_time() - since < 2


def test_a_journal_without_tiers_is_read_by_memory_alone(make_paced):
    paced = make_paced(memory=2 * 10**9)
    for number in range(1, 301):
        paced.journal.write("asked", round=number, client="ann", bytes=1)
        paced.journal.write("received", round=number, client="ann", bytes=1, tokens=1, seconds=60.0)
    assert paced.tier("ann", 300) == paced.tier("ann", 301) == 2  # 60 s with the second tier's package
    assert paced.tier("ann", 1) == 1


def test_of_tiers_that_are_all_too_slow_it_is_the_smallest(make_paced):
    paced = make_paced()
    paced.round(1, ann=1000.0)
    assert paced.tier("ann", 2) == 2
    assert "keep 10 of 30 layers, r=8: about 333 s" in paced.jobs.describe_pace("ann", 2)


def test_speed_gives_nobody_a_tier_that_it_lacks_memory_for(make_paced):
    paced = make_paced(memory=2 * 10**9)
    paced.round(1, ann=1.0)
    assert paced.tier("ann", 2) == 1
    assert paced.jobs.describe_pace("ann", 2) is None


def test_without_a_deadline_speed_does_not_count(make_paced):
    paced = make_paced(deadline=None)
    paced.round(1, ann=1000.0)
    assert [paced.tier(client, 2) for client in ("ann", "ben")] == [0, 0]


@pytest.mark.parametrize("seconds", [None, 0, 1e300])
def test_a_time_that_cannot_be_is_none(make_paced, seconds):
    paced = make_paced()
    paced.round(1, ann=seconds)
    assert paced.tier("ann", 2) == 0


def test_what_comes_late_moves_nobody_while_a_round_runs(make_paced):
    paced = make_paced()
    paced.begin(2)
    paced.journal.write("received", round=1, client="ann", digest="d", bytes=1, tokens=100, seconds=100.0)
    paced.start()
    assert paced.tier("ann", 2) == 0
    paced.begin(3)
    assert paced.tier("ann", 3) == 2


def test_who_was_asked_keeps_its_tier_for_the_round(make_paced):
    paced = make_paced(memory=3 * 10**9)
    paced.begin(1)
    paced.check_in(ann=10**9, ben=3 * 10**9)
    paced.start()
    assert paced.tier("ann", 1) == 0
    assert paced.tier("ann", 2) == 2


@pytest.mark.parametrize("why", ["speed", "memory"])
def test_another_tier_s_package_and_adapter_are_downloaded_and_counted(make_paced, monkeypatch, why):
    paced = make_paced(memory=3 * 10**9)
    monkeypatch.setattr(Jobs, "adapter", lambda self, tier, number: (tier.name, number))
    monkeypatch.setattr(Jobs, "changes", lambda self, tier, number: (None, {"a file": None}))
    paced.jobs._changed_bytes = lambda adapter, previous: 1000 if previous is None else 10
    paced.round(1, ann=30.0)
    assert paced.jobs.missing_bytes(paced.journal, "ann", 2, down="offered") == 10
    assert paced.jobs.has_previous(paced.journal, "ann", 2)
    paced.round(2, ann=50.0 if why == "speed" else 30.0)
    if why == "memory":
        paced.check_in(ann=2 * 10**9, ben=3 * 10**9)
    assert paced.tier("ann", 3) == 1
    assert not paced.jobs.has_previous(paced.journal, "ann", 3)
    for down in ("offered", "changed"):
        assert paced.jobs.missing_bytes(paced.journal, "ann", 3, down) == 80 * 10**6 + 1000
