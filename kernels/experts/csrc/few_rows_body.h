// Linear maps of experts for few rows, compiled once per instruction set by cpu_isas.h.
//
// Letters: A pairs in expert order, E experts, K input width, N output width.
//
// Weights are read once, whatever the number of rows: of R rows of weights, the products with up to M
// rows of inputs are added in registers. Every sum has one fixed order, whatever the number of threads.

namespace EVOMOE_ISA {

constexpr int R = 4, M = V / R;

// The first n < V values at p, and zeros.
template <class T>
static inline fv load_some(const T* p, int64_t n) {
    T some[V] = {};
    std::memcpy(some, p, n * sizeof(T));
    return load(some);
}

// Adds the products of R rows of weights (N, K) with m rows of inputs. Sum number i R + r belongs to
// input row i and weight row r.
template <class W, int m>
static fv dots(const W* const* w, const float* const* x, int64_t K) {
    fv sum[V] = {};
    auto add = [&](const auto& read_row, const auto& read_input) {
        fv row[R];
        for (int r = 0; r < R; r++) row[r] = read_row(w[r]);
        for (int i = 0; i < m; i++) {
            const fv v = read_input(x[i]);
            for (int r = 0; r < R; r++) sum[i * R + r] += row[r] * v;
        }
    };
    int64_t k = 0;
    for (; k + V <= K; k += V)
        add([&](const W* p) { return load(p + k); }, [&](const float* p) { return load(p + k); });
    if (k < K)
        add([&](const W* p) { return load_some(p + k, K - k); },
            [&](const float* p) { return load_some(p + k, K - k); });
    return totals(sum);
}

// out(pair, n) for n in [a, b) and the pairs [first, last) of one expert: <w_n, x_pair> * scale_n + bias_n.
// `put` receives (pair, n, value).
template <class W, class Put>
static void linear(const Job& j, const W* w, const float* scale, const float* bias, int64_t first,
                   int64_t last, int64_t a, int64_t b, const Put& put) {
    for (int64_t n = a; n < b; n += R) {
        const int64_t width = std::min<int64_t>(R, b - n);
        const W* rows[R];
        for (int r = 0; r < R; r++) rows[r] = w + (n + std::min<int64_t>(r, width - 1)) * j.K;
        // rows of the next step: the hardware does not follow this many streams across their ends
        for (int64_t at = 0; at < j.K * R && n + R < b; at += 64 / (int64_t)sizeof(W))
            __builtin_prefetch(w + (n + R) * j.K + at);
        for (int64_t p = first; p < last; p += M) {
            const int m = (int)std::min<int64_t>(M, last - p);
            const float* inputs[M];
            for (int i = 0; i < m; i++) inputs[i] = j.input(p + i);
            fv all;
            switch (m) {
                case 1: all = dots<W, 1>(rows, inputs, j.K); break;
#if EVOMOE_LANES >= 8
                case 2: all = dots<W, 2>(rows, inputs, j.K); break;
#endif
#if EVOMOE_LANES >= 16
                case 3: all = dots<W, 3>(rows, inputs, j.K); break;
#endif
                default: all = dots<W, M>(rows, inputs, j.K);
            }
            for (int i = 0; i < m; i++)
                for (int r = 0; r < width; r++)
                    put(p + i, n + r, all[i * R + r] * (scale ? scale[n + r] : 1) + bias[n + r]);
        }
    }
}

// Blocks of N rows of weights per task, so that each reads some 64 KiB.
template <class W>
static int64_t block(const Job& j) {
    const int64_t rows = std::max<int64_t>(1, (1 << 16) / (j.K * (int64_t)sizeof(W)));
    return (rows + R - 1) / R * R;
}

// out (A, N): row p is W_e x + b_e for the expert e of pair p.
template <class W>
static void spread(const Job& j, const W* w, const float* scale, const float* bias, float* out) {
    const int64_t rows = block<W>(j), blocks = (j.N + rows - 1) / rows;
    parallel(j.active * blocks, 1, [&](int64_t from, int64_t to) {
        for (int64_t task = from; task < to; task++) {
            const Group& g = j.groups[task / blocks];
            const int64_t a = task % blocks * rows;
            linear(j, w + g.expert * j.N * j.K, scale ? scale + g.expert * j.N : nullptr,
                   bias + g.expert * j.N, g.first, g.last, a, std::min(a + rows, j.N),
                   [&](int64_t p, int64_t n, float value) { out[p * j.N + n] = value; });
        }
    });
}

// out (T, N): row t is the sum of weight (W_e x + b_e) over the pairs of token t, in expert order.
template <class W>
static void collect(const Job& j, const W* w, const float* scale, const float* bias, float* out) {
    std::memset(out, 0, j.T * j.N * sizeof(float));
    const int64_t rows = block<W>(j), blocks = (j.N + rows - 1) / rows;
    // a thread owns columns, for all experts
    parallel(blocks, 1, [&](int64_t from, int64_t to) {
        for (int64_t i = 0; i < j.active; i++) {
            const Group& g = j.groups[i];
            linear(j, w + g.expert * j.N * j.K, scale ? scale + g.expert * j.N : nullptr,
                   bias + g.expert * j.N, g.first, g.last, from * rows, std::min(to * rows, j.N),
                   [&](int64_t p, int64_t n, float value) {
                       out[j.token[p] * j.N + n] += j.weight[p] * value;
                   });
        }
    });
}

}  // namespace EVOMOE_ISA
