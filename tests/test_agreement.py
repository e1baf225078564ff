"""What counts as an agreement on the survivors, and what doesn't."""

from itertools import combinations

import pytest

from hf_fedlarge import secagg
from hf_fedlarge.agreement import Agreement, agreed, check_agreed, check_agreement, is_signed, quorum
from hf_fedlarge.errors import ArtifactError
from hf_fedlarge.keys import allow, new_key, read_allowed, read_key, revoke

NAMES = ["ann", "ben", "cleo", "dan", "eve"]
SURVIVORS = NAMES[:4]
CONTEXT = "f" * 32 + "/1/1"


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Everybody's private key, and a list of the public ones."""
    path = tmp_path_factory.mktemp("keys")
    for name in NAMES:
        allow(path / "allowed.json", new_key(path / f"{name}.pem", name))
    return {name: read_key(path / f"{name}.pem") for name in NAMES}, path / "allowed.json"


def make_roster(keys, context=CONTEXT, threshold=3):
    clients = [secagg.advertised(name, secagg.new_secrets(), context, keys and keys[name]) for name in NAMES]
    return secagg.Roster(context=context, threshold=threshold, clients=clients)


@pytest.fixture(scope="module")
def roster(keys):
    return make_roster(keys[0])


def signatures(keys, roster, clients=SURVIVORS, sharers=NAMES, survivors=SURVIVORS):
    return {name: agreed(name, keys[0][name], roster, sharers, survivors).signature for name in clients}


def check(keys, roster, found, survivors=SURVIVORS):
    check_agreement(Agreement(signatures=found), roster, NAMES, survivors, read_allowed(keys[1]))


def test_a_quorum_is_the_threshold_and_more_than_two_thirds_where_all_have_signed(keys):
    for threshold, expected in ((3, 4), (4, 4), (5, 5)):
        assert quorum(make_roster(keys[0], threshold=threshold)) == expected
    unsigned = make_roster(None)
    assert not is_signed(unsigned)
    assert quorum(unsigned) == 3
    one = unsigned.model_copy(update={"clients": [make_roster(keys[0]).clients[0], *unsigned.clients[1:]]})
    assert not is_signed(one)


@pytest.mark.parametrize("count", range(2, 30))
def test_two_lists_have_a_quorum_only_if_more_than_a_third_signed_both(keys, count):
    roster = make_roster(keys[0])
    many = roster.model_copy(update={"clients": roster.clients[:1] * count, "threshold": count // 2 + 1})
    assert 2 * quorum(many) - count > count / 3
    assert quorum(many) <= count


def test_a_quorum_of_signatures_is_enough_and_one_fewer_is_not(keys, roster):
    good = signatures(keys, roster)
    check(keys, roster, good)
    check(keys, roster, dict(reversed(good.items())))
    for three in combinations(good, 3):
        with pytest.raises(ArtifactError, match="3 clients signed the survivors that this one was told; expected 4 at"):
            check(keys, roster, {name: good[name] for name in three})


@pytest.mark.parametrize(
    "what", ["forged", "round", "keys", "survivors", "sharers", "repeated", "lost", "stranger", "revoked", "advertised"]
)
def test_a_signature_of_something_else_or_of_somebody_else_does_not_count(keys, roster, tmp_path, what):
    """Dan's, beside three good ones."""
    good, allowed = signatures(keys, roster), read_allowed(keys[1])
    other = {
        "forged": lambda: good["dan"].model_copy(update={"signature": "0" * 128}),
        "round": lambda: signatures(keys, make_roster(keys[0], "f" * 32 + "/2/1"))["dan"],
        "keys": lambda: signatures(keys, make_roster(keys[0]))["dan"],  # of another attempt's keys
        "survivors": lambda: signatures(keys, roster, survivors=["ann", "ben", "cleo", "dan", "eve"])["dan"],
        "sharers": lambda: signatures(keys, roster, sharers=SURVIVORS)["dan"],
        "repeated": lambda: good["ann"],
        "advertised": lambda: roster.of("dan").signature,
    }
    found = good | ({"dan": other[what]()} if what in other else {})
    if what == "lost":  # who isn't a survivor has no part in what they say
        del found["dan"]
        found |= signatures(keys, roster, ["eve"])
    if what == "stranger":
        del found["dan"]
        found["zoe"] = good["dan"]
    if what == "revoked":
        path = tmp_path / "allowed.json"
        path.write_text(keys[1].read_text())
        revoke(path, "dan")
        allowed = read_allowed(path)
    with pytest.raises(ArtifactError, match=r"3 clients signed .* nothing is revealed"):
        check_agreement(Agreement(signatures=found), roster, NAMES, SURVIVORS, allowed)
    for name in ("ann", "ben", "cleo"):
        check_agreed(name, found[name], roster, NAMES, SURVIVORS, allowed)


def test_the_server_s_check_names_who_signs_for_others(keys, roster):
    eve = agreed("eve", keys[0]["eve"], roster, NAMES, SURVIVORS).signature
    with pytest.raises(ArtifactError, match="eve signs for survivors that it is not among"):
        check_agreed("eve", eve, roster, NAMES, SURVIVORS, read_allowed(keys[1]))
