"""What can be said of AMX without the processor: the instructions are there and nowhere else, and what runs where.

That the code around them is right is shown on emulated tiles, by test_isa.py and test_every_isa.py.
"""

import re
import shutil
import subprocess
from collections import Counter

import pytest
import torch

from fuselora.kernels import matmul_4bit, native, native_gemm

pytestmark = pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump here")
def test_tile_instructions_are_in_the_set_for_amx_alone():
    listing = subprocess.check_output(["objdump", "-d", "--no-show-raw-insn", str(native.LIBRARY)], text=True)
    found: Counter[tuple[str, str]] = Counter()
    function = ""
    for line in listing.splitlines():
        if line.endswith(">:"):
            function = line
        elif tile := re.search(r"\t(t(?:ile|dp)\w+|ldtilecfg)", line):
            found[function, tile.group(1)] += 1
    if "fuselora3amx" not in listing:
        pytest.skip("this library was built by a compiler or for a processor without AMX")
    assert all("fuselora3amx" in function for function, _ in found)
    multiply = {function for function, instruction in found if instruction == "tdpbf16ps"}
    # 2 x 2 and fewer tiles, of products and of attention; the compiler may put the latter into their callers.
    assert sum("TileDot" in function for function in multiply) >= 6
    assert len(multiply) > sum("TileDot" in function for function in multiply)
    assert {"ldtilecfg", "tilerelease", "tilezero", "tileloadd", "tilestored"} <= {name for _, name in found}


@pytest.mark.parametrize("isa, least", [("amx", 3072), ("avx512_bf16", 64), ("scalar", 64)])
def test_many_rows_are_dequantised_where_onednn_has_amx(isa, least, monkeypatch):
    x = torch.empty(0, dtype=torch.bfloat16)
    monkeypatch.setattr(native, "isa", lambda: isa)
    assert matmul_4bit.native_refusal(10**6, x) is None or native_gemm.has_amx()
    monkeypatch.setattr(matmul_4bit, "has_amx", lambda: True)
    assert matmul_4bit.native_refusal(least, x) is None
    assert "oneDNN" in matmul_4bit.native_refusal(least + 1, x)
    assert matmul_4bit.native_refusal(10**6, x.float()) is None


def test_dense_bf16_products_are_onednn_s_where_it_has_amx(monkeypatch):
    x = torch.empty(0, dtype=torch.bfloat16)
    monkeypatch.setattr(native_gemm, "library_refusal", native_gemm.library_refusal.__wrapped__)  # not its cache
    for isa in ("amx", "avx512_bf16"):
        monkeypatch.setattr(native, "isa", lambda isa=isa: isa)
        monkeypatch.setattr(native_gemm, "has_amx", lambda: True)
        assert "oneDNN" in native_gemm.dense_refusal(1024, x)
