// CPU look-up for torch through its stable C++ interface, so that one build serves many versions.
//
// The work is done in lookup_cpu.h and lookup_cpu_backward.h, which cpu_isas.h compiles for AVX-512, for
// AVX2 and for any machine; the argument `isa` chooses among them.

#include "cpu_common.h"

namespace {

enum Score : int64_t { PROB, ABS_PROB, L1 };

struct Job {
    const float* z;          // (B, K, t)
    const float* row_scale;  // (K, N) or null
    int64_t B, K, t, N, H;
    int64_t score;
    float temperature;
};

// Ask for large pages. With small ones, page faults cost more than the sums when the tables' gradient
// is freshly allocated (see pages.py).
void large_pages(void* from, int64_t bytes) {
#ifdef __linux__
    constexpr uintptr_t PAGE = 1 << 21;
    const uintptr_t a = ((uintptr_t)from + PAGE - 1) / PAGE * PAGE;
    const uintptr_t b = ((uintptr_t)from + bytes) / PAGE * PAGE;
    if (b > a) madvise((void*)a, b - a, MADV_HUGEPAGE);
#endif
}

}  // namespace

#define EVOMOE_BODY "lookup_cpu_body.h"
#include "cpu_isas.h"

namespace {

Job job(const Tensor& z, const Tensor& tables, int64_t score, double temperature) {
    Job j{};
    j.z = (const float*)z.const_data_ptr();
    j.B = z.size(0), j.K = z.size(1), j.t = z.size(2);
    j.N = tables.size(1), j.H = tables.size(2);
    j.score = score;
    j.temperature = (float)temperature;
    return j;
}

void run_forward(Job j, const Tensor& tables, const std::optional<Tensor>& row_scale, int64_t isa,
                 int32_t* code, float* p, float* y) {
    if (row_scale.has_value()) j.row_scale = (const float*)row_scale->const_data_ptr();
    const void* from = tables.const_data_ptr();
    isa = std::min(isa, best_isa());
    switch (tables.scalar_type()) {
        case ScalarType::Char: DISPATCH(isa, forward(j, (const int8_t*)from, code, p, y)); break;
        case ScalarType::BFloat16: DISPATCH(isa, forward(j, (const bfloat*)from, code, p, y)); break;
        default: DISPATCH(isa, forward(j, (const float*)from, code, p, y));
    }
}

// z (B, K, t) float32, tables (K, N, H) float32, bfloat16 or int8 -> y (B, H) float32, code (B, K) int32,
// p (B, K) float32. The caller ensures that all inputs are contiguous.
std::tuple<Tensor, Tensor, Tensor> lookup_forward(
    const Tensor& z, const Tensor& tables, std::optional<Tensor> row_scale, int64_t score,
    double temperature, int64_t isa) {
    const Job j = job(z, tables, score, temperature);
    Tensor y = fresh({j.B, j.H});
    Tensor code = fresh({j.B, j.K}, ScalarType::Int);
    Tensor p = fresh({j.B, j.K});
    run_forward(j, tables, row_scale, isa, (int32_t*)code.mutable_data_ptr(),
                (float*)p.mutable_data_ptr(), (float*)y.mutable_data_ptr());
    return {y, code, p};
}

// The same for inference, returning only y.
Tensor lookup_infer(const Tensor& z, const Tensor& tables, std::optional<Tensor> row_scale,
                    int64_t score, double temperature, int64_t isa) {
    const Job j = job(z, tables, score, temperature);
    Tensor y = fresh({j.B, j.H});
    Scratch code(j.B * j.K), p(j.B * j.K);
    run_forward(j, tables, row_scale, isa, (int32_t*)code.data, p.data,
                (float*)y.mutable_data_ptr());
    return y;
}

// Returns dz (B, K, t) and dT (K, N, H), float32, each empty if it is not needed.
std::tuple<Tensor, Tensor> lookup_backward(
    const Tensor& dy, const Tensor& z, const Tensor& tables, const Tensor& code, const Tensor& p,
    int64_t score, double temperature, bool need_z, bool need_t, int64_t isa) {
    Job j = job(z, tables, score, temperature);
    Tensor dz = fresh({need_z ? j.B : 0, j.K, j.t});
    Tensor dt = fresh({need_t ? j.K : 0, j.N, j.H});
    float* dz_at = need_z ? (float*)dz.mutable_data_ptr() : nullptr;
    float* dt_at = need_t ? (float*)dt.mutable_data_ptr() : nullptr;
    if (!need_z && !need_t) return {dz, dt};
    if (need_t) large_pages(dt_at, 4 * j.K * j.N * j.H);
    const auto *g = (const float*)dy.const_data_ptr(), *w = (const float*)p.const_data_ptr();
    const auto* c = (const int32_t*)code.const_data_ptr();
    const void* from = tables.const_data_ptr();
    isa = std::min(isa, best_isa());
    if (tables.scalar_type() == ScalarType::BFloat16) {
        DISPATCH(isa, backward(j, (const bfloat*)from, g, c, w, dz_at, dt_at));
    } else {
        DISPATCH(isa, backward(j, (const float*)from, g, c, w, dz_at, dt_at));
    }
    return {dz, dt};
}

int64_t lookup_isa() { return best_isa(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(evomoe, m) {
    m.def(
        "lookup_cpu(Tensor z, Tensor tables, Tensor? row_scale, int score, float temperature, "
        "int isa) -> (Tensor, Tensor, Tensor)");
    m.def(
        "lookup_cpu_infer(Tensor z, Tensor tables, Tensor? row_scale, int score, "
        "float temperature, int isa) -> Tensor");
    m.def(
        "lookup_cpu_backward(Tensor dy, Tensor z, Tensor tables, Tensor code, Tensor p, int score, "
        "float temperature, bool need_z, bool need_t, int isa) -> (Tensor, Tensor)");
    m.def("lookup_cpu_isa() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(evomoe, CPU, m) {
    m.impl("lookup_cpu", TORCH_BOX(&lookup_forward));
    m.impl("lookup_cpu_infer", TORCH_BOX(&lookup_infer));
    m.impl("lookup_cpu_backward", TORCH_BOX(&lookup_backward));
}

STABLE_TORCH_LIBRARY_IMPL(evomoe, CompositeExplicitAutograd, m) {
    m.impl("lookup_cpu_isa", TORCH_BOX(&lookup_isa));
}
