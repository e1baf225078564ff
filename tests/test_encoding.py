"""Examples as tokens: what `encode_example` makes is compared with trl's in test_client.py."""

import re

import pytest
from families import MISTRAL, make_tokenizer
from federation import make_federation

from hf_fedlarge.encoding import encode_example, marking_template, warn_of_cut
from hf_fedlarge.errors import DataError
from hf_fedlarge.evaluation import evaluate

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def test_evaluation_says_once_how_many_examples_were_cut(tmp_path, caplog):
    _, package = make_federation(tmp_path)
    rows = [{"text": "short"}, {"text": "long " * 5}, {"text": "long " * 9}]
    warn_of_cut.cache_clear()
    found = [evaluate(package, rows, max_length=length, verify=False) for length in (12, 12, 100)]
    assert [one.tokens for one in found] == [5 + 11 + 11, 5 + 11 + 11, 5 + 25 + 45]
    said = re.findall(r"\d+ of .* cut\.", caplog.text)
    assert said == ["2 of 3 examples (held out) are longer than max_length (12) tokens and were cut."]


def test_the_assistant_s_turns_have_to_be_marked_by_the_template():
    tokenizer = make_tokenizer()
    assert marking_template(tokenizer) is None
    for template, found in ((MISTRAL, "trl knows none for this model"), (None, "this model has no chat template")):
        tokenizer.chat_template = template
        with pytest.raises(
            DataError, match=rf"^assistant_only_loss .*{found}.*; leave it out, .* chat_template.jinja."
        ):
            marking_template(tokenizer)
    tokenizer.chat_template = MISTRAL
    with pytest.raises(DataError, match="trl knows none"):
        encode_example(CHAT, tokenizer, None, assistant_only=True)
    answer = "{{ m.content + eos_token }}"
    tokenizer.chat_template = MISTRAL.replace(answer, f"{{% generation %}}{answer}{{% endgeneration %}}")
    assert marking_template(tokenizer) is None
    labels = encode_example(CHAT, tokenizer, None, assistant_only=True)["labels"]
    assert tokenizer.decode([label for label in labels if label >= 0]) == "Hello<|endoftext|>"
