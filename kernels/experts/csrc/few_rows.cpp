// Feed-forward networks of experts for few tokens on CPUs, with weights in float32 or int8, for torch
// through its stable C++ interface. The activation between the two maps is torch's.
//
// Letters: T tokens, A active pairs, E experts, K input width, N output width.

#include "cpu_common.h"

namespace {

// The pairs [first, last) of an expert that has some.
struct Group {
    int64_t expert, first, last;
};

struct Job {
    int64_t T, E, K, N;
    int64_t active;       // number of groups
    const Group* groups;
    const int64_t* token;  // (A,)
    const float* weight;   // (A,)
    const float* x;
    bool by_token;  // x has a row per token, otherwise a row per pair
    int64_t row(int64_t p) const { return by_token ? token[p] : p; }
    int16_t* rounded;  // for int8 weights: the inputs in steps, `stride` per row,
    float* step;       // and the length of a step in each row
    int64_t stride;
};

}  // namespace

#define EVOMOE_BODY "few_rows_body.h"
#include "cpu_isas.h"

namespace {

// Room for the pairs of a routing (T, E), in expert order, tokens ascending. Without a routing, every token
// visits the one expert.
struct Pairs {
    Scratch groups, token, weight;
    int64_t count = 0, active = 0;
    Pairs(const bool* on, const float* weights, int64_t T, int64_t E)
        : groups(6 * E), token(2 * T * E), weight(T * E) {
        auto* g = (Group*)groups.data;
        auto* t = (int64_t*)token.data;
        if (on == nullptr) {
            for (int64_t i = 0; i < T; i++) t[i] = i, weight.data[i] = 1;
            count = T;
            if (T > 0) g[active++] = Group{0, 0, T};
            return;
        }
        for (int64_t e = 0; e < E; e++) {
            const int64_t first = count;
            for (int64_t i = 0; i < T; i++)
                if (on[i * E + e]) {
                    t[count] = i;
                    weight.data[count++] = weights[i * E + e];
                }
            if (count > first) g[active++] = Group{e, first, count};
        }
    }
    void put(Job& j) const {
        j.active = active;
        j.groups = (const Group*)groups.data;
        j.token = (const int64_t*)token.data;
        j.weight = weight.data;
    }
};

template <class T>
const T* values(const std::optional<Tensor>& from) {
    return from.has_value() ? (const T*)from->const_data_ptr() : nullptr;
}

// x (T, K), or (A, K) if it is `collected`; w (E, N, K) float32 or int8 with scale (E, N); bias (E, N) or none;
// routing: weights (T, E) float32, on (T, E) bool, or none with one expert. Returns (A, N), or (T, N) if it is
// `collected`.
Tensor few_rows(const Tensor& x, const Tensor& w, std::optional<Tensor> scale, std::optional<Tensor> bias,
                std::optional<Tensor> weights, std::optional<Tensor> on, bool collected, int64_t isa) {
    Job j{};
    j.T = on.has_value() ? on->size(0) : x.size(0);
    j.E = w.size(0), j.N = w.size(1), j.K = w.size(2);
    const Pairs pairs(values<bool>(on), values<float>(weights), j.T, j.E);
    pairs.put(j);
    j.x = (const float*)x.const_data_ptr();
    j.by_token = !collected;
    Tensor y = fresh({collected ? j.T : pairs.count, j.N});
    auto* out = (float*)y.mutable_data_ptr();
    const float *b = values<float>(bias), *s = values<float>(scale);
    const void* from = w.const_data_ptr();
    isa = std::min(isa, best_isa());
    const bool small = w.scalar_type() == ScalarType::Char;
    const int64_t rows = small ? x.size(0) : 0;
    j.stride = (j.K + 31) / 32 * 32;
    const Scratch rounded(rows * j.stride / 2), step(rows);
    j.rounded = (int16_t*)rounded.data, j.step = step.data;
    if (small) {
        DISPATCH(isa, round_inputs(j, rows));
        if (collected) {
            DISPATCH(isa, collect(j, (const int8_t*)from, s, b, out));
        } else {
            DISPATCH(isa, spread(j, (const int8_t*)from, s, b, out));
        }
    } else if (collected) {
        DISPATCH(isa, collect(j, (const float*)from, s, b, out));
    } else {
        DISPATCH(isa, spread(j, (const float*)from, s, b, out));
    }
    return y;
}

int64_t few_rows_isa() { return best_isa(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(evomoe, m) {
    m.def(
        "few_rows(Tensor x, Tensor w, Tensor? scale, Tensor? bias, Tensor? weights, Tensor? on, "
        "bool collected, int isa) -> Tensor");
    m.def("few_rows_isa() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(evomoe, CPU, m) { m.impl("few_rows", TORCH_BOX(&few_rows)); }

STABLE_TORCH_LIBRARY_IMPL(evomoe, CompositeExplicitAutograd, m) {
    m.impl("few_rows_isa", TORCH_BOX(&few_rows_isa));
}
