// Backward pass of the look-up on CPUs, compiled once per instruction set by cpu_isas.h. The letters are
// those of lookup_cpu.h.
//
// With few rows, each row adds to its K rows of the table gradient in place. With many rows, one tile of
// W columns of a table and one of its gradient lie in the core's cache, together with the same columns
// of dy. Every sum has one fixed order, whatever the number of threads.

namespace EVOMOE_ISA {

#pragma GCC push_options
// Slices are short, so vectorizing loops over t costs more than it saves.
#pragma GCC optimize("no-tree-vectorize", "no-tree-slp-vectorize")
// dz of one row from dp in closed form, sign(z_i) dp/d|z_i|.
static void hash_backward(const Job& j, const float* z, const float* p, const float* dp,
                          float* scratch, float* dz) {
    if (j.score != L1) confidence(z, scratch, j.K * j.t, 2 / j.temperature);
    for (int64_t k = 0; k < j.K; k++) {
        const float *v = z + k * j.t, *e = scratch + k * j.t;
        float* d = dz + k * j.t;
        float sum = 0, product = 1;
        if (j.score == ABS_PROB)
            for (int64_t i = 0; i < j.t; i++) {
                sum += std::fabs(v[i]);
                product *= 1 + e[i];
            }
        for (int64_t i = 0; i < j.t; i++) {
            float slope;
            if (j.score == L1) {
                slope = dp[k] / j.t;
            } else {
                // sigmoid(-2 |z| / temperature) = e / (1 + e)
                const float s = 2 / j.temperature * e[i] / (1 + e[i]);
                slope = j.score == PROB ? dp[k] * p[k] * s : dp[k] / product * (1 + sum * s);
            }
            d[i] = v[i] >= 0 ? slope : -slope;
        }
    }
}

#pragma GCC pop_options

// What a backward pass reads and writes; dz or dtables is null if it is not needed.
template <class T>
struct Gradients {
    const T* tables;
    const float* dy;      // (B, H)
    const int32_t* code;  // (B, K)
    const float* p;       // (B, K)
    float* dp;            // (B, K), starts at 0
    float* dtables;       // (K, N, H)
};

// One table's gradient and its contribution to dp, in place: for few rows.
template <class T, bool NEED_Z, bool NEED_T>
static void backward_rows(const Job& j, const Gradients<T>& at, int64_t k) {
    for (int64_t b = 0; b < j.B; b++) {
        const int64_t row = (k * j.N + at.code[b * j.K + k]) * j.H;
        const float *g = at.dy + b * j.H, w = at.p[b * j.K + k];
        fv sum = {};
        float rest = 0;
        int64_t h = 0;
        for (; h + V <= j.H; h += V) {
            const fv v = load(g + h);
            if (NEED_T) store(at.dtables + row + h, load(at.dtables + row + h) + w * v);
            if (NEED_Z) sum += v * load(at.tables + row + h);
        }
        for (; h < j.H; h++) {
            if (NEED_T) at.dtables[row + h] += w * g[h];
            if (NEED_Z) rest += g[h] * widen(at.tables[row + h]);
        }
        if (NEED_Z) at.dp[b * j.K + k] += total(sum) + rest;
    }
}

// Columns [h, h + W) of one table's gradient, and their contribution to dp. `dy` are these columns of
// dy, (B, W), and `tile` and `sums` have room for those of the table and of its gradient.
template <class T, int W, bool NEED_Z, bool NEED_T>
static void backward_tile(const Job& j, const Gradients<T>& at, const float* dy, int64_t k, int64_t h,
                          float* tile, float* sums) {
    constexpr int R = W / V;
    if (NEED_Z) pack<T, W>(j, at.tables, k, h, tile);
    if (NEED_T) std::memset(sums, 0, j.N * W * sizeof(float));
    const int32_t* c = at.code + k * j.B;
    const float* p = at.p + k * j.B;
    float* dp = at.dp + k * j.B;
    auto one = [&](int64_t b) {
        const float* from = dy + b * W;
        const int64_t row = (int64_t)c[b] * W;
        fv part = {};
        for (int r = 0; r < R; r++) {
            const fv d = load(from + r * V);
            if (NEED_T) store(sums + row + r * V, load(sums + row + r * V) + p[b] * d);
            if (NEED_Z) part += d * load(tile + row + r * V);
        }
        return part;
    };
    int64_t b = 0;
    for (; b + V <= j.B; b += V) {
        fv part[V];
        for (int i = 0; i < V; i++) part[i] = one(b + i);
        if (NEED_Z) store(dp + b, load(dp + b) + totals(part));
    }
    for (; b < j.B; b++) {
        const fv part = one(b);
        if (NEED_Z) dp[b] += total(part);
    }
    if (!NEED_T) return;
    const int64_t width = std::min<int64_t>(W, j.H - h);
    for (int64_t n = 0; n < j.N; n++)
        std::memcpy(at.dtables + (k * j.N + n) * j.H + h, sums + n * W, width * sizeof(float));
}

// (rows, columns) -> (columns, rows), for values of four bytes.
template <class T>
static void transpose(const T* from, T* to, int64_t rows, int64_t columns) {
    constexpr int64_t SIDE = 16;
    for (int64_t a = 0; a < rows; a += SIDE)
        for (int64_t b = 0; b < columns; b++)
            for (int64_t i = a; i < std::min(a + SIDE, rows); i++)
                to[b * rows + i] = from[i * columns + b];
}

// One thread owns a table, so there are no races and every sum has one fixed order.
template <class T, bool NEED_Z, bool NEED_T>
static void backward_tables(const Job& j, const Gradients<T>& at) {
    constexpr int W = 32;
    // zeros and copies of tiles cost as much as some rows
    if (j.B < 4 * j.N) {
        parallel(j.K, 1, [&](int64_t first, int64_t last) {
            if (NEED_T)
                std::memset(at.dtables + first * j.N * j.H, 0,
                            (last - first) * j.N * j.H * sizeof(float));
            for (int64_t k = first; k < last; k++) backward_rows<T, NEED_Z, NEED_T>(j, at, k);
        });
        return;
    }
    Scratch code(j.B * j.K), p(j.B * j.K), dp(NEED_Z * j.B * j.K);
    transpose(at.code, (int32_t*)code.data, j.B, j.K);
    transpose(at.p, p.data, j.B, j.K);
    if (NEED_Z) std::memset(dp.data, 0, j.B * j.K * sizeof(float));
    Gradients<T> by_table = at;
    by_table.code = (const int32_t*)code.data, by_table.p = p.data, by_table.dp = dp.data;
    parallel(j.K, 1, [&](int64_t first, int64_t last) {
        Scratch dy(j.B * W), tile(j.N * W), sums(j.N * W);
        for (int64_t h = 0; h < j.H; h += W) {
            const int64_t width = std::min<int64_t>(W, j.H - h);
            if (width < W) std::memset(dy.data, 0, j.B * W * sizeof(float));
            for (int64_t b = 0; b < j.B; b++) {
                const float* from = at.dy + b * j.H + h;
                for (int64_t i = 0; i < width; i += 16) __builtin_prefetch(from + 16 * j.H + i);
                std::memcpy(dy.data + b * W, from, width * sizeof(float));
            }
            for (int64_t k = first; k < last; k++)
                backward_tile<T, W, NEED_Z, NEED_T>(j, by_table, dy.data, k, h, tile.data, sums.data);
        }
    });
    if (NEED_Z) transpose(dp.data, at.dp, j.K, j.B);
}

template <class T>
static void backward(const Job& j, const T* tables, const float* dy, const int32_t* code,
                     const float* p, float* dz, float* dtables) {
    Scratch dp(dz != nullptr ? j.B * j.K : 1);
    const Gradients<T> at{tables, dy, code, p, dp.data, dtables};
    if (dz == nullptr) {
        backward_tables<T, false, true>(j, at);
        return;
    }
    std::memset(dp.data, 0, j.B * j.K * sizeof(float));
    if (dtables != nullptr)
        backward_tables<T, true, true>(j, at);
    else
        backward_tables<T, true, false>(j, at);
    parallel(j.B, 1 + 4096 / std::max<int64_t>(1, j.K * j.t), [&](int64_t a, int64_t b) {
        Scratch e(j.K * j.t + V);
        for (int64_t i = a; i < b; i++)
            hash_backward(j, j.z + i * j.K * j.t, p + i * j.K, dp.data + i * j.K, e.data,
                          dz + i * j.K * j.t);
    });
}

}  // namespace EVOMOE_ISA
