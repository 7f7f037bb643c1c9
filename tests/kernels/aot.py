"""Compile the Triton kernels ahead of time, for GPUs that this machine lacks; test_aot.py runs it.

    python tests/kernels/aot.py

Prints one JSON line per kernel and target with registers, spilled bytes and shared memory. Pointers
are declared as aligned to 16 bytes, as torch's are; otherwise Triton would compile another kernel
than the one that runs.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fairseq_evomoe.kernels.experts import dispatch_triton, pairs_triton, products_triton
from fairseq_evomoe.kernels.gate import gate_triton, sums_triton
from fairseq_evomoe.kernels.lookup import lookup_triton
from fairseq_evomoe.kernels.triton_tiles import tile_shape

TARGETS = (80, 90)


def cases():
    """Yield (name, kernel, signature, constants, names of numbers that 16 divides)."""
    for score in range(3):
        for table, scaled in (("fp32", False), ("bf16", False), ("i8", True)):
            yield (
                f"lookup forward, score {score}, tables {table}",
                lookup_triton._forward,
                {
                    **{"z_ptr": "*bf16", "t_ptr": f"*{table}", "scale_ptr": "*fp32"},
                    **{"y_ptr": "*bf16", "code_ptr": "*i32", "p_ptr": "*fp32", "slope": "fp32"},
                    **dict.fromkeys(("rows", "count", "height", "width", "bits"), "i32"),
                    "per_split": "i32",
                },
                {"SCORE": score, "T": 8, "W": 512, "SCALED": scaled, "SAVE": not scaled},
                ("height", "width"),
            )
        yield (
            f"lookup backward to z, score {score}",
            lookup_triton._backward_z,
            {
                **{"z_ptr": "*bf16", "t_ptr": "*fp32", "dy_ptr": "*bf16", "dz_ptr": "*bf16"},
                **dict.fromkeys(("count", "height", "width", "bits"), "i32"),
                "slope": "fp32",
            },
            {"SCORE": score, "T": 8, "W": 512},
            ("height", "width"),
        )
    yield (
        "lookup backward to tables",
        lookup_triton._backward_tables,
        {
            **{"order_ptr": "*i64", "start_ptr": "*i64", "p_ptr": "*fp32", "dy_ptr": "*bf16"},
            **{"dt_ptr": "*fp32", "count": "i32", "width": "i32"},
        },
        {"W": 512},
        ("width",),
    )

    yield from gate_cases()

    rows = {"width": "i32", "experts": "i32", "place_ptr": "*i32"}
    for weighted, dot in ((False, False), (True, True)):
        yield (
            f"spread, weighted {weighted}",
            dispatch_triton._spread,
            {
                **{"x_ptr": "*bf16", "weight_ptr": "*fp32", "out_ptr": "*bf16"},
                **{"rows_ptr": "*bf16", "dot_ptr": "*fp32", **rows},
            },
            {"W": 1024, "WEIGHTED": weighted, "DOT": dot},
            ("width",),
        )
        yield (
            f"collect, weighted {weighted}",
            dispatch_triton._collect,
            {"rows_ptr": "*bf16", "weight_ptr": "*fp32", "y_ptr": "*bf16", **rows},
            {"W": 1024, "WEIGHTED": weighted},
            ("width",),
        )
    yield (
        "add rows",
        dispatch_triton._add_rows,
        {
            **{"h_ptr": "*bf16", "bias_ptr": "*bf16", "expert_ptr": "*i32", "out_ptr": "*bf16"},
            "width": "i32",
        },
        {"W": 1024},
        ("width",),
    )
    yield (
        "sum rows",
        dispatch_triton._sum_rows,
        {
            **{"dh_ptr": "*bf16", "starts_ptr": "*i32", "ends_ptr": "*i32", "db_ptr": "*bf16"},
            "width": "i32",
        },
        {"R": 64, "W": 128},
        ("width",),
    )
    yield from routing_cases()
    yield from fused_cases()


def gate_cases():
    """The gate's kernels with all their options, for 64 experts and for 4096, their limit."""
    gate = {
        **{"z_ptr": "*fp32", "active_ptr": "*i8", "tokens": "i32", "experts": "i32"},
        **{"tau": "fp32", "noise": "fp32", "seed": "i32"},
    }
    pointers = dict.fromkeys(("bias_ptr", "weight_ptr", "probs_ptr", "part_ptr"), "*fp32")
    pulls = dict.fromkeys(("dweight_ptr", "dprobs_ptr", "dsums_ptr", "dz_ptr"), "*fp32")
    for experts, combine in [(64, kind) for kind in range(4)] + [(4096, 0)]:
        sizes = {
            "COMBINE": combine,
            "NOISY": True,
            "SUMS": True,
            **gate_triton.launch_sizes(experts),
        }
        what = f"{experts} experts, weights {combine}"
        yield (
            f"gate forward, {what}",
            gate_triton._forward,
            {**pointers, **gate, "threshold": "fp32"},
            {"MOST": 2, "BY_THRESHOLD": True, "CAPPED": True, "BIASED": True, **sizes},
            (),
        )
        back = gate_triton._backward
        yield f"gate backward, {what}", back, {**pulls, **gate}, {"PROBS": True, **sizes}, ()


def routing_cases():
    shape = tile_shape(64)
    sizes = {"tokens": "i32", "experts": "i32"}
    count = {"active_ptr": "*i8", "count_ptr": "*i32", **sizes}
    yield "count pairs", pairs_triton._count, count, shape, ()
    yield (
        "accumulate counts",
        pairs_triton._accumulate,
        {
            **dict.fromkeys(("count_ptr", "ends_ptr"), "*i32"),
            **sizes,
            "blocks": "i32",
            "pairs": "i32",
        },
        {"R": shape["B"], "W": shape["W"]},
        (),
    )
    pointers = ("before_ptr", "ends_ptr", "place_ptr", "token_ptr", "expert_ptr")
    place = {"active_ptr": "*i8", **dict.fromkeys(pointers, "*i32"), **sizes, "pairs": "i32"}
    yield "place pairs", pairs_triton._place, place, shape, ()
    values = {"z_ptr": "*fp32", "p_ptr": "*fp32", **sizes}
    on = {"chosen_ptr": "*i8", "part_ptr": "*fp32", **values}
    yield "sum of a gate", sums_triton._forward, on, shape, ()
    back = {**dict.fromkeys(("grad_ptr", "dz_ptr", "dp_ptr"), "*fp32"), **values}
    yield "sum of a gate, backward", sums_triton._backward, back, shape, ()


def fused_cases():
    """Both grouped products with every tile shape that they use, at sizes that 16 divides."""
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        for each in (8, 64) if name == "fp32" else (8, 64, 256):
            sizes = products_triton.tile_sizes(each, 1, dtype)
            exact = {"PRECISION": "ieee", "WIDEN": False}
            own = {"token_ptr": "*i32", "ends_ptr": "*i32", "experts": "i32", "weight_ptr": "*fp32"}
            for mode in range(4):
                values = ("a_ptr", "b_ptr", "bias_ptr", "out_ptr", "h_ptr", "pre_ptr")
                numbers = ("pairs", "depth", "width", "b_width", "b_depth")
                apart = {"b_depth": 1} if mode < 2 else {"b_width": 1}
                yield (
                    f"grouped rows {mode}, {name}, {each} rows an expert",
                    products_triton._rows,
                    {
                        **dict.fromkeys(values, f"*{name}"),
                        **{"dot_products_ptr": "*fp32", **own},
                        **{n: "i32" for n in numbers if n not in apart},
                    },
                    {
                        **{"GATHER": mode in (0, 2), "MODE": mode, "ACTIVATION": 1, "W": 16},
                        **{**exact, **sizes, **apart},
                    },
                    ("depth", "width", "b_width", "b_depth"),
                )
            for weighted in (False, True):
                values = ("a_ptr", "b_ptr", "out_ptr", "bias_ptr")
                yield (
                    f"grouped weights, weighted {weighted}, {name}, {each} rows an expert",
                    products_triton._weights,
                    {
                        **dict.fromkeys(values, f"*{name}"),
                        **{**own, "height": "i32", "width": "i32"},
                    },
                    {
                        **{"GATHER_A": weighted, "GATHER_B": not weighted, "WEIGHTED": weighted},
                        **{**exact, **sizes, **products_triton.weight_tile_sizes(sizes)},
                    },
                    ("height", "width"),
                )


def resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        out = subprocess.run(
            [tool, "-res-usage", f.name], capture_output=True, text=True, check=True
        ).stdout
    # STACK counts what does not fit into registers, that is spills and local arrays
    return {k.lower(): int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", out)}


def main() -> None:
    for name, kernel, signature, constants, even in cases():
        order = kernel.arg_names
        types = {n: signature.get(n, "constexpr") for n in order}
        divisible = [
            n for n in order if types[n].startswith("*") or (n in even and types[n] == "i32")
        ]
        attrs = {(order.index(n),): [["tt.divisibility", 16]] for n in divisible}
        options = {k: constants.pop(k) for k in ("num_warps", "num_stages") if k in constants}
        constexprs = {(order.index(n),): v for n, v in constants.items()}
        for target in TARGETS:
            source = ASTSource(kernel, types, constexprs, attrs)
            made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
            found = resources(made.asm["cubin"])
            print(json.dumps({"kernel": name, "sm": target, **found}), flush=True)


if __name__ == "__main__":
    main()
