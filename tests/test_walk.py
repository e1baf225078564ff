"""Walking over a model's blocks gives what its own forward gives, however many sequences there are."""

import pytest
import torch
from families import make_model
from transformers import AutoConfig, AutoModelForCausalLM

from hf_fedlarge.linear import FrozenLinear
from hf_fedlarge.package import stream_checkpoint
from hf_fedlarge.walk import Walk, hooked

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 300}
# Families that give their blocks something with a row for each sequence.
OTHERS = {
    "bloom": SIZES,
    "falcon": SIZES | {"alibi": True, "num_kv_heads": 4, "multi_query": False},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 300, "max_seq_len": 64},
    "xglm": {"d_model": 64, "attention_heads": 4, "num_layers": 2, "ffn_dim": 128, "vocab_size": 300},
}


def make_other(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **OTHERS[family], bos_token_id=0, eos_token_id=0, pad_token_id=3)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", ["llama", "gemma2", *OTHERS])
def test_steps_give_what_the_model_gives_for_any_number_of_sequences(family, tmp_path):
    (make_other(family) if family in OTHERS else make_model(family, dtype=torch.float32)).save_pretrained(tmp_path)
    model = stream_checkpoint(tmp_path, dtype=torch.float32)
    ids = torch.randint(4, 260, (3, 16), generator=torch.Generator().manual_seed(0))
    walk, found = Walk(model, ids[:1]), []
    for some in ids.split(2):
        hidden = walk.embed(some)
        for layer in range(len(walk)):
            hidden = walk.step(layer, hidden)
        found.append(walk.finish(hidden, some))
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(found), model.base_model(ids, use_cache=False).last_hidden_state)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_silent_matrices_are_not_multiplied_and_give_zeros(family, tmp_path, monkeypatch):
    make_model(family, dtype=torch.float32).save_pretrained(tmp_path)
    model = stream_checkpoint(tmp_path, dtype=torch.float32)
    ids = torch.randint(4, 260, (2, 16), generator=torch.Generator().manual_seed(0))
    walk = Walk(model, ids[:1])
    hidden, feed_forward = walk.embed(ids), model.architecture.feed_forward
    plain = walk.step(0, hidden)
    with hooked(walk.block(0), feed_forward.output, lambda module, args, value: torch.zeros_like(value)):
        expected = walk.step(0, hidden)
    multiply, multiplied = FrozenLinear.multiply, []
    monkeypatch.setattr(FrozenLinear, "multiply", lambda self, *args: multiplied.append(self) or multiply(self, *args))
    with walk.silent(0, [*feed_forward.inputs, feed_forward.output]):
        found = walk.step(0, hidden)
    assert torch.equal(found, expected)
    silent = {walk.block(0).get_submodule(path) for path in (*feed_forward.inputs, feed_forward.output)}
    assert multiplied
    assert not silent & {linear.module for linear in multiplied}
    assert torch.equal(walk.step(0, hidden), plain)
