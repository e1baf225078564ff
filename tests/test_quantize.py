"""NF4 is bitsandbytes' bit for bit, however it is cut; what is read back equals the table; int8 keeps its bound."""

import json

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_fedlarge import quantize
from hf_fedlarge.errors import ArtifactError
from hf_fedlarge.quantize import decode, encode, encoded_infos

NF4_CODE = bnb.get_4bit_type("nf4", device="cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Widths that NF4's blocks of 64 divide and that they don't, even and odd numbers of values, more than 256 blocks.
SHAPES = [(128, 64), (130, 192), (300, 128), (64, 96), (192, 200), (96, 40), (64, 3), (7, 9), (1, 1), (700, 33)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "×".join(map(str, shape)))
quick = settings(max_examples=60, deadline=None)


def some_matrix(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(0.05).to(dtype)


def encoded(matrix, codec, rows_at_a_time=64):
    tensors = encode("w", tuple(matrix.shape), codec, matrix.split(rows_at_a_time))
    infos = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert infos == encoded_infos("w", tuple(matrix.shape), codec)
    return tensors


def read_all(weight, dtype=torch.float32):
    out = torch.empty(weight.shape, dtype=dtype)
    weight.read_rows(0, weight.shape[0], out)
    return out


def by_table(packed, state, shape):
    """The slow, obvious reference: one code at a time from the table, times its block's scale."""
    scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    halves = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()[: shape[0] * shape[1]]
    return (NF4_CODE[halves.long()] * scales.repeat_interleave(64)[: len(halves)]).view(shape)


# NF4


@each_shape
@pytest.mark.parametrize("dtype", DTYPES)
def test_nf4_in_row_blocks_is_bitsandbytes_nf4_of_the_whole(shape, dtype):
    matrix = some_matrix(shape, dtype=dtype)
    packed, state = bnb.quantize_4bit(matrix, blocksize=64, quant_type="nf4", compress_statistics=True)
    tensors = encoded(matrix, "nf4")
    assert torch.equal(tensors["w"], packed)
    assert torch.equal(tensors["w.absmax"], state.absmax)
    assert torch.equal(tensors["w.nested_absmax"], state.state2.absmax)
    assert torch.equal(tensors["w.nested_quant_map"], state.state2.code)
    assert torch.equal(tensors["w.quant_map"], state.code)
    assert decode("w", "nf4", tensors).offset == state.offset.item()


@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-39, 1.5e-38, 1.0, 3e38])
def test_nf4_is_bitsandbytes_at_and_beside_every_bound_whatever_the_scale(largest):
    """With 1.0 the values are at the bounds, one and two steps beside them; the others are there by chance."""
    bounds = torch.cat([(NF4_CODE[:-1] + NF4_CODE[1:]) / 2, NF4_CODE, torch.tensor([0.0, -0.0])])
    up, down = torch.full_like(bounds, torch.inf), torch.full_like(bounds, -torch.inf)
    above, below = bounds.nextafter(up), bounds.nextafter(down)
    values = torch.cat([bounds, above, below, above.nextafter(up), below.nextafter(down)]).clamp(-1, 1)
    blocks = torch.cat([values, values.new_zeros(-len(values) % 63)]).view(-1, 63)
    matrix = torch.cat([blocks, torch.ones(len(blocks), 1)], dim=1).mul(largest).repeat(64, 1)
    packed, state = bnb.quantize_4bit(matrix, blocksize=64, quant_type="nf4", compress_statistics=True)
    tensors = encoded(matrix, "nf4")
    assert torch.equal(tensors["w"], packed)
    assert torch.equal(tensors["w.absmax"], state.absmax)


@pytest.mark.parametrize("shape", [(128, 64), (7, 9)])
@pytest.mark.parametrize("codec", ["nf4", "int8"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_matrix_with_a_value_that_is_not_finite_is_refused(codec, shape, value):
    matrix = some_matrix(shape)
    matrix[-1, 3] = value
    with pytest.raises(ArtifactError, match=r"^The matrix w holds infinite values or NaN; fetch .* again\.$"):
        encoded(matrix, codec)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_checkpoint_in_any_float_type_can_be_encoded(dtype):
    matrix = some_matrix((128, 64), dtype=dtype)
    for codec, error in (("nf4", 0.13), ("int8", 0.02), ("dense", 0.01)):
        back = read_all(decode("w", codec, encoded(matrix, codec)))
        assert (back - matrix).norm() / matrix.norm() < error


@each_shape
@pytest.mark.parametrize("dtype", DTYPES)
def test_reading_all_rows_equals_the_table(shape, dtype):
    matrix = some_matrix(shape)
    packed, state = bnb.quantize_4bit(matrix, blocksize=64, quant_type="nf4", compress_statistics=True)
    weight = decode("w", "nf4", encoded(matrix, "nf4"))
    assert torch.equal(read_all(weight, dtype), by_table(packed, state, shape).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_bitsandbytes_own_reading_is_right_ours_is_the_same(dtype):
    matrix = some_matrix((130, 192), dtype=dtype)
    packed, state = bnb.quantize_4bit(matrix, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(read_all(decode("w", "nf4", encoded(matrix, "nf4")), dtype), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("codec", ["nf4", "int8", "dense"])
@quick
@given(data=st.data(), shape=st.sampled_from(SHAPES), dtype=st.sampled_from(DTYPES))
def test_any_range_of_rows_and_any_rows_are_those_of_the_whole(codec, data, shape, dtype):
    weight = decode("w", codec, encoded(some_matrix(shape), codec))
    whole = read_all(weight, dtype)
    start = data.draw(st.integers(0, shape[0]))
    stop = data.draw(st.integers(start, shape[0]))
    out = torch.full((stop - start, shape[1]), torch.nan, dtype=dtype)
    weight.read_rows(start, stop, out)
    assert torch.equal(out, whole[start:stop])
    index = torch.tensor(data.draw(st.lists(st.integers(0, shape[0] - 1), max_size=9)), dtype=torch.int64)
    assert torch.equal(weight.gather(index, dtype), whole[index])


def test_without_a_kernel_for_the_type_the_table_serves(monkeypatch):
    weight = decode("w", "nf4", encoded(some_matrix((128, 64)), "nf4"))
    with_kernel = read_all(weight, torch.bfloat16)
    monkeypatch.setattr(quantize, "_KERNELS", {})
    assert torch.equal(read_all(weight, torch.bfloat16), with_kernel)


def test_the_kernels_are_found_and_a_missing_one_is_noticed():
    assert set(quantize._KERNELS) == set(DTYPES)
    assert getattr(quantize._native._lib, "cdequantize_no_such_kernel", None) is None


@each_shape
def test_bitsandbytes_reads_the_stored_state(shape):
    matrix = some_matrix(shape)
    tensors = encoded(matrix, "nf4")
    state = bnb.QuantState.from_dict({name: tensor for name, tensor in tensors.items() if name != "w"}, device="cpu")
    assert (state.quant_type, state.blocksize, state.dtype, state.shape) == ("nf4", 64, torch.bfloat16, shape)
    assert state.nested
    expected = read_all(decode("w", "nf4", tensors))
    assert torch.equal(by_table(tensors["w"], state, shape), expected)


@pytest.mark.parametrize("offset", [1e-30, 1.2345678e-5, 1.2345678e30])
def test_the_state_has_room_for_the_longest_numbers(offset):
    matrix = torch.full((64, 64), offset)
    tensors = encode("w", (64, 64), "nf4", [matrix])
    assert decode("w", "nf4", tensors).offset == pytest.approx(offset, rel=1e-6)
    assert len(tensors["w.quant_state.bitsandbytes__nf4"]) == 256


# int8


@quick
@given(
    rows=st.lists(
        st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=5, max_size=5),
        min_size=1,
        max_size=6,
    )
)
def test_int8_is_off_by_half_a_step_at_most(rows):
    matrix = torch.tensor(rows)
    tensors = encoded(matrix, "int8")
    step = tensors["w_scale"][:, None].double()
    error = (read_all(decode("w", "int8", tensors)).double() - matrix.double()).abs()
    assert (error <= step / 2 * (1 + 1e-5)).all()
    # No finer step would do: the largest value of a row is 127 of them.
    largest = matrix.abs().amax(dim=1, keepdim=True).double()
    assert (step <= (largest / 127 * (1 + 1e-5)).clamp_min(torch.finfo(torch.float32).tiny)).all()


def test_rows_of_zeros_stay_zero_in_int8():
    matrix = some_matrix((3, 8))
    matrix[1] = 0
    back = read_all(decode("w", "int8", encoded(matrix, "int8")))
    assert (back[1] == 0).all()
    assert (back[0] != 0).any()


def test_dense_is_the_matrix_in_bf16():
    matrix = some_matrix((130, 40))
    assert torch.equal(read_all(decode("w", "dense", encoded(matrix, "dense"))), matrix.bfloat16().float())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_dense_may_be_of_any_float_type(dtype):
    matrix = some_matrix((13, 40), dtype=dtype)
    assert torch.equal(read_all(decode("w", "dense", {"w": matrix}), dtype), matrix)


# What is stored can't be trusted


STATE = "w.quant_state.bitsandbytes__nf4"
PARTS = [(codec, part) for codec in ("nf4", "int8", "dense") for part in encoded_infos("w", (130, 192), codec)]


def with_state(text):
    tensors = encoded(some_matrix((130, 192)), "nf4")
    return tensors | {STATE: torch.frombuffer(bytearray(text.encode().ljust(256)), dtype=torch.uint8)}


def state_of(tensors):
    return json.loads(bytes(tensors[STATE].tolist()))


@pytest.mark.parametrize(("codec", "part"), PARTS)
def test_a_missing_part_is_named(codec, part):
    tensors = encoded(some_matrix((130, 192)), codec)
    del tensors[part]
    with pytest.raises(ArtifactError, match=f"The tensor {part} is missing; expected"):
        decode("w", codec, tensors)


@pytest.mark.parametrize(("codec", "part"), [case for case in PARTS if case[0] == "nf4" or case[1] != "w"])
def test_a_part_too_short_is_refused(codec, part):
    tensors = encoded(some_matrix((130, 192)), codec)
    tensors[part] = tensors[part][:-1]
    with pytest.raises(ArtifactError, match=rf"The tensor {part} is .* \(\d+,.*; expected .* \(\d+,"):
        decode("w", codec, tensors)


@pytest.mark.parametrize(("codec", "part"), PARTS)
def test_a_part_of_another_type_is_refused(codec, part):
    tensors = encoded(some_matrix((130, 192)), codec)
    tensors[part] = tensors[part].to(torch.int16)
    with pytest.raises(ArtifactError, match=rf"The tensor {part} is torch\.int16 .*; expected torch\."):
        decode("w", codec, tensors)


@pytest.mark.parametrize("codec", ["nf4", "int8", "dense"])
def test_the_shape_asked_for_is_the_shape_found(codec):
    tensors = encoded(some_matrix((130, 192)), codec)
    assert decode("w", codec, tensors, shape=(130, 192)).shape == (130, 192)
    with pytest.raises(ArtifactError, match=r"The matrix w has the shape \(130, 192\); expected \(192, 130\)"):
        decode("w", codec, tensors, shape=(192, 130))


@pytest.mark.parametrize("codec", ["int8", "dense"])
def test_a_vector_is_no_matrix(codec):
    tensors = {name: tensor.flatten() for name, tensor in encoded(some_matrix((8, 8)), codec).items()}
    with pytest.raises(ArtifactError, match=r"The matrix w has the shape \(64,\); expected two dimensions"):
        decode("w", codec, tensors)


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_type": "fp4"},
        {"blocksize": 128},
        {"nested_blocksize": 64},
        {"dtype": "float32"},
        {"nested_offset": float("nan")},
        {"nested_offset": float("inf")},
        {"nested_offset": None},
        {"nested_offset": 10**99},
        {"shape": None},
        {"shape": [130]},
        {"shape": [-130, -192]},
        {"shape": [130.0, 192.0]},
        {"surprise": 1},
    ],
)
def test_a_state_that_is_not_ours_is_refused(changes):
    state = state_of(encoded(some_matrix((130, 192)), "nf4"))
    with pytest.raises(ArtifactError, match=f"The tensor {STATE} holds .*; expected .*'nf4'"):
        decode("w", "nf4", with_state(json.dumps(state | changes)))


def test_a_state_that_announces_more_than_is_stored_is_refused():
    state = state_of(encoded(some_matrix((130, 192)), "nf4"))
    with pytest.raises(ArtifactError, match=r"The tensor w\.nested_absmax is"):
        decode("w", "nf4", with_state(json.dumps(state | {"shape": [10**30, 192]})))


@pytest.mark.parametrize("text", ["", "{", "\u00ff\u0000", "[1, 2]", "7"])
def test_a_state_that_is_no_object_is_refused(text):
    with pytest.raises(ArtifactError, match=f"The tensor {STATE} (is not JSON|holds)"):
        decode("w", "nf4", with_state(text))
