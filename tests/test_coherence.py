"""Federations that could not be run to their end are refused where they are read."""

import re

import pytest

from hf_fedlarge.coherence import TRAINING_DEFAULTS
from hf_fedlarge.config import FederationConfig
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
