"""Choosing layers: what is measured against the slow way, and greed where the answer is known."""

from contextlib import ExitStack

import pytest
import torch
from families import make_checkpoint

from hf_fedlarge import choice
from hf_fedlarge.choice import choose, losses
from hf_fedlarge.package import stream_checkpoint
from hf_fedlarge.walk import Walk

IDS = list(torch.randint(4, 260, (20, 1, 16), generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_losses_without_layers_are_those_of_the_model_with_their_surrogates(family, tmp_path):
    model = stream_checkpoint(make_checkpoint(tmp_path / "full", family, layers=4), dtype=torch.float32)
    walk = Walk(model, IDS[0])
    surrogates = {layer: lambda hidden, layer=layer: hidden * (1 + layer / 10) for layer in range(1, 4)}
    sets = [set(), {1}, {3}, {1, 2}, {1, 3}]
    found = losses(walk, IDS, surrogates, sets)
    for gone, loss in zip(sets, found, strict=True):
        with ExitStack() as replaced, torch.no_grad():
            for layer in gone:
                replaced.enter_context(walk.replaced(layer, surrogates[layer]))
            expected = sum(model(ids, labels=ids).loss.item() for ids in IDS) / len(IDS)
        assert loss == pytest.approx(expected, rel=1e-5)
    assert len(set(found)) == len(sets)


def test_what_two_sets_have_in_common_is_computed_once(tmp_path):
    model = stream_checkpoint(make_checkpoint(tmp_path / "full", "llama", layers=4), dtype=torch.float32)
    walk, steps = Walk(model, IDS[0]), []
    step, walk.step = walk.step, lambda layer, hidden: steps.append(layer) or step(layer, hidden)
    losses(walk, IDS[:1], dict.fromkeys(range(1, 4), lambda hidden: hidden), [set(), {2}, {3}, {2, 3}])
    assert steps == [0, 1, 2, 3, 3]


def table(costs):
    """A measure of made-up losses, and the sets it was asked for."""
    asked = []

    def measure(sets):
        asked.extend(map(frozenset, sets))
        return [7.0 + costs(frozenset(one)) for one in sets]

    return measure, asked


def test_greed_sees_that_two_layers_can_not_both_go():
    """Alone 1 and 2 cost least, but only 1 and 3 go well together."""
    alone = {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.9}

    def costs(gone):
        return sum(alone[layer] for layer in gone) + (5.0 if {1, 2} <= gone else 0.0)

    measure, asked = table(costs)
    gone, scores, evaluations = choice._by_loss(measure, 5, 3)
    assert gone == {1, 3}
    assert scores == pytest.approx([float("inf"), 0.1, 5.2, 0.3, 0.9])
    assert asked == [frozenset(one) for one in [(), (1,), (2,), (3,), (4,), (1, 2), (1, 3), (1, 4)]]
    assert evaluations == len(asked)


def test_only_the_few_best_are_judged_anew():
    measure, asked = table(lambda gone: sum(gone))
    gone, _, evaluations = choice._by_loss(measure, 20, 17)
    assert gone == {1, 2, 3}
    assert evaluations == len(asked) == 20 + 2 * 4
    assert asked[-4:] == [{1, 2, layer} for layer in (3, 4, 5, 6)]


def test_one_layer_can_be_all_that_stays():
    measure, _ = table(len)
    assert choice._by_loss(measure, 4, 1)[0] == {1, 2, 3}


def test_a_layer_that_is_its_surrogate_leaves_all_gradients_as_they_are(tmp_path):
    model = stream_checkpoint(make_checkpoint(tmp_path / "full", "gpt2", layers=4), dtype=torch.float32)
    walk = Walk(model, IDS[0])

    def itself(hidden):
        return hidden * 1.5

    ids = torch.cat(IDS)
    surrogates = dict.fromkeys(range(1, 4), itself)
    with walk.replaced(2, itself):
        scores = choice._by_gradient(model, walk, ids, surrogates)
    assert scores[2] == pytest.approx(0, abs=1e-5)
    assert min(scores[1], scores[3]) > 0.01


@pytest.mark.parametrize(
    ("how", "cost"),
    [
        ("influence", "by influence: one pass over 320 tokens"),
        ("loss", "by loss: one pass over 320 tokens, 6 evaluations of 320 tokens"),
        ("gradient", "by gradient: one pass over 320 tokens, 4 backward passes over 256 tokens"),
    ],
)
def test_the_choice_says_what_it_took(how, cost, tmp_path):
    checkpoint = make_checkpoint(tmp_path / "full", "llama", layers=4)
    chosen = choose(checkpoint, IDS, how, 2)
    assert chosen.cost == cost
    assert len(chosen.kept) == 2
    assert chosen.kept[0] == 0
    assert len(chosen.scores) == 4
