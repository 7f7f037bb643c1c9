// Linear maps of experts for few rows, compiled once per instruction set by cpu_isas.h.
//
// Letters: A pairs in expert order, E experts, K input width, N output width.
//
// Weights are read once, whatever the number of rows: of R rows of weights, the products with up to M
// rows of inputs are added in registers. Every sum has one fixed order, whatever the number of threads.

namespace EVOMOE_ISA {

constexpr int R = 4, M = V / R;

// Inputs are rounded to this many steps on each side of zero where weights are int8, so that a lane's sum
// of products fits into 32 bits. These are 16 bits up to a width of 511 V.
static inline float steps(int64_t K) {
    return std::min<int64_t>(32767, INT32_MAX / (128 * ((K + V - 1) / V + 1)));
}

// Rounds `rows` rows of x (rows, K) into j.rounded and j.step; behind the end of a row there are zeros. A row
// with a value that is not finite gets a step that is not a number.
static void round_inputs(const Job& j, int64_t rows) {
    const float most = steps(j.K);
    parallel(rows, 16, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; i++) {
            const float* x = j.x + i * j.K;
            int16_t* out = j.rounded + i * j.stride;
            float largest = 0, any = 0;
            for (int64_t k = 0; k < j.K; k++) {
                largest = std::max(largest, std::fabs(x[k]));
                any += x[k] * 0;
            }
            // what is smaller would have a step of no inverse
            const float inverse = largest > 1e-30f && any == 0 ? most / largest : 0;
            for (int64_t k = 0; k < j.K; k++) {
                const float v = x[k] * inverse;
                out[k] = any == 0 ? (int16_t)(int32_t)(v + std::copysign(0.5f, v)) : 0;
            }
            std::fill(out + j.K, out + j.stride, (int16_t)0);
            j.step[i] = any == 0 ? largest / most : any;
        }
    });
}

// What a kernel for weights of one kind reads of its inputs.
static inline const float* input(const Job& j, int64_t row, const float*) { return j.x + row * j.K; }
static inline const int16_t* input(const Job& j, int64_t row, const int8_t*) {
    return j.rounded + row * j.stride;
}

// Products of R rows of weights with m rows of inputs, of which `add` takes `step` columns at a time. Sum number
// i R + r belongs to input row i and weight row r.
template <int m, int step, class Sum, class W, class X, class Product>
static inline fv dots(const W* const* w, const X* const* x, int64_t K, const Product& add) {
    Sum sum[m * R] = {};
    int64_t k = 0;
    for (; k + step <= K; k += step)
#pragma GCC unroll 16
        for (int i = 0; i < m * R; i++) sum[i] = add(sum[i], w[i % R] + k, x[i / R] + k);
    if (k < K) {
        W rest[R][step] = {};
        X inputs[m][step] = {};
        for (int r = 0; r < R; r++) std::memcpy(rest[r], w[r] + k, (K - k) * sizeof(W));
        for (int i = 0; i < m; i++) std::memcpy(inputs[i], x[i] + k, (K - k) * sizeof(X));
        for (int i = 0; i < m * R; i++) sum[i] = add(sum[i], rest[i % R], inputs[i / R]);
    }
    fv all[V] = {};
    for (int i = 0; i < m * R; i++) all[i] = __builtin_convertvector(sum[i], fv);
    return totals(all);
}
template <int m>
static fv dots(const float* const* w, const float* const* x, int64_t K) {
    return dots<m, V, fv>(w, x, K, [](fv sum, const float* a, const float* b) {
        return sum + load(a) * load(b);
    });
}
template <int m>
static fv dots(const int8_t* const* w, const int16_t* const* x, int64_t K) {
    return dots<m, 2 * V, iv>(w, x, K, [](iv sum, const int8_t* a, const int16_t* b) {
        return sum + products(a, b);
    });
}

// out(pair, n) for n in [a, b) and the pairs [first, last) of one expert: <w_n, x_pair> * scale_n + bias_n;
// int8 weights have scales, float weights have none.
// `put` receives (pair, n, value).
template <class W, class Put>
static void linear(const Job& j, const W* w, const float* scale, const float* bias, int64_t first,
                   int64_t last, int64_t a, int64_t b, const Put& put) {
    // R rows that are read side by side lie a part of the block apart: the processor fetches streams ahead in
    // different pages, but loses track of several in one
    const int64_t part = (b - a + R - 1) / R;
    for (int64_t n = a; n < a + part; n++) {
        int width = 0;
        const W* rows[R];
        for (int r = 0; r < R; r++) {
            const bool exists = n + r * part < b;
            rows[r] = w + (exists ? n + r * part : n) * j.K;
            width += exists;
        }
        for (int64_t p = first; p < last; p += M) {
            const int m = (int)std::min<int64_t>(M, last - p);
            decltype(input(j, 0, w)) inputs[M];
            for (int i = 0; i < m; i++) inputs[i] = input(j, j.row(p + i), w);
            fv all;
            switch (m) {
                case 1: all = dots<1>(rows, inputs, j.K); break;
#if EVOMOE_LANES >= 8
                case 2: all = dots<2>(rows, inputs, j.K); break;
#endif
#if EVOMOE_LANES >= 16
                case 3: all = dots<3>(rows, inputs, j.K); break;
#endif
                default: all = dots<M>(rows, inputs, j.K);
            }
            for (int i = 0; i < m; i++) {
                const float step = scale ? j.step[j.row(p + i)] : 1;
                for (int r = 0; r < width; r++) {
                    const int64_t at = n + r * part;
                    put(p + i, at, all[i * R + r] * (scale ? step * scale[at] : 1) + (bias ? bias[at] : 0));
                }
            }
        }
    }
}

// Blocks of N rows of weights per task, so that each reads some 128 KiB.
template <class W>
static int64_t block(const Job& j) {
    const int64_t rows = std::max<int64_t>(1, (1 << 17) / (j.K * (int64_t)sizeof(W)));
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
                   bias ? bias + g.expert * j.N : nullptr, g.first, g.last, a, std::min(a + rows, j.N),
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
                   bias ? bias + g.expert * j.N : nullptr, g.first, g.last, from * rows, std::min(to * rows, j.N),
                   [&](int64_t p, int64_t n, float value) {
                       out[j.token[p] * j.N + n] += j.weight[p] * value;
                   });
        }
    });
}

}  // namespace EVOMOE_ISA
