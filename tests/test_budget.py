"""What a memory budget becomes: sizes read, plans that fit, and refusals that say what is missing."""

import gc
import weakref

import pytest
import torch
from families import make_package
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from hf_fedlarge import engine as engine_module
from hf_fedlarge.adapters import attach_lora
from hf_fedlarge.arena import Arena
from hf_fedlarge.budget import FULL_RATE_TOKENS, WORKING, parse_bytes, plan_activations
from hf_fedlarge.config import LoraSettings
from hf_fedlarge.errors import ConfigError
from hf_fedlarge.memory import used_bytes
from hf_fedlarge.package import load_package
from hf_fedlarge.trainers.streaming_trainer import StreamingLoraConfig


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2GiB", 2**31), ("1500MB", 1_500_000_000), ("1.5G", 1_500_000_000), ("64 mib", 2**26), (123, 123), ("7B", 7)],
)
def test_sizes_are_read_as_people_write_them(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "much", "-1GB", "2 TB of it", "1e9", "GiB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="expected a size such as 2GiB"):
        parse_bytes(text)


def test_a_trainer_s_budget_is_checked_before_anything_is_loaded(tmp_path):
    with pytest.raises(ConfigError, match="'lots' can't be read"):
        StreamingLoraConfig(output_dir=str(tmp_path), memory_budget="lots")


lengths = st.lists(st.integers(1, 3000), min_size=1, max_size=40)


@given(lengths, st.integers(1, 40), st.none() | st.integers(1, 8), st.integers(0, 10**6))
def test_without_a_budget_products_have_their_full_rate_and_little_is_kept(
    lengths, blocks, micro_batch_size, token_bytes
):
    plan = plan_activations(lengths, blocks, micro_batch_size, None, token_bytes)
    assert plan.kept == 1 or plan.kept * token_bytes * min(plan.group_tokens, sum(lengths)) <= 64 * 2**20
    assert plan.group_tokens >= min(sum(lengths), max(FULL_RATE_TOKENS, max(lengths)))
    if micro_batch_size is not None:
        assert plan.group_tokens <= max(FULL_RATE_TOKENS, micro_batch_size * max(lengths))


sizes = st.tuples(st.integers(100, 10**5), st.integers(10, 10**4), st.integers(0, 10**5))


@given(lengths, st.integers(1, 40), st.integers(0, 10**10), sizes)
def test_a_plan_fits_its_budget(lengths, blocks, available, sizes):
    token_bytes, boundary, casts = sizes
    held = boundary * sum(lengths) * (blocks + 2)
    if available < held + (2 * token_bytes + casts) * max(lengths):
        with pytest.raises(ConfigError, match="raise --memory_budget"):
            plan_activations(lengths, blocks, 1, available, *sizes)
        return
    plan = plan_activations(lengths, blocks, 1, available, *sizes)
    in_work = (2 * token_bytes + casts) * plan.group_tokens
    assert plan.group_tokens >= max(lengths)
    assert held + in_work + plan.kept * token_bytes * plan.group_tokens <= available * (1 + 1e-9)


@given(lengths, st.integers(1, 40), st.integers(100, 10**5))
def test_with_room_for_all_nothing_is_computed_twice(lengths, blocks, token_bytes):
    plan = plan_activations(lengths, blocks, 1, 10**16, token_bytes, 10.0)
    groups = -(-sum(lengths) // plan.group_tokens)
    assert plan.kept >= blocks * groups


def adapted(tmp_path):
    model = load_package(make_package(tmp_path / "package", "llama"), dtype=torch.float32)
    return attach_lora(model, model.architecture, LoraSettings(rank=4)).train()


def some_step(model):
    ids = torch.randint(4, 260, (4, 32), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()


def test_a_generous_budget_keeps_every_activation(tmp_path, monkeypatch):
    model = adapted(tmp_path)
    engine = model.engine
    engine.set_memory_budget(used_bytes(engine.device) + 2**30)
    some_step(model)
    before = engine.counters.dequantizations
    some_step(model)
    # Two a matrix even so: the dense weights are not kept.
    matrices = sum(map(len, engine.linears))
    assert engine.counters.dequantizations - before <= 2 * matrices
    everything = engine.counters.activation_bytes
    assert engine.arena.held == "block"
    other = adapted(tmp_path / "other")
    monkeypatch.setattr("hf_fedlarge.budget.UNASKED_BYTES", 0)
    some_step(other)
    assert everything > 2 * other.engine.counters.activation_bytes


def test_an_evaluation_is_not_charged_for_inputs_that_only_training_keeps(tmp_path, monkeypatch):
    model = adapted(tmp_path)
    plans = []
    planned = engine_module.plan_activations
    monkeypatch.setattr(engine_module, "plan_activations", lambda *a, **how: plans.append(a[1]) or planned(*a, **how))
    engine = model.engine
    engine.set_memory_budget(used_bytes(engine.device) + 2**30)
    ids = torch.randint(4, 260, (64, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(input_ids=ids, labels=ids)
    # Room for one sequence at a time and a few states of the whole batch, not for one behind each block.
    engine._available = int(64 * 32 * 64 * 4 * 4 + WORKING * engine._token_bytes * 32)
    with torch.no_grad():
        model(input_ids=ids, labels=ids)
    assert set(plans) == {1}
    monkeypatch.setattr(engine_module, "plan_activations", lambda lengths, _, **how: planned(lengths, 24, **how))
    with pytest.raises(ConfigError, match="--per_device_eval_batch_size"):
        model(input_ids=ids, labels=ids)


def test_a_budget_too_small_for_a_block_holds_one_matrix_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_fedlarge.engine.used_bytes", lambda device: 10**9)
    model = adapted(tmp_path)
    engine, block = model.engine, model.engine.counters.arena_bytes
    moments = 12 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    engine.set_memory_budget(10**9 + moments + block)
    assert engine.arena.held == "rows"
    assert engine.counters.arena_bytes == 64 * 128 * 4  # the largest matrix
    assert engine.arena.cast_bytes == 0


def test_a_batch_that_fits_beside_some_rows_and_not_beside_a_block_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_fedlarge.engine.used_bytes", lambda device: 10**9)
    model, plain = adapted(tmp_path), adapted(tmp_path / "plain")
    set_peft_model_state_dict(plain, get_peft_model_state_dict(model))
    engine, block = model.engine, model.engine.counters.arena_bytes
    moments = 12 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    engine.set_memory_budget(10**9 + moments + 2 * block)
    rows = 64 * 128 * 4

    def holds_a_block_for(length):
        ids = torch.randint(4, 260, (2, length), generator=torch.Generator().manual_seed(length))
        for each in (model, plain):
            each.zero_grad()
            each(input_ids=ids, labels=ids).loss.backward()
        for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
            if ours.requires_grad:
                torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-6)
        return engine.arena.held == "block"

    def longest(room):  # besides a block's graph there are the states between three blocks
        return int(room / (WORKING * engine._token_bytes + 2 * 64 * 4 * (3 + 2)))

    assert holds_a_block_for(4)
    assert holds_a_block_for(longest(block))
    assert engine._available == block
    assert not holds_a_block_for(longest(block) + 1)
    assert engine._available == 2 * block - rows
    assert not holds_a_block_for(longest(2 * block - rows))
    with pytest.raises(ConfigError, match="leaves 0 MB for activations"):
        holds_a_block_for(longest(2 * block - rows) + 1)


def test_two_buffers_of_a_gpu_count_twice(tmp_path):
    linears = adapted(tmp_path).engine.linears
    sizes = [
        Arena.bytes_needed(linears, torch.float32, torch.device(kind), held)
        for held in ("block", "rows")
        for kind in ("cpu", "cuda")
    ]
    assert sizes == [36864 * 4, 2 * 36864 * 4, 64 * 128 * 4, 64 * 128 * 4]


def test_the_largest_batch_to_come_is_refused_with_the_first(tmp_path):
    model = adapted(tmp_path)
    engine = model.engine
    budget = used_bytes(engine.device) + 2**30
    engine.set_memory_budget(budget, [64, 32])
    some_step(model)
    engine.start_over()
    engine.set_memory_budget(budget, [10**6])
    with torch.no_grad(), pytest.raises(ConfigError, match="a batch of 1000000 tokens"):
        model(input_ids=torch.arange(9)[None], labels=torch.arange(9)[None])
    engine.start_over()  # another training may have other batches
    some_step(model)


def test_what_products_of_another_dtype_pass_through_counts(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", dict)
    arena = load_package(make_package(tmp_path / "package", "llama")).engine.arena
    assert arena.cast_bytes == 4 * 3 * 128


def test_a_budget_too_small_for_anything_is_refused_with_what_is_needed(tmp_path):
    model = adapted(tmp_path)
    with pytest.raises(ConfigError, match=r"too small: \d+ MB are in use .* give at least \d+ MB"):
        model.engine.set_memory_budget(10**6)


@pytest.mark.parametrize("trained", [False, True])
def test_a_model_that_was_used_leaves_no_memory_behind(tmp_path, trained):
    """Its first batch is measured by what operations keep; some keep their own output."""
    model = load_package(make_package(tmp_path / "package", "llama"))
    matrix = weakref.ref(next(iter(model.engine.linear_of.values())))
    tokens = torch.arange(6)[None]
    if trained:
        model = attach_lora(model, model.architecture, LoraSettings())
        model(input_ids=tokens, labels=tokens).loss.backward()
    else:
        with torch.no_grad():
            model(input_ids=tokens, labels=tokens)
    del model
    gc.collect()
    assert matrix() is None
