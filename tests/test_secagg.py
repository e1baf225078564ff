"""Secure aggregation: the sum to the last bit of what was quantized, and nothing of one client alone."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from hf_fedlarge import ciphers, secagg
from hf_fedlarge.agreement import Agreed, Agreement
from hf_fedlarge.errors import ArtifactError
from hf_fedlarge.fixed_point import count_told, levels, mean_of, quantized, weight_level
from hf_fedlarge.keys import AllowedKeys, Signature, allow, new_key, read_allowed, read_key
from hf_fedlarge.orders import CLIENT_BYTES, MAX_NOTE_BYTES, as_bytes

CONTEXT = "f" * 32 + "/1/1"


def names(count):
    return [f"c{number:02d}" for number in range(count)]


class Attempt:
    """An attempt at a round among clients, as far as a test wants it; `server` has all that reached the server."""

    def __init__(self, count, share=0.5, context=CONTEXT):
        self.secrets = {name: secagg.new_secrets() for name in names(count)}
        keys = [secagg.advertised(name, secrets, context) for name, secrets in self.secrets.items()]
        threshold = secagg.threshold_of(share, count)
        self.roster = secagg.Roster(context=context, threshold=threshold, clients=keys)
        self.server = {"shares": {}, "masked": {}, "revealed": {}}

    def share(self, sharers):
        self.sharers = sorted(sharers)
        for name in self.sharers:
            self.server["shares"][name] = shares = secagg.shared(self.secrets[name], self.roster, name)
            secagg.check_shares(shares, self.roster)
        self.delivered = secagg.delivered(self.server["shares"])

    def opened(self, name):
        return secagg.opened(self.secrets[name], self.roster, name, self.delivered[name].boxes)

    def mask(self, vectors):
        for name, words in vectors.items():
            masked = words.copy()
            secagg.add_masks(masked, self.secrets[name], self.roster, name, self.sharers)
            self.server["masked"][name] = masked
        self.survivors = sorted(vectors)

    def reveal(self, revealers):
        for name in revealers:
            message = secagg.revealed(self.opened(name), self.roster, name, self.survivors)
            secagg.check_revealed(message, self.sharers, self.survivors)
            self.server["revealed"][name] = message

    def total(self):
        """What the server computes of what it has."""
        secrets = secagg.recovered(self.roster, self.sharers, self.survivors, self.server["revealed"])
        total = np.sum(list(self.server["masked"].values()), axis=0, dtype=np.uint32)
        secagg.remove_masks(total, self.roster, self.survivors, secrets)
        return total


def vectors_of(clients, size, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 2**32, size, dtype=np.uint32) for name in clients}


# The sum


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_sum_is_that_of_the_survivors_whoever_drops_out_when(data):
    count = data.draw(st.integers(2, 7))
    attempt = Attempt(count, data.draw(st.sampled_from([0.5, 2 / 3, 0.9])))
    fewest = attempt.roster.threshold

    def some(of):
        kept = data.draw(st.integers(fewest, len(of))) if len(of) >= fewest else len(of)
        return sorted(data.draw(st.permutations(of))[:kept])

    attempt.share(some(names(count)))
    # Survivors' weighted numbers, some of which are clipped, against the same mean in floating point.
    limit, most = 0.5, 1000
    chosen = some(attempt.sharers)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    values = {name: rng.normal(0, 0.3, 50) for name in chosen}
    weights = {name: data.draw(st.integers(1, most)) for name in chosen}
    level = {name: weight_level(weight, most, count) for name, weight in weights.items()}
    attempt.mask({name: quantized([values[name][:20], values[name][20:]], 50, limit, level[name]) for name in chosen})
    attempt.reveal(some(attempt.survivors))
    mean = mean_of(attempt.total(), limit, count, len(chosen), equal=False)

    clipped = {name: np.clip(vector, -limit, limit) for name, vector in values.items()}
    together = sum(level.values())
    oracle = sum(level[name] * clipped[name] for name in chosen) / together
    assert np.abs(mean.values() - oracle).max() < len(chosen) * limit / together
    assert mean.clipped == sum(np.count_nonzero(np.abs(vector) > limit) for vector in values.values())
    # The weights themselves are rounded, each to a share of one in twice its level.
    exact = np.average([clipped[name] for name in chosen], axis=0, weights=[weights[name] for name in chosen])
    assert np.abs(oracle - exact).max() < 2 * limit / min(level.values())


@pytest.mark.parametrize("count", [1, 2, 3, 1000, 2**20])
def test_the_sum_of_the_largest_does_not_overflow(count):
    words = quantized([np.array([1.0, -1.0, 2.0])], 3, 1.0, levels(count))
    assert words[:3].view(np.int32).tolist() == [levels(count), -levels(count), levels(count)]
    total = (words.astype(np.uint64) * count).astype(np.uint32)
    mean = mean_of(total, 1.0, count, count, equal=True)
    assert mean.values().tolist() == pytest.approx([1.0, -1.0, 1.0], rel=1e-12)
    assert mean.clipped == count


def test_a_quantized_vector_is_no_longer_than_it_was():
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = rng.normal(0, 0.1, 1000)
        back = quantized([values], 1000, 1.0, 5000)[:-2].view(np.int32) / 5000
        assert (np.abs(back) <= np.abs(values)).all()
        assert np.abs(back - values).max() < 1 / 5000


@pytest.mark.parametrize(("least", "clients"), [(500, 5), (90, 10), (90, 100)])
def test_at_the_default_limit_numbers_of_the_lightest_client_arrive(least, clients):
    values = 1e-4 * np.random.default_rng(0).normal(size=5000)  # half of what a step of 2e-4 makes of a number
    values[:10] *= 1000
    level = weight_level(least, 2000, clients)
    assert count_told(values, 1.0, level) > 0.98 * len(values)
    words = quantized([values], len(values), 1.0, level)[:-2].view(np.int32)
    assert count_told(values, 1.0, level) == np.count_nonzero(words)
    assert count_told(values, 0.01, level) <= np.count_nonzero(np.abs(values) <= 0.01) < len(values)


def test_a_sum_that_no_clients_can_have_sent_is_refused():
    good = quantized([np.array([0.1, 0.2])], 2, 1.0, levels(3)) * np.uint32(3)
    mean_of(good, 1.0, 3, 3, equal=True)
    for place, value, sentence in [
        (0, 2**31 - 1, "The sum has a value of"),
        (0, 2**31, "The sum has a value of 2147483648 steps"),
        (0, 2**32 - 2**30 - 1, "The sum has a value of 1073741825 steps"),
        (2, 2, "The sum of the weights is 2; expected 1073741823 of 3 clients"),
        (2, 2**32 - 1, "The sum of the weights"),
    ]:
        bad = good.copy()
        bad[place] = value
        with pytest.raises(ArtifactError, match=sentence):
            mean_of(bad, 1.0, 3, 3, equal=True)
    less = good // 3
    mean_of(less, 1.0, 3, 3, equal=False)
    with pytest.raises(ArtifactError, match=r"is 357913941; expected 1073741823 of 3"):
        mean_of(less, 1.0, 3, 3, equal=True)
    with pytest.raises(ArtifactError, match=r"is 2; expected 3 to 1073741823 of 3"):
        mean_of(np.array([0, 0, 2, 0], np.uint32), 1.0, 3, 3, equal=False)


# What the server can know


def test_with_fewer_than_the_threshold_nothing_comes_out():
    attempt = Attempt(5, 0.6)
    assert attempt.roster.threshold == 4
    attempt.share(names(5))
    vectors = vectors_of(names(5), 20)
    attempt.mask({name: vectors[name] for name in names(4)})
    attempt.reveal(names(3))
    with pytest.raises(ArtifactError, match="3 clients revealed shares; 4 are needed, and fewer say nothing"):
        attempt.total()
    # Whatever an impatient server makes of three shares of four isn't the secret.
    for name in attempt.survivors:
        shares = {
            attempt.roster.names.index(by): bytes.fromhex(message.seeds[name])
            for by, message in attempt.server["revealed"].items()
        }
        for some in (shares, dict(list(shares.items())[:2])):
            assert ciphers.combine(some).hex() != attempt.secrets[name].seed
    with pytest.raises(
        ArtifactError, match="survivors are 3 known clients of 3; expected known ones, each once, at least 4"
    ):
        secagg.revealed(attempt.opened("c00"), attempt.roster, "c00", names(3))
    with pytest.raises(ArtifactError, match="sharers are 3 known clients"):
        secagg.add_masks(np.zeros(3, np.uint32), attempt.secrets["c00"], attempt.roster, "c00", names(3))


def test_a_masked_vector_looks_like_noise_and_so_do_two_of_the_same():
    attempt = Attempt(3)
    attempt.share(names(3))
    zeros = {name: np.zeros(2**17, np.uint32) for name in names(3)}
    attempt.mask(zeros)
    for masked in attempt.server["masked"].values():
        counts = np.bincount(masked.view(np.uint8), minlength=256)
        assert chisquare(counts).pvalue > 1e-6
        # Neighbours in time, too: bits of the differences of one word to the next.
        bits = np.unpackbits(np.diff(masked).view(np.uint8))
        assert abs(bits.mean() - 0.5) < 5 * 0.5 / bits.size**0.5
    one, two, three = attempt.server["masked"].values()
    for pair in (one - two, one + two, one - three):
        assert chisquare(np.bincount(pair.view(np.uint8), minlength=256)).pvalue > 1e-6
    # The test can fail: with the masks off there are nothing but zeros.
    attempt.reveal(names(3))
    assert not attempt.total().any()


def test_what_is_reserved_for_messages_is_enough_for_a_hundred_long_names():
    names = [f"{number:04d}".ljust(128, "x") for number in range(100)]
    signature = Signature(key="a" * 16, signature="b" * 128)
    digits, box = "a" * 64, "a" * 120
    keys = [secagg.Keys(client=name, box=digits, mask=digits, commitment=digits, signature=signature) for name in names]
    up = [keys[0], secagg.Shares(boxes=dict.fromkeys(names, box)), Agreed(signature=signature)]
    up.append(secagg.Revealed(seeds=dict.fromkeys(names, "a" * 32), masks={}))
    roster = secagg.Roster(context="x" * 110, threshold=67, clients=keys)
    down = [roster, up[1], Agreement(signatures=dict.fromkeys(names, signature))]
    told = sum(len(as_bytes(message)) for message in (*up, *down))
    assert 2**17 < told < MAX_NOTE_BYTES + 100 * CLIENT_BYTES


def test_the_server_never_has_both_shares_and_no_vector_of_a_client_alone():
    """A run with a client lost after its shares and one after its vector: all that the server has, in all ways."""
    attempt = Attempt(5)
    attempt.share(names(4))  # c04 is lost before
    vectors = vectors_of(names(3), 64)  # c03 after its shares
    attempt.mask(vectors)
    attempt.reveal(["c00", "c01", "c02"])
    for message in attempt.server["revealed"].values():
        assert set(message.seeds) == {"c00", "c01", "c02"}
        assert set(message.masks) == {"c03"}
    expected = np.sum(list(vectors.values()), axis=0, dtype=np.uint32)
    assert (attempt.total() == expected).all()
    # A mask of its own, and those with c03, of which the key is known, come off; those among survivors don't.
    secrets = secagg.recovered(attempt.roster, attempt.sharers, attempt.survivors, attempt.server["revealed"])
    assert set(secrets.seeds) == {"c00", "c01", "c02"}
    assert set(secrets.mask_keys) == {"c03"}
    found = []
    for size in (1, 2):
        for some in combinations(names(3), size):
            part = np.sum([attempt.server["masked"][name] for name in some], axis=0, dtype=np.uint32)
            mine = secagg.Recovered({name: secrets.seeds[name] for name in some}, secrets.mask_keys)
            secagg.remove_masks(part, attempt.roster, some, mine)
            truth = np.sum([vectors[name] for name in some], axis=0, dtype=np.uint32)
            found.append((part == truth).mean())
    assert max(found) < 0.1
    # And no secret stands in any message.
    said = "".join(
        message.model_dump_json()
        for message in [attempt.roster, *attempt.server["shares"].values(), *attempt.server["revealed"].values()]
    )
    for secrets in attempt.secrets.values():
        for secret in (secrets.box, secrets.mask, secrets.seed):
            assert secret not in said


def test_a_vector_that_comes_after_its_key_was_given_up_stays_masked():
    attempt = Attempt(4)
    attempt.share(names(4))
    vectors = vectors_of(names(4), 64)
    attempt.mask({name: vectors[name] for name in names(3)})
    attempt.reveal(names(3))
    late = vectors["c03"].copy()
    secagg.add_masks(late, attempt.secrets["c03"], attempt.roster, "c03", attempt.sharers)
    secrets = secagg.recovered(attempt.roster, attempt.sharers, attempt.survivors, attempt.server["revealed"])
    for other in names(3):  # every pairwise mask of c03, of its own key
        mask = secagg._pair_mask(secrets.mask_keys["c03"], attempt.roster, other)
        ciphers.add_keystream(late, mask, 1 if other < "c03" else -1)
    assert (late == vectors["c03"]).mean() < 0.1
    ciphers.add_keystream(late, secagg._own_mask(bytes.fromhex(attempt.secrets["c03"].seed), attempt.roster), -1)
    assert (late == vectors["c03"]).all()


def test_two_halves_asked_for_different_secrets_are_too_few_for_both():
    """A server that doesn't keep to the protocol tells one half that c00 survived and the other that it didn't."""
    for count in range(2, 9):
        attempt = Attempt(count)
        assert 2 * attempt.roster.threshold > count


def test_masks_of_another_attempt_are_others():
    one, two = Attempt(2), Attempt(2, context="f" * 32 + "/1/2")
    two.secrets = one.secrets
    two.roster = one.roster.model_copy(update={"context": two.roster.context})
    masked = []
    for attempt in (one, two):
        words = np.zeros(1000, np.uint32)
        secagg.add_masks(words, attempt.secrets["c00"], attempt.roster, "c00", names(2))
        masked.append(words)
    assert (masked[0] == masked[1]).mean() < 0.1


@pytest.mark.parametrize(("share", "count", "threshold"), [(0.5, 2, 2), (0.5, 3, 2), (0.5, 4, 3), (2 / 3, 3, 3)])
def test_thresholds(share, count, threshold):
    assert secagg.threshold_of(share, count) == threshold


# What others send


def test_a_roster_that_does_not_hold_together_is_refused():
    attempt = Attempt(4)
    raw = attempt.roster.model_dump()
    for change, sentence in [
        ({"threshold": 2}, "its threshold is 2 of 4 clients; expected more than half"),
        ({"threshold": 5}, "its threshold is 5"),
        ({"clients": raw["clients"][::-1]}, "not in order, each once"),
        ({"clients": raw["clients"][:1] * 2}, "not in order, each once"),
        ({"clients": raw["clients"][:1]}, "at least 2"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            secagg.Roster.model_validate(raw | change)
    mine = attempt.secrets["c00"]
    secagg.check_roster(attempt.roster, "c00", mine, CONTEXT)
    for client, context, sentence in [
        ("c00", "other", "The roster is for f+/1/1; expected other"),
        ("c01", CONTEXT, "has other keys of c01 than it advertised"),
        ("zoe", CONTEXT, "has other keys of zoe"),
    ]:
        with pytest.raises(ArtifactError, match=sentence):
            secagg.check_roster(attempt.roster, client, mine, context)
    other = attempt.roster.of("c01")
    for kind in ("box", "mask", "commitment"):
        swapped = attempt.roster.of("c00").model_copy(update={kind: getattr(other, kind)})
        bad = attempt.roster.model_copy(update={"clients": [swapped, *attempt.roster.clients[1:]]})
        with pytest.raises(ArtifactError, match="has other keys of c00 than it advertised"):
            secagg.check_roster(bad, "c00", mine, CONTEXT)


def test_keys_that_the_server_swapped_are_seen_where_clients_know_each_other(tmp_path):
    line = {name: new_key(tmp_path / f"{name}.pem", name) for name in names(3)}
    for name in names(3):
        allow(tmp_path / "allowed.json", line[name])
    allowed = read_allowed(tmp_path / "allowed.json")
    secrets = {name: secagg.new_secrets() for name in names(3)}
    keys = {
        name: secagg.advertised(name, secrets[name], CONTEXT, read_key(tmp_path / f"{name}.pem")) for name in names(3)
    }
    roster = secagg.Roster(context=CONTEXT, threshold=2, clients=list(keys.values()))
    secagg.check_roster(roster, "c00", secrets["c00"], CONTEXT, allowed)

    forged = secagg.advertised("c01", secagg.new_secrets(), CONTEXT)
    for swapped, sentence in [
        (forged, "c01's keys are refused: they are not signed"),
        (forged.model_copy(update={"signature": keys["c01"].signature}), "is not of these keys"),
        (secagg.advertised("c01", secagg.new_secrets(), CONTEXT, read_key(tmp_path / "c02.pem")), "not one of c01's"),
        (secagg.advertised("c01", secrets["c01"], "another", read_key(tmp_path / "c01.pem")), "is not of these keys"),
    ]:
        clients = [keys["c00"], swapped, keys["c02"]]
        bad = roster.model_copy(update={"clients": clients})
        with pytest.raises(ArtifactError, match=sentence):
            secagg.check_roster(bad, "c00", secrets["c00"], CONTEXT, allowed)
    with pytest.raises(ArtifactError, match="not one of c00's"):
        secagg.check_roster(roster, "c00", secrets["c00"], CONTEXT, AllowedKeys())


def test_boxes_that_were_changed_or_swapped_do_not_open():
    attempt = Attempt(3)
    attempt.share(names(3))
    boxes = attempt.delivered["c00"].boxes
    flipped = f"{int(boxes['c01'][0], 16) ^ 1:x}" + boxes["c01"][1:]
    for wrong in (
        {"c01": flipped},
        {"c01": boxes["c02"]},
        {"c01": attempt.delivered["c02"].boxes["c01"]},
    ):
        with pytest.raises(ArtifactError, match=r"The shares of c01 for c00 are refused: the box is not what was"):
            secagg.opened(attempt.secrets["c00"], attempt.roster, "c00", wrong)


def test_messages_of_the_wrong_form_are_refused():
    attempt = Attempt(3)
    attempt.share(names(3))
    attempt.mask(vectors_of(names(2), 5))
    attempt.reveal(names(2))
    shares, message = attempt.server["shares"]["c00"], attempt.server["revealed"]["c00"]
    with pytest.raises(ArtifactError, match="it has boxes for 2 clients"):
        secagg.check_shares(secagg.Shares(boxes={name: shares.boxes[name] for name in names(2)}), attempt.roster)
    for boxes in ({"../x": shares.boxes["c00"]}, {"c00": shares.boxes["c00"][:-2]}, {"c00": "zz" * 60}):
        with pytest.raises(ValueError, match="boxes"):
            secagg.Shares.model_validate({"boxes": boxes})
    both = message.model_copy(update={"masks": message.masks | {"c00": "0" * 32}})
    fewer = message.model_copy(update={"seeds": {}})
    for wrong in (both, fewer):
        with pytest.raises(ArtifactError, match="it has other shares than were asked for"):
            secagg.check_revealed(wrong, attempt.sharers, attempt.survivors)


@pytest.mark.parametrize("kind", ["seeds", "masks"])
def test_a_wrong_share_is_noticed(kind):
    attempt = Attempt(3)
    attempt.share(names(3))
    attempt.mask(vectors_of(names(2), 5))
    attempt.reveal(names(2))
    message = attempt.server["revealed"]["c01"]
    lie = {name: f"{int(share, 16) ^ 1:032x}" for name, share in getattr(message, kind).items()}
    attempt.server["revealed"]["c01"] = message.model_copy(update={kind: lie})
    with pytest.raises(ArtifactError, match=r"don't give what it advertised: it, or one of c00, c01, sent wrong ones"):
        attempt.total()


def test_a_key_that_nobody_can_agree_with_is_refused():
    attempt = Attempt(2)
    clients = [attempt.roster.of("c00"), attempt.roster.of("c01").model_copy(update={"box": "0" * 64})]
    roster = attempt.roster.model_copy(update={"clients": clients})
    with pytest.raises(ArtifactError, match="is none that anybody can agree with"):
        secagg.shared(attempt.secrets["c00"], roster, "c00")


def test_who_is_not_concerned_reveals_and_masks_nothing():
    attempt = Attempt(4)
    attempt.share(names(4))
    attempt.survivors = names(3)
    with pytest.raises(ArtifactError, match="c03 is asked for shares without being among those"):
        secagg.revealed(attempt.opened("c03"), attempt.roster, "c03", names(3))
    for wrong in ("eve", "c01"):
        with pytest.raises(ArtifactError, match="survivors are 2 known clients of 3"):
            secagg.revealed(attempt.opened("c00"), attempt.roster, "c00", ["c00", "c01", wrong])
    with pytest.raises(ArtifactError, match="c03 is to mask a vector without being among those"):
        secagg.add_masks(np.zeros(2, np.uint32), attempt.secrets["c03"], attempt.roster, "c03", names(3))


# What it is built of


def test_a_keystream_is_one_however_it_is_cut():
    words, again = np.zeros(3 * 2**20 + 7, np.uint32), np.zeros(5, np.uint32)
    ciphers.add_keystream(words, bytes(32), 1)
    ciphers.add_keystream(again, bytes(32), 1)
    assert (words[:5] == again).all()
    # RFC 8439, appendix A.1, test vector 1: the keystream of a key and nonce of zeros.
    assert words[:2].astype("<u4").tobytes().hex() == "76b8e0ada0f13d90"
    assert len(np.unique(words[-1000:])) == 1000
    ciphers.add_keystream(words, bytes(32), -1)
    assert not words.any()
