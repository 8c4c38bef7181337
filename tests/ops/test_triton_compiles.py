"""Every Triton kernel compiles to machine code for the GPUs we name, also where there is none to run it."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
SCRIPT = Path(__file__).with_name("ahead_of_time.py")
ONLY_SM_90 = [(90, "float16"), (90, "tf32")]
MOST_SPILLED = 0.02  # of the instructions of a loop that multiplies
MOST_NARROW = {"score_encoded": 1, "score_factored, rank 8": 16}  # loads of bytes or halves, of rows that are aligned
KERNELS = {
    "project_rows": [["_project_rows_kernel"]],
    "project_grad": [["_project_grad_kernel"], ["_project_grad_kernel", "_add_chunks_kernel"]],
    "chunks": [["_project_grad_kernel"], ["_project_grad_kernel", "_add_chunks_kernel"]],
    "accumulate_gram": [["_accumulate_gram_kernel"]],
    "quantize_rows": [["_scales_kernel", "_codes_kernel"]],
    "dequantize_rows": [["_dequantize_rows_kernel"]],
    "score_block": [["_score_kernel"]],
    "score_encoded": [["_score_encoded_kernel"], ["_score_int8_kernel"]],
    "score_topk": [["_score_kernel"]],
    "factor_rows": [["_factor_rows_kernel"]],
    "score_factored": [["_score_factored_kernel"]],
}


@pytest.mark.skipif(not PTXAS.exists(), reason="this Triton ships no ptxas")
@pytest.mark.parametrize(("arch", "dtype"), [*product((80, 90), ("bfloat16", "float32", "float64")), *ONLY_SM_90])
def test_compiles(arch, dtype):
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), str(arch), dtype],
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [line["error"] for line in lines if line["error"]] == []
    for op, launches in KERNELS.items():
        compiled = [line["kernels"] for line in lines if line["case"].partition(",")[0] == op]
        assert compiled or (op == "score_encoded" and dtype != "bfloat16")
        assert all(kernels in launches for kernels in compiled)
    assert {line["case"]: line["spilled"] for line in lines if line["spilled"] > MOST_SPILLED} == {}
    if dtype == "bfloat16":
        for case, most in MOST_NARROW.items():
            narrow = {line["case"]: line["narrow_loads"] for line in lines if line["case"].startswith(case)}
            assert narrow
            assert max(narrow.values()) <= most, narrow
        scores = [line for line in lines if line["case"].partition(",")[0] in ("score_block", "score_encoded")]
        assert all(line["tensor_cores"] for line in scores if line["case"] != "score_block, mixed")
