"""Codecs of updates: how far a round trip is off, what it stores, and that what is lost comes in the end."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from hf_fedlarge.architectures import describe
from hf_fedlarge.codec import CHANGED, Layout, decode, encode, stored_parts
from hf_fedlarge.config import Codec, LoraSettings
from hf_fedlarge.errors import ArtifactError
from hf_fedlarge.quantize import BLOCK, NF4_CODE
from hf_fedlarge.update import update_bytes

CODECS = [
    Codec(name="bf16"),
    Codec(name="int8"),
    Codec(name="nf4"),
    Codec(name="topk", topk_share=0.1),
    Codec(name="topk", topk_share=1.0),
]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: f"{codec.name}-{codec.topk_share}")


@st.composite
def changes(draw):
    """Changes of all sizes: rows that differ by orders of magnitude, zeros, ties, counts that fill no block."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 150))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    change = torch.randn(rows, columns, generator=generator)
    change *= 10.0 ** torch.tensor(draw(st.lists(st.integers(-20, 3), min_size=rows, max_size=rows)))[:, None]
    kind = draw(st.sampled_from(["plain", "zeros", "ties", "sparse"]))
    if kind == "ties":
        return change.sign()
    if kind == "sparse":
        return change * (torch.rand(rows, columns, generator=generator) < 0.05)
    return torch.zeros_like(change) if kind == "zeros" else change


def bound(change, codec):
    """How far each value may be off, by the codec's definition."""
    size = change.abs()
    if codec.name == "bf16":
        return size / 256
    if codec.name == "int8":
        return (size.amax(dim=1, keepdim=True) / 254 * 2**0.25 * (1 + 1e-5) + 2.0**-48).expand_as(change)
    if codec.name == "nf4":
        flat = torch.nn.functional.pad(size.flatten(), (0, -change.numel() % BLOCK)).view(-1, BLOCK)
        widest = (NF4_CODE[1:] - NF4_CODE[:-1]).max() / 2 + 1 / 256  # the scale is in bf16
        return (flat.amax(dim=1, keepdim=True) * widest).expand_as(flat).flatten()[: change.numel()].view(change.shape)
    kept = math.ceil(codec.topk_share * change.numel())
    smallest = size.flatten().sort(descending=True).values[kept - 1]
    return torch.where(size > smallest, size / 256, smallest)


@every_codec
@given(change=changes())
def test_a_round_trip_is_off_by_no_more_than_the_codec_says(codec, change):
    parts = encode(change, codec)
    assert {name: (part.dtype, len(part)) for name, part in parts.items()} == stored_parts(codec, tuple(change.shape))
    decoded = decode(parts, codec, tuple(change.shape))
    assert decoded.dtype == torch.float32
    assert ((decoded - change).abs() <= bound(change, codec)).all()
    again = encode(change.clone(), codec)
    assert all(torch.equal(part, again[name]) for name, part in parts.items())


def test_int8_of_rows_from_nothing_to_more_than_any_adapter_has():
    change = torch.tensor([[0.0, 0.0], [1e-30, -1e-30], [1e-12, 0.0], [1.0, -0.5], [1e6, 1e3]])
    parts = encode(change, CODECS[1])
    assert parts["scales"].tolist() == sorted(parts["scales"].tolist())
    back = decode(parts, CODECS[1], (5, 2))
    assert torch.equal(back[0], change[0])
    assert ((back - change).abs() <= change.abs().amax(dim=1, keepdim=True) / 213 + 2.0**-48).all()


@pytest.mark.parametrize("codec", CODECS[1:3], ids=lambda codec: codec.name)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_has_no_code_is_refused(codec, value):
    with pytest.raises(ArtifactError, match="holds infinite values or NaN"):
        encode(torch.tensor([[1.0, value], [0.0, 1.0]]), codec)


@given(change=changes())
def test_topk_sends_the_largest_and_nothing_else(change):
    codec = CODECS[3]
    parts = encode(change, codec)
    kept = math.ceil(0.1 * change.numel())
    sizes = change.flatten().abs().sort(descending=True).values
    assert torch.equal(change.flatten()[parts["indices"].long()].abs().sort(descending=True).values, sizes[:kept])
    assert (parts["indices"].diff() > 0).all()
    assert int(decode(parts, codec, tuple(change.shape)).count_nonzero()) <= kept


@pytest.mark.parametrize(
    ("codec", "values"),
    [(CODECS[0], 2.0), (CODECS[1], 1 + 1 / 576), (CODECS[2], 0.5 + 2 / 64), (CODECS[3], 0.6)],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_value_takes_the_bytes_that_are_promised(codec, values):
    parts = stored_parts(codec, (16, 576))
    assert sum(dtype.itemsize * count for dtype, count in parts.values()) == pytest.approx(
        values * 16 * 576, rel=0.0, abs=6
    )


@every_codec
def test_with_feedback_the_sum_of_what_arrives_stays_one_loss_behind_the_truth(codec):
    """And without it, the loss of the same codec adds up."""
    generator = torch.Generator().manual_seed(3)
    trend = torch.randn(4, 96, generator=generator)
    true, arrived, forgetful, lost = (torch.zeros(4, 96) for _ in range(4))
    for _ in range(60):
        change = trend + 0.1 * torch.randn(4, 96, generator=generator)
        true += change
        sent = decode(encode(change + lost, codec), codec, (4, 96))
        lost = change + lost - sent
        arrived += sent
        forgetful += decode(encode(change, codec), codec, (4, 96))
    assert torch.dist(true - arrived, lost) < 1e-3 * true.norm() / 60
    if codec.topk_share == 0.1:
        assert torch.dist(true, arrived) < 0.25 * true.norm()
        assert torch.dist(true, forgetful) > 0.6 * true.norm()
    else:
        assert torch.dist(true, arrived) < 0.1 * true.norm() / 60 + 1e-4 * true.norm()


def test_a_layout_says_where_each_changed_factor_lies():
    shapes = {"a": (2, 70), "b": (2, 3), "c": (1, 1)}
    layout = Layout(shapes, {"a": True, "b": False, "c": True}, Codec(name="nf4"))
    assert layout.infos == {
        "scales": (torch.bfloat16, (4,)),
        "values": (torch.uint8, (71,)),
        CHANGED: (torch.uint8, (3,)),
    }
    assert layout.places == {
        "a": {"scales": slice(0, 3), "values": slice(0, 70)},
        "c": {"scales": slice(3, 4), "values": slice(70, 71)},
    }
    nothing = Layout(shapes, dict.fromkeys(shapes, False), Codec(name="topk"))
    assert {shape for name, (_, shape) in nothing.infos.items() if name != CHANGED} == {(0,)}


def test_int8_takes_a_quarter_of_fp32s_bytes_in_an_update_of_smollm2():
    smollm2 = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
    )
    sizes = [
        update_bytes(describe(smollm2), list(range(30)), LoraSettings(rank=16), Codec(name=name))
        for name in ("fp32", "int8")
    ]
    assert sizes[0] / 4.01 < sizes[1] <= sizes[0] / 4


def spoiled(codec, part, place, value):
    parts = encode(torch.arange(1.0, 129.0).view(1, 128), codec)
    parts[part][place] = value
    return parts


@pytest.mark.parametrize(
    ("codec", "part", "place", "value", "cause"),
    [
        (CODECS[2], "scales", 1, -1.0, "scales is negative or not a finite"),
        (CODECS[2], "scales", 1, math.nan, "scales is negative or not a finite"),
        (CODECS[3], "indices", 0, -1, "not rising numbers from 0 to 127"),
        (CODECS[3], "indices", -1, 128, "not rising numbers from 0 to 127"),
        (CODECS[3], "indices", 0, 127, "not rising"),
        (CODECS[3], "indices", 1, 115, "not rising"),
    ],
)
def test_what_no_encoder_makes_is_refused(codec, part, place, value, cause):
    decode(
        spoiled(codec, part, place, encode(torch.arange(1.0, 129.0).view(1, 128), codec)[part][place]), codec, (1, 128)
    )
    with pytest.raises(ArtifactError, match=cause):
        decode(spoiled(codec, part, place, value), codec, (1, 128))
