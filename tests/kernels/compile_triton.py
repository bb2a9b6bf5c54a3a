"""Compiles the Triton kernels for the chips named on the command line; prints what came of each as a line of JSON.

Needs no GPU. `test_triton_compile.py` runs it in processes of its own.
"""

import json
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from longvid.kernels import block_sparse, mass, pool_triton, select_triton

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
IS_DATA = re.compile(r"p_(q|k|v|out|x)$")
IS_FP32 = re.compile(r"p_(bias|lse|mean|largest|similarity|scores|weights|mass)$")
ALIGNED = re.compile(r"p_|stride_[qkvx][bhlt]$")

TAIL = {"dtype": "bf16", "SIZE": 128, "WHOLE": False}  # blocks of one size but for the last
WHOLE = {"dtype": "bf16", "SIZE": 128, "WHOLE": True}
RAGGED = {"dtype": "fp16", "SIZE": 0, "WHOLE": False}
GATHERED = {**RAGGED, "options": True}  # with orders and bias
VARIANTS = {
    64: {"tail": TAIL, "gathered": GATHERED},
    128: {"tail": TAIL, "whole": WHOLE, "ragged": RAGGED, "gathered": GATHERED},
}
DESCRIBED = {
    64: {"described": {**WHOLE, "DESCRIBED": True}, "gathered": GATHERED},
    128: {"described": {**TAIL, "DESCRIBED": True}, "whole": WHOLE, "ragged": RAGGED, "gathered": GATHERED},
}
LISTED = ("p_num_steps", "p_step_first", "p_step_stop")
OPTIONAL = ("p_bias", "p_q_order", "p_k_order")


def type_of(name, dtype, constants):
    if name.isupper():
        return "constexpr"
    if name in ("p_k", "p_v") and constants.get("DESCRIBED"):
        return f"tensordesc<{dtype}[1,{constants['BLOCK_N']},1,{constants['D']}]>"
    if name.startswith("p_"):
        of_data, of_fp32 = IS_DATA.match(name), IS_FP32.match(name)
        return f"*{dtype if of_data else 'fp32' if of_fp32 else 'i1' if name == 'p_mask' else 'i32'}"
    return "fp32" if name in ("scale_log2", "share") else "i32"


def compile_kernel(kernel, chip, dtype, constants, num_warps=4, num_stages=1):
    """The compiled kernel; `constants` by name, None for pointers that are not given."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else type_of(name, dtype, constants) for name in names}
    places = {names.index(name): value for name, value in constants.items()}
    described = ("p_k", "p_v") if constants.get("DESCRIBED") else ()
    aligned = [i for i, name in enumerate(names) if ALIGNED.match(name) and i not in places and name not in described]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(i,): value for i, value in places.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    is_amd = chip.startswith("gfx")
    target = GPUTarget("hip", chip, 64) if is_amd else GPUTarget("cuda", int(chip.removeprefix("sm_")), 32)
    return triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": num_stages})


def facts(compiled):
    """Bytes spilled to memory, tensor-core instructions, asynchronous loads, and bytes of shared memory."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        spilled = sum(map(int, re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size): *(\d+)", text)))
        products, loads = len(re.findall(r"\bv_mfma", text)), 0
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
        spilled = sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage.stdout)))
        text = compiled.asm["ptx"]
        products = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", text))
        loads = len(re.findall(r"\bcp\.async\.(?:c[ag]\.shared|bulk\.tensor)", text))
    return {"spilled": spilled, "products": products, "loads": loads, "shared": compiled.metadata.shared}


def forward_cases(chip):
    """Every configuration of the table for head dims 64 and 128."""
    by_dim = DESCRIBED if chip in block_sparse.DESCRIPTOR_CHIPS else VARIANTS
    for head_dim, variants in by_dim.items():
        for config in dict.fromkeys(block_sparse.CONFIGS[chip][head_dim]):
            for name, variant in variants.items():
                constants = {"D": head_dim, "BLOCK_D": head_dim, "BLOCK_M": config.block_m}
                constants |= {"SIZE": variant["SIZE"], "WHOLE": variant["WHOLE"]}
                constants["DESCRIBED"] = variant.get("DESCRIBED", False)
                constants["BLOCK_N"] = config.block_n if variant["SIZE"] else config.ragged_n
                absent = (() if variant.get("options") else OPTIONAL) + (LISTED if variant["SIZE"] else ())
                constants |= dict.fromkeys(absent)
                warps, stages = config.num_warps, config.num_stages
                label = f"forward {name} D={head_dim} {config.block_m}x{constants['BLOCK_N']}"
                yield label, (block_sparse.forward_kernel, chip, variant["dtype"], constants, warps, stages)


def other_cases(chip):
    yield "steps", (block_sparse.steps_kernel, chip, "i32", {"BLOCK_N": 64})
    sizes = {"D": 128, "BLOCK_D": 128, "BLOCK_M": 64, "BLOCK_N": 64}
    yield "mass", (mass.mass_kernel, chip, "bf16", sizes)
    yield "pool", (pool_triton.pool_kernel, chip, "bf16", {"D": 128, "BLOCK_D": 128, "BLOCK_N": 32})
    for name, kernel in (("top_k", select_triton.top_k_kernel), ("top_p", select_triton.top_p_kernel)):
        yield name, (kernel, chip, "fp32", {"BLOCK": 4096}, select_triton.num_warps(4096))


def main():
    warnings.simplefilter("ignore")
    for chip in sys.argv[1:]:
        for label, arguments in [*forward_cases(chip), *other_cases(chip)]:
            print(json.dumps({"chip": chip, "kernel": label, **facts(compile_kernel(*arguments))}), flush=True)


if __name__ == "__main__":
    main()
