// What the C++ kernels for CPUs share: torch through its stable interface, memory, threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <tuple>

#ifdef __linux__
#include <sys/mman.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EVOMOE_X86
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

enum Isa : int64_t { PORTABLE, AVX2, AVX512 };

struct bfloat {
    uint16_t bits;
};

// Scratch floats aligned to a cache line, freed at the end of the scope. Up to FEW lie on the stack.
struct Scratch {
    static constexpr int64_t FEW = 1024;
    alignas(64) float few[FEW];
    float* data = few;
    explicit Scratch(int64_t n) {
        if (n > FEW) data = (float*)std::aligned_alloc(64, (n * sizeof(float) + 127) / 64 * 64);
        if (data == nullptr) throw std::bad_alloc();
    }
    Scratch(const Scratch&) = delete;
    ~Scratch() {
        if (data != few) std::free(data);
    }
};

template <class F>
void parallel(int64_t n, int64_t grain, const F& f) {
    if (n <= grain) {
        if (n > 0) f(0, n);
    } else {
        torch::stable::parallel_for(0, n, grain, f);
    }
}

// An uninitialised contiguous tensor. It does not go through the dispatcher, because a call through the
// dispatcher costs as much as the look-up of a few short rows.
template <size_t n>
Tensor fresh(const int64_t (&sizes)[n], ScalarType type = ScalarType::Float) {
    int64_t strides[n];
    int64_t stride = 1;
    for (size_t i = n; i-- > 0; stride *= sizes[i]) strides[i] = stride;
    const int32_t dtype =
        type == ScalarType::Int ? aoti_torch_dtype_int32() : aoti_torch_dtype_float32();
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        n, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
}

int64_t best_isa() {
#ifdef EVOMOE_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return PORTABLE;
}

}  // namespace
