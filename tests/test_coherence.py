"""Federations that could not be run to their end are refused where they are read."""

import re

import pytest

from hf_fedlarge.coherence import TRAINING_DEFAULTS
from hf_fedlarge.config import FederationConfig, load_federation
from hf_fedlarge.errors import ConfigError
from hf_fedlarge.records import checked
from hf_fedlarge.trainers.streaming_trainer import StreamingLoraConfig


def read(**values):
    return checked(FederationConfig, {"checkpoint": "x"} | values, "federation.yaml")


@pytest.mark.parametrize("strategy", ["wrapped", "bfd_split"])
def test_packing_that_splits_texts_needs_max_steps(strategy):
    training = {"packing": True, "packing_strategy": strategy}
    with pytest.raises(ConfigError, match=rf"packing_strategy {strategy} makes any number of .*; set max_steps"):
        read(training=training)
    read(training=training | {"max_steps": 10})
    read(training=training | {"packing": False})
    read(training=training | {"packing_strategy": "bfd"})


def test_the_server_counts_on_what_the_trainer_takes_where_nothing_is_said(tmp_path):
    config = StreamingLoraConfig(output_dir=str(tmp_path))
    assert {name: getattr(config, name) for name in TRAINING_DEFAULTS} == TRAINING_DEFAULTS


@pytest.mark.parametrize("aggregator", ["median", "trimmed_mean", "krum", "multi_krum"])
def test_hostile_clients_are_not_to_be_outvoted_where_only_some_have_a_layer(aggregator):
    hostile = {} if aggregator == "median" else {"byzantine": 1}
    robust = {"aggregator": aggregator, "weighting": "equal"} | hostile
    with pytest.raises(ConfigError, match=f"tiers leave .* to few clients, among whom {aggregator} can't outvote"):
        read(**robust, tiers={"phone": {"memory": "3GB"}})
    read(**robust)


@pytest.mark.parametrize("clip", [0.5, "median"])
def test_control_variates_are_not_clipped(clip):
    with pytest.raises(ConfigError, match=r"clip bounds .* not of its control variate"):
        read(aggregator="ffa", scaffold=True, clip=clip)
    read(aggregator="ffa", clip=clip)


ROBUST = {"weighting": "equal", "byzantine": 1}
THREE = {"clients": {"ann": 5, "ben": 5, "cleo": 5}}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (THREE | {"cohort": 4}, "cohort is 4, but only 3 clients are named; name more or lower it"),
        (THREE | {"min_updates": 4}, "min_updates is 4, but only 3 clients are named; name more or lower it"),
        (
            THREE | ROBUST | {"aggregator": "krum"},
            "krum needs 5 updates to stand 1 hostile clients, but only 3 clients are named; name more or lower it",
        ),
        ({"package": "p", "heal_steps": 9}, "package is made already, and heal_steps would say how to make one"),
        ({"package": "p", "base_id": "me/x", "tiers": {}}, "package is made already, and base_id, tiers would say how"),
        ({"clients": {}}, "min_updates is 1, but only 0 clients are named"),
        ({"weighting": "loss", "client_eval_examples": 0}, "weighting loss needs held-out losses, but"),
        ({"budget": "5OOMB"}, "budget is '5OOMB'; expected a size such as 2GiB or 1500MB"),
        ({"tiers": {"phone": {"memory": "3 gigs"}}}, "tiers.phone.memory is '3 gigs'; expected a size"),
        ({"data": {"source": "x", "memory": ["1GB", "much"]}}, "data.memory.1 is 'much'; expected a size"),
    ],
)
def test_what_could_never_work_is_said_when_the_file_is_read(values, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        read(**values)


def test_what_just_works_is_read():
    read(**THREE, cohort=3, min_updates=3)
    read(**THREE, **ROBUST, aggregator="trimmed_mean")
    read(weighting="loss", client_eval_examples=1)
    read(budget="500MB", tiers={"phone": {"memory": "3GB"}}, data={"source": "x", "memory": ["1GiB"]})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("checkpoint: x\nrounds: 2\nrounds: 3\n", "the key rounds stands in line 2 and again in line 3"),
        ("checkpoint: x\nlora: {rank: 4, rank: 8}\n", "the key rank stands in line 2 and again in line 2"),
        ("checkpoint: x\nprivacy:\n  clip: 1\n  noise: 1\n  clip: 2\n", "the key clip stands in line 3 and again in"),
        ("checkpoint: x\nbase_id: 2024-13-45\n", "is not YAML: month must be in 1..12"),
        ("checkpoint: x\n[a, b]: 1\n", "is not YAML: while constructing a mapping"),
    ],
)
def test_a_file_that_is_not_what_it_seems_is_refused(tmp_path, text, sentence):
    (tmp_path / "federation.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        load_federation(tmp_path / "federation.yaml")


def test_what_is_merged_into_a_mapping_may_be_said_otherwise(tmp_path):
    text = "checkpoint: x\nlora: {rank: 4, alpha: 8}\ntiers: {phone: {memory: 1GB}}\n"
    (tmp_path / "federation.yaml").write_text(text.replace("{memory", "{<<: {memory: 2GB}, memory"))
    assert load_federation(tmp_path / "federation.yaml").tiers["phone"].memory == "1GB"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"rouds": 3}, "federation.yaml: rouds is not known; the nearest key is rounds."),
        (
            {"data": {"sorce": "x", "source": "y"}},
            "federation.yaml: data.sorce is not known; the nearest key is source.",
        ),
        (
            {"tiers": {"phone": {"memory": "3GB", "package": 1}}},
            "federation.yaml: tiers.phone.package is not known; expected memory, keep_layers, keep_neurons, rank.",
        ),
        ({"secure": {}}, "federation.yaml: secure gives the server a sum of factors, but exact needs "),
        ({"privacy": {"clip": -1.0}}, "federation.yaml: privacy.clip: Input should be greater than 0, found -1.0."),
    ],
)
def test_a_sentence_says_what_is_wrong_and_which_keys_there_are(values, sentence):
    with pytest.raises(ConfigError) as caught:
        read(**values)
    assert str(caught.value).startswith(sentence)
