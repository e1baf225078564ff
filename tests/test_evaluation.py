"""An evaluation reads a streamed model as seldom as it can, and a block never computes more at once than it should."""

import pytest
import torch
from federation import make_federation

from hf_fedlarge import encoding
from hf_fedlarge.budget import FULL_RATE_TOKENS
from hf_fedlarge.evaluation import evaluate, evaluate_model
from hf_fedlarge.package import load_package, load_tokenizer

ROWS = [{"text": f"word {index} " * (1 + index % 5)} for index in range(64)]


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return make_federation(tmp_path_factory.mktemp("evaluation"))[1]


def visits(package, **how):
    """Its loss, how often each block was visited, and how many tokens the first one's layers were given at once."""
    model, rows = load_package(package, dtype=torch.float32, verify=False), []
    block = model.get_submodule(model.architecture.blocks)[0]
    block.mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:-1].numel()))
    found = evaluate_model(model, load_tokenizer(package), ROWS, **how)
    return found, model.engine.counters.visits / len(model.engine.blocks), rows


def test_a_pass_takes_as_many_examples_as_have_so_many_tokens(package, monkeypatch):
    small, passes, _ = visits(package, batch_size=8)
    assert passes == 8
    whole, passes, rows = visits(package)
    assert passes == 1
    assert sum(rows) >= whole.tokens > 2 * FULL_RATE_TOKENS
    assert max(rows) <= FULL_RATE_TOKENS + 64
    monkeypatch.setattr(encoding, "_TOKENS", 500)
    parts, passes, _ = visits(package)
    assert 2 < passes < 8
    for found in (whole, parts):
        assert (found.tokens, found.examples) == (small.tokens, small.examples)
        assert found.loss == pytest.approx(small.loss, rel=1e-5)


def test_a_family_whose_blocks_compute_a_batch_as_it_is_gets_few_examples_at_once(tmp_path):
    _, passes, _ = visits(make_federation(tmp_path, "gemma2")[1])
    assert passes == 8


def test_a_long_evaluation_is_told_by_tenths(package):
    lines = []
    evaluate(package, ROWS, batch_size=2, report=lines.append)
    assert len(lines) == 10
    assert lines[-1] == "evaluating: 32 of 32 passes are done"
    evaluate(package, ROWS, report=lines.append)
    assert len(lines) == 10
