"""In what dtype products are computed rests on what the processor can."""

import pytest
import torch

from hf_fedlarge.processor import product_dtype


@pytest.mark.parametrize(
    ("dtype", "capability", "others"),
    [
        (torch.bfloat16, "amx_bf16", {"cpu_name": "Intel Xeon", "avx512_bf16": True}),
        (torch.bfloat16, "amx_bf16", {"avx512_bf16": True}),
        (torch.bfloat16, "avx512_bf16", {"cpu_name": "AMD EPYC 9R14"}),
        (torch.float16, "amx_fp16", {"cpu_name": "AMD EPYC 9R14", "avx512_bf16": True}),
        (torch.float16, "avx512_fp16", {"cpu_name": "Intel Xeon", "amx_bf16": True}),
    ],
)
def test_a_dtype_that_the_processor_is_slow_with_is_widened_for_products(monkeypatch, dtype, capability, others):
    cpu = torch.device("cpu")
    for has, expected in ((False, torch.float32), (True, dtype)):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda has=has: others | {capability: has})
        assert product_dtype(dtype, cpu) == expected
        assert product_dtype(dtype, torch.device("cuda")) == dtype
        assert product_dtype(torch.float32, cpu) == torch.float32
