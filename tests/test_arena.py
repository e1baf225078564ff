"""What is counted, and that pages are asked for before they are needed."""

import mmap

import pytest
import torch
from families import make_package

from hf_fedlarge.adapters import attach_lora
from hf_fedlarge.config import LoraSettings
from hf_fedlarge.kernels import kernels
from hf_fedlarge.memory import fetch_pages
from hf_fedlarge.package import load_package


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": True})
    monkeypatch.setattr("hf_fedlarge.budget.UNASKED_BYTES", 0)  # more than all of a tiny model's activations
    model = load_package(make_package(tmp_path / "package", "llama"))
    return attach_lora(model, model.architecture, LoraSettings(rank=4)).train()


def step(model):
    ids = torch.randint(4, 260, (2, 16), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()


def test_counters_of_a_step(model):
    counters, linears = model.engine.counters, model.engine.linears
    model.engine.hold("block")
    step(model)
    stored = [sum(part.nbytes for linear in block for part in linear.weight.stored) for block in linears]
    assert counters.dequantizations == 7 * (2 * len(linears) - 1)  # the last block's stay
    assert counters.bytes_read == 2 * sum(stored) - stored[-1]
    assert counters.arena_bytes == 2 * max(sum(linear.count for linear in block) for block in linears)
    hidden_states = len(linears) * 2 * 16 * 64 * 2
    assert counters.activation_bytes > hidden_states


def test_one_matrix_at_a_time_is_dequantized_thrice_at_most(model):
    engine = model.engine
    engine.hold("rows")
    assert engine.counters.arena_bytes == 2 * 64 * 128
    step(model)
    before = engine.counters.dequantizations
    step(model)
    matrices = sum(map(len, engine.linears))
    # Neither the output projections' values nor the first block's gradients are computed, and the last block's forward
    # is kept.
    assert 2 * matrices < engine.counters.dequantizations - before <= 3 * matrices


def test_matrices_that_stay_packed_take_no_arena_and_are_dequantized_by_every_product(model):
    if not (kernels() and kernels().has_tiles):
        pytest.skip("the processor has no AMX, or there is no compiler")
    counters = model.engine.counters
    assert (model.engine.arena.held, counters.arena_bytes) == ("nothing", 0)
    step(model)
    matrices = sum(map(len, model.engine.linears))
    assert 2 * matrices < counters.dequantizations <= 3 * matrices


def test_a_matrix_used_outside_a_visit_is_our_own_mistake(model):
    linear = model.engine.linears[0][0]
    with pytest.raises(AssertionError, match="outside a visit"):
        linear.forward(torch.zeros(1, linear.weight.shape[1], dtype=torch.bfloat16))


def test_the_following_block_s_pages_are_asked_for(model, monkeypatch):
    asked = []
    monkeypatch.setattr("hf_fedlarge.arena.fetch_pages", asked.append)
    engine = model.engine
    step(model)
    engine.arena._reader.shutdown()
    stored = [{part.data_ptr() for linear in block for part in linear.weight.stored} for block in engine.linears]
    blocks = [stored.index({part.data_ptr() for part in parts}) for parts in asked]
    assert blocks == [1, 2, 1, 0]  # forward, then backward


def test_fetching_pages_changes_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 1000)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE)
    tensor = torch.frombuffer(mapped, dtype=torch.uint8)
    fetch_pages([tensor, tensor[5000:5001], tensor[:0]])
    assert bytes(tensor.numpy()) == path.read_bytes()
