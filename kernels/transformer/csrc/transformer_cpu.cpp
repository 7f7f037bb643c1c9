// What a Transformer's training step needs around its experts, on CPUs: attention and the softmax of the output
// layer with its gradient in float32, and dropout. For torch through its stable C++ interface.
//
// Letters: B sequences, N heads, L queries, S keys, C width of a head, T tokens, W words.

#include "cpu_common.h"

namespace {

// A tensor (B, N, L, C) whose last axis is contiguous.
struct View {
    float* data;
    int64_t batch, head, row;
    float* at(int64_t b, int64_t n) const { return data + b * batch + n * head; }
};

struct Attention {
    int64_t B, N, L, S, C;
    float scale;
    View q, k, v, mask;  // mask.data may be null
    View y, dy, dq, dk, dv;
    float* norm;  // (B, N, L): the logarithm of each row's sum of exponentials
    const float* mask_row(int64_t b, int64_t n, int64_t i) const {
        return mask.data == nullptr ? nullptr : mask.at(b, n) + i * mask.row;
    }
};

}  // namespace

#define EVOMOE_BODY "transformer_cpu_body.h"
#include "cpu_isas.h"

namespace {

View view(const Tensor& t) {
    return {(float*)t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

// A view (B, N, L, C) of a contiguous tensor (L, B, N, C), the layout in which modules keep their states.
View transposed(const Tensor& t) {
    return {(float*)t.const_data_ptr(), t.stride(1), t.stride(2), t.stride(0)};
}

Attention job(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& mask) {
    Attention j{};
    j.B = q.size(0), j.N = q.size(1), j.L = q.size(2), j.C = q.size(3), j.S = k.size(2);
    j.scale = 1 / std::sqrt((float)j.C);
    j.q = view(q), j.k = view(k), j.v = view(v);
    if (mask.has_value()) j.mask = view(*mask);
    return j;
}

// The widest instruction set whose registers divide the width of a head.
int64_t fitting(int64_t isa, int64_t width) {
    isa = std::min(isa, best_isa());
    if (isa == AVX512 && width % 16) isa = AVX2;
    return isa == AVX2 && width % 8 ? PORTABLE : isa;
}

// q (B, N, L, C), k and v (B, N, S, C), mask (B, N, L, S) or none, all float32 and contiguous in their last axis.
// Returns y as (L, B, N, C), and the norms (B, N, L).
std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     std::optional<Tensor> mask, int64_t isa) {
    Attention j = job(q, k, v, mask);
    Tensor y = fresh({j.L, j.B, j.N, j.C}), norm = fresh({j.B, j.N, j.L});
    j.y = transposed(y), j.norm = (float*)norm.mutable_data_ptr();
    DISPATCH(fitting(isa, j.C), attend(j));
    return {y, norm};
}

// y and dy (B, N, L, C). Returns dq as (L, B, N, C), dk and dv as (S, B, N, C).
std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& q, const Tensor& k, const Tensor& v,
                                                      std::optional<Tensor> mask, const Tensor& y,
                                                      const Tensor& norm, const Tensor& dy, int64_t isa) {
    Attention j = job(q, k, v, mask);
    Tensor dq = fresh({j.L, j.B, j.N, j.C}), dk = fresh({j.S, j.B, j.N, j.C});
    Tensor dv = fresh({j.S, j.B, j.N, j.C});
    j.y = view(y), j.dy = view(dy), j.norm = (float*)norm.const_data_ptr();
    j.dq = transposed(dq), j.dk = transposed(dk), j.dv = transposed(dv);
    DISPATCH(fitting(isa, j.C), attend_backward(j));
    return {dq, dk, dv};
}

// logits (T, W) float32, contiguous; target (T,) int64; rows (T, 2) float64. With p = softmax(logits), writes
// -log p[target] and -sum_w log p[w] to the rows, and with `gradient` p - rest - sure * onehot(target) to the logits.
void softmax_loss(const Tensor& logits, const Tensor& target, double sure, double rest, bool gradient,
                  const Tensor& rows, int64_t isa) {
    auto* l = (float*)logits.mutable_data_ptr();
    auto* out = (double*)rows.mutable_data_ptr();
    const auto* words = (const int64_t*)target.const_data_ptr();
    DISPATCH(std::min(isa, best_isa()),
             losses(l, words, logits.size(0), logits.size(1), sure, rest, gradient, out));
}

// y = x / (1 - p) where a random word of the seed and the position is at least p 2^32, and else 0. x and y are contiguous,
// of one size, float32 or bfloat16. The words are the same for every instruction set and number of threads.
void dropout(const Tensor& x, const Tensor& y, double p, int64_t seed, int64_t isa) {
    isa = std::min(isa, best_isa());
    const void* from = x.const_data_ptr();
    void* to = y.mutable_data_ptr();
    const int64_t n = x.numel();
    if (x.scalar_type() == ScalarType::BFloat16) {
        DISPATCH(isa, dropout((const bfloat*)from, (bfloat*)to, n, p, seed));
    } else {
        DISPATCH(isa, dropout((const float*)from, (float*)to, n, p, seed));
    }
}

int64_t transformer_isa() { return best_isa(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(evomoe, m) {
    m.def("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, int isa) -> (Tensor, Tensor)");
    m.def(
        "attention_backward(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor y, Tensor norm, Tensor dy, "
        "int isa) -> (Tensor, Tensor, Tensor)");
    m.def(
        "softmax_loss(Tensor(a!) logits, Tensor target, float sure, float rest, bool gradient, "
        "Tensor(b!) rows, int isa) -> ()");
    m.def("dropout(Tensor x, Tensor(a!) y, float p, int seed, int isa) -> ()");
    m.def("transformer_isa() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(evomoe, CPU, m) {
    m.impl("attention", TORCH_BOX(&attention));
    m.impl("attention_backward", TORCH_BOX(&attention_backward));
    m.impl("softmax_loss", TORCH_BOX(&softmax_loss));
    m.impl("dropout", TORCH_BOX(&dropout));
}

STABLE_TORCH_LIBRARY_IMPL(evomoe, CompositeExplicitAutograd, m) {
    m.impl("transformer_isa", TORCH_BOX(&transformer_isa));
}
