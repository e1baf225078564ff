"""Federations that could not be run to their end are refused where they are read."""

import pytest

from hf_fedlarge.config import FederationConfig
from hf_fedlarge.errors import ConfigError
from hf_fedlarge.records import checked


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
