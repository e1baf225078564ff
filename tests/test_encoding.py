"""Examples as tokens: what `encode_example` makes is compared with trl's in test_client.py."""

import re

from federation import make_federation

from hf_fedlarge.encoding import warn_of_cut
from hf_fedlarge.evaluation import evaluate


def test_evaluation_says_once_how_many_examples_were_cut(tmp_path, caplog):
    _, package = make_federation(tmp_path)
    rows = [{"text": "short"}, {"text": "long " * 5}, {"text": "long " * 9}]
    warn_of_cut.cache_clear()
    found = [evaluate(package, rows, max_length=length, verify=False) for length in (12, 12, 100)]
    assert [one.tokens for one in found] == [5 + 11 + 11, 5 + 11 + 11, 5 + 25 + 45]
    said = re.findall(r"\d+ of .* cut\.", caplog.text)
    assert said == ["2 of 3 examples (held out) are longer than max_length (12) tokens and were cut."]
