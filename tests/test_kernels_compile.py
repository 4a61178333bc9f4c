"""The Triton kernels compile for an H100, which needs no GPU: the interpreter takes what the compiler refuses."""

from __future__ import annotations

import importlib
import importlib.util
import os

import pytest

# What Llama-3-8B launches: types of the run-time arguments (x: the dtype of the model), values of the compile-time ones.
DROPPING = {"DROP": True, "MODULES": 3, "RANK": 8, "WIDTH": 4096, "BLOCK_RANK": 16, "TOKENS": 32}
HEADS = {"HEADS": 32, "KV_HEADS": 8, "HALF": 64, "BLOCK_HEADS": 32, "BLOCK_KV_HEADS": 8, "BLOCK_HALF": 64, "BACK": True}
ROWS = {"WIDTH": 4096, "ROWS": 1, "COLUMNS": 4096, "ADD": True}
B = {"MODULES": 3, "RANK": 8, "BLOCK_RANK": 16, "TOKENS": 64, "COLUMNS": 128}
GATED = {"GATE": True, "UP": True, "WIDTH": 14336} | B | {"MODULES": 2, "TOKENS": 32}
ROW_LORA = {"MODULES": 3, "RANK": 8, "BLOCK_RANK": 8, "SHARES": 8, "BLOCK_SHARES": 8}
ATTENTION = {"WIDTH": 128, "SEQUENCES": 32, "BLOCK": 64, "BLOCK_WIDTH": 128}
LAUNCHES = {
    "rmsnorm._forward_kernel": ("*x *x *x *x *x i32 fp32 i32 i32 i32", ROWS),
    "rmsnorm._backward_kernel": ("*x *x *x *x *x i32 fp32 i32 i32 i32 i32 i32 i32 i32", ROWS),
    "rope._rope_kernel": ("*x *x *fp32 *fp32 *i64 i32 i32 i32 i32", HEADS),
    "swiglu._forward_kernel": ("*x *x i32 i32", {"WIDTH": 14336, "BLOCK": 1024}),
    "swiglu._backward_kernel": ("*x *x *x i32 i32 i32", {"WIDTH": 14336, "BLOCK": 1024}),
    "swiglu_lora._forward_kernel": ("*x *x *x *x *x i32 i32 i32 fp32", GATED),
    "swiglu_lora._backward_kernel": ("*x *x *x *x *x *x i32 i32 i32 i32 fp32", GATED),
    "dropout._mask_kernel": ("*i64 *i8 i32 i32 i32 i32", {"ROWS": 16, "COLUMNS": 128}),
    "lora_a_triton.forward_kernel": (
        "*x *x *fp32 *i64 i32 i32 i32 i32 i32 i32 fp32",
        DROPPING | {"COLUMNS": 128, "SHARE": 512},
    ),
    "lora_a_triton.backward_kernel": (
        "*x *x *x *x *fp32 *i64 i32 i32 i32 i32 i32 i32 i32 fp32",
        DROPPING | {"NEEDS_X": True, "ADD": True, "COLUMNS": 64, "SHARE": 256},
    ),
    "cross_entropy._parts_kernel": ("*x *i64 *fp32 i32", {"WIDTH": 128256, "PARTS": 16, "BLOCK": 8192}),
    "cross_entropy._join_kernel": (
        "*x *i64 *fp32 *fp32 *fp32 i32 i32",
        {"WIDTH": 128256, "PARTS": 16, "ROWS": 4, "BLOCK_PARTS": 16},
    ),
    "cross_entropy._gradient_kernel": ("*x *i64 *fp32 i32 i32", {"WIDTH": 128256, "PARTS": 16, "BLOCK": 8192}),
    "sums._sum_kernel": ("*fp32 *x i32 i32", {"TOGETHER": 8, "BLOCK": 256}),
    "lora_b._add_kernel": ("*x *x *x *x *x i32 i32 i32 i32 i32 i32 i32 i32 fp32", B),
    "lora_b._backward_kernel": (
        "*x *x *x *x *x i32 i32 i32 i32 i32 i32 *fp32 *fp32 i32 i32 fp32",
        B | {"SHARE": 512},
    ),
    "lora_b._sum_u_kernel": ("*fp32 *x i32 i32 i32 i32 i32 i32 i32 i32", {"MODULES": 3, "RANK": 8, "BLOCK": 64}),
    "adamw._squares_kernel": ("*fp32 *fp32 i32", {"EACH": 21, "BLOCK": 1024}),
    "adamw._update_kernel": (
        "*fp32 *fp32 *fp32 *fp32 *fp32 *fp32 *i32 i32 i32 fp32 fp32 fp32 fp32 fp32 fp32 fp32 fp32 fp32",
        {"PARTS": 1024, "CLIP": True, "BLOCK": 1024},
    ),
    "fp8._quantize_kernel": ("*x *fp32 *fp8e4nv *fp32 i32 i32", {"WIDTH": 14336, "PART": 16384, "SCALED": True}),
    "decode_attention._store_kernel": (
        "*x *x *x *fp32 *fp32 *i64 *i64 *x *x i32 i32 i32 i32 i32 i32 i64 i32 i32 i32",
        {"HEADS": 32, "KV_HEADS": 8, "HALF": 64, "BLOCK_HALF": 64},
    ),
    "decode_attention._attend_kernel": (
        "*x *x *x *i64 *i64 *x *fp32 *fp32 i32 i32 i64 i32 i32 i32 fp32 i32",
        {"GROUP": 4, "BLOCK_GROUP": 16, "WIDTH": 128, "BLOCK_WIDTH": 128, "TILE": 64, "SPLITS": 32},
    ),
    "decode_attention._join_kernel": ("*fp32 *fp32 *x", {"WIDTH": 128, "BLOCK_WIDTH": 128, "SPLITS": 32}),
    "row_lora._inner_kernel": (
        "*x *x *fp32 *i64 i32",
        {"WIDTH": 4096, "COLUMNS": 24, "BLOCK_COLUMNS": 32, "INPUTS": 256, "SHARE": 512},
    ),
    "row_lora._outer_kernel": ("*x *fp32 *x *fp32 *i64 i32 i32 i32 i32", ROW_LORA | {"COLUMNS": 512}),
    "row_lora._one_row_kernel": (
        "*x *x *x *x *fp32 *x *fp32 *i64 i32 i32 i32",
        ROW_LORA | {"BIAS": True, "WIDTH": 4096, "ROWS": 4, "INPUTS": 1024},
    ),
    "attention_triton.forward_kernel": (
        "*x *x *x *x *fp32 *i32 *i32 i32 i32 i32 i32 fp32 i32 i32 i32",
        ATTENTION | {"HEADS": 32, "GROUP": 4},
    ),
    "attention_triton.backward_kernel": (
        "*x *x *x *x *x *fp32 *x *x *x *fp32 *i32 *i32 i32 i32 i32 i32 fp32 fp32 i32 i32 i32 i32 i32 i32 i32 i32",
        ATTENTION | {"HEADS": 32, "GROUP": 4},
    ),
    "attention_triton.shared_kernel": (
        "*fp32 *x *x *i32 *i32 i32 i32 i32 i32",
        {"SIZE": 1024, "TOGETHER": 16, "COLUMNS": 128},
    ),
    "fp8._transpose_kernel": ("*u8 *u8 i32 i32", {"TILE": 128}),
}


def kernel_named(name):
    module, function = name.split(".")
    return getattr(importlib.import_module(f"lorikit.model.kernels.{module}"), function)


def test_every_kernel_is_among_the_launches():
    modules = (
        "attention_triton",
        "cross_entropy",
        "rmsnorm",
        "rope",
        "swiglu",
        "swiglu_lora",
        "dropout",
        "lora_a_triton",
        "lora_b",
        "sums",
        "adamw",
        "fp8",
        "decode_attention",
        "row_lora",
    )
    found = {
        f"{module}.{name}"
        for module in modules
        for name in vars(importlib.import_module(f"lorikit.model.kernels.{module}"))
        if name.endswith("_kernel") and name != "runs_kernel"
    }
    assert found == set(LAUNCHES)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which compiles without a GPU")
@pytest.mark.parametrize("name", LAUNCHES)
def test_the_kernel_compiles_for_an_h100(name, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, (types, constants) = kernel_named(name), LAUNCHES[name]
    arguments = dict(zip([n for n in kernel.arg_names if n not in constants], types.split(), strict=True))
    signature = {n: arguments[n].replace("*x", "*bf16") if n in arguments else "constexpr" for n in kernel.arg_names}
    compiled = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= 99 * 1024, "consumers' GPUs have that much shared memory"
