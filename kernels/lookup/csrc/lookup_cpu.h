// Hashed table look-up on CPUs, compiled once per instruction set by cpu_isas.h.
//
// Letters: B rows, K tables, t bits per table, N = 2^t rows per table, H output width, W tile width.
//
// With few rows, each row reads its K table rows in place and prefetches the next ones. With many rows,
// a tile of W columns of several tables is copied (and widened) into the core's cache, and all rows
// read from there. Every sum has one fixed order, whatever the number of threads.

namespace EVOMOE_ISA {

// exp(-slope |z_i|) for n values, with slope = 2 / temperature. `out` must have room up to the next
// multiple of V.
static void confidence(const float* z, float* out, int64_t n, float slope) {
    int64_t i = 0;
    for (; i + V <= n; i += V) {
        const fv size = (fv)((iv)load(z + i) & 0x7fffffff);
        store(out + i, exp_negative(size * -slope));
    }
    if (i < n) {
        float rest[V] = {};
        std::memcpy(rest, z + i, (n - i) * sizeof(float));
        const fv size = (fv)((iv)load(rest) & 0x7fffffff);
        store(out + i, exp_negative(size * -slope));
    }
}

#pragma GCC push_options
// Slices are short, so vectorizing loops over t costs more than it saves.
#pragma GCC optimize("no-tree-vectorize", "no-tree-slp-vectorize")
// Row number in each table, from the K slices of one row of z.
static void find(const Job& j, const float* z, int32_t* code) {
    int64_t k = 0;
    // for slices of 8 values, the mask of a vector comparison holds the codes
#if EVOMOE_LANES == 16
    for (; j.t == 8 && k + 2 <= j.K; k += 2) {
        const fv v = load(z + k * 8);
        const uint32_t mask = _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_GE_OQ);
        code[k] = mask & 255;
        code[k + 1] = mask >> 8;
    }
#elif EVOMOE_LANES == 8
    for (; j.t == 8 && k < j.K; k++) {
        const fv v = load(z + k * 8);
        code[k] = _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_setzero_ps(), _CMP_GE_OQ));
    }
#endif
    for (; k < j.K; k++) {
        int32_t c = 0;
        for (int64_t i = 0; i < j.t; i++) c |= (int32_t)(z[k * j.t + i] >= 0) << i;
        code[k] = c;
    }
}

#if EVOMOE_LANES >= 8
// Permutes the lanes: lane i gets the value of lane i ^ by, where `by` is 1, 2 or 4, so that lanes stay
// within their group of eight.
static inline fv across(fv v, int by) {
    iv at;
    for (int i = 0; i < V; i++) at[i] = i ^ by;
    return __builtin_shuffle(v, at);
}
#endif

// Score of each slice of one row of z.
static void weigh(const Job& j, const float* z, float* scratch, float* p) {
    if (j.score != L1) confidence(z, scratch, j.K * j.t, 2 / j.temperature);
    int64_t k = 0;
#if EVOMOE_LANES >= 8
    constexpr int EACH = V / 8;  // slices of 8 in a register
    for (; j.t == 8 && j.score != L1 && k + EACH <= j.K; k += EACH) {
        fv product = load(scratch + k * 8) + 1, score = fv{} + 1;
        product *= across(product, 1);
        product *= across(product, 2);
        product *= across(product, 4);
        if (j.score == ABS_PROB) {
            score = (fv)((iv)load(z + k * 8) & 0x7fffffff);
            score += across(score, 1);
            score += across(score, 2);
            score += across(score, 4);
        }
        score /= product;
        for (int i = 0; i < EACH; i++) p[k + i] = score[i * 8];
    }
#endif
    for (; k < j.K; k++) {
        float sum = 0, product = 1;
        if (j.score != PROB)
            for (int64_t i = 0; i < j.t; i++) sum += std::fabs(z[k * j.t + i]);
        if (j.score != L1)
            for (int64_t i = 0; i < j.t; i++) product *= 1 + scratch[k * j.t + i];
        p[k] = j.score == PROB ? 1 / product : j.score == ABS_PROB ? sum / product : sum / j.t;
    }
}

#pragma GCC pop_options

// y[a..b) = sum over k of p_k T_k[code_k][a..b), computed four tables at a time.
template <class T>
static void read_rows(const Job& j, const T* tables, const int32_t* code, const float* p,
                      float* y, int64_t a, int64_t b) {
    constexpr int G = 4, LINE = 64 / sizeof(T);
    const T *now[G], *next[G];
    float w[G];
    auto row = [&](int64_t k) { return tables + (k * j.N + code[k]) * j.H; };
    for (int g = 0; g < G; g++) {
        next[g] = row(std::min<int64_t>(g, j.K - 1));
        for (int64_t h = a; h < b; h += LINE) __builtin_prefetch(next[g] + h);
    }
    for (int64_t k = 0; k < j.K; k += G) {
        const int g = (int)std::min<int64_t>(G, j.K - k);
        for (int i = 0; i < G; i++) {
            now[i] = next[i];
            const int64_t at = std::min(k + i, j.K - 1);
            w[i] = i < g ? (j.row_scale ? p[at] * j.row_scale[at * j.N + code[at]] : p[at]) : 0;
            next[i] = row(std::min(k + G + i, j.K - 1));
        }
        int64_t h = a;
        for (; h + V <= b; h += V) {
            if (h % LINE < V)
                for (int i = 0; i < G; i++) __builtin_prefetch(next[i] + h);
            fv sum = k > 0 ? load(y + h) : fv{};
            if (g == G)
                for (int i = 0; i < G; i++) sum += w[i] * load(now[i] + h);
            else
                for (int i = 0; i < g; i++) sum += w[i] * load(now[i] + h);
            store(y + h, sum);
        }
        for (; h < b; h++) {
            float sum = k > 0 ? y[h] : 0;
            for (int i = 0; i < g; i++) sum += w[i] * widen(now[i][h]);
            y[h] = sum;
        }
    }
}

// Copies columns [h, h + W) of table k, widened and scaled, into `tile`. Columns beyond H are 0.
template <class T, int W>
static void pack(const Job& j, const T* tables, int64_t k, int64_t h, float* tile) {
    const int64_t width = std::min<int64_t>(W, j.H - h);
    for (int64_t n = 0; n < j.N; n++) {
        const T* from = tables + (k * j.N + n) * j.H + h;
        const float scale = j.row_scale ? j.row_scale[k * j.N + n] : 1;
        float* to = tile + n * W;
        // rows lie too far apart for the hardware prefetcher
        for (int64_t i = 0; i < W; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(from + 64 * j.H + i);
        if (width == W) {
            for (int64_t i = 0; i < W; i += V) store(to + i, load(from + i) * scale);
        } else {
            for (int64_t i = 0; i < W; i++) to[i] = i < width ? widen(from[i]) * scale : 0;
        }
    }
}

// Columns [h, h + W) of y for all rows, G tables at a time.
template <class T, int W, int G>
static void read_tiles(const Job& j, const T* tables, const int32_t* code, const float* p,
                       float* y, int64_t h, float* tiles) {
    constexpr int R = W / V;
    const int64_t width = std::min<int64_t>(W, j.H - h);
    for (int64_t k = 0; k < j.K; k += G) {
        const int64_t g = std::min<int64_t>(G, j.K - k);
        for (int64_t i = 0; i < g; i++) pack<T, W>(j, tables, k + i, h, tiles + i * j.N * W);
        for (int64_t b = 0; b < j.B; b++) {
            float* out = y + b * j.H + h;
            const int32_t* c = code + b * j.K + k;
            const float* w = p + b * j.K + k;
            fv sum[R] = {};
            // rows of y lie too far apart for the hardware prefetcher
            for (int64_t c0 = 0; c0 < W; c0 += 16) __builtin_prefetch(out + 8 * j.H + c0, 1);
            if (k > 0) {
                if (width == W)
                    for (int r = 0; r < R; r++) sum[r] = load(out + r * V);
                else
                    std::memcpy(sum, out, width * sizeof(float));
            }
            for (int64_t i = 0; i < g; i++) {
                const float* from = tiles + (i * j.N + c[i]) * W;
                for (int r = 0; r < R; r++) sum[r] += w[i] * load(from + r * V);
            }
            if (width == W)
                for (int r = 0; r < R; r++) store(out + r * V, sum[r]);
            else
                std::memcpy(out, sum, width * sizeof(float));
        }
    }
}

// Prefetches the first cache lines of the table rows that a row of z will read, so that they arrive
// while its scores are computed.
template <class T>
static void announce(const Job& j, const T* tables, const int32_t* code) {
    for (int64_t k = 0; k < j.K; k++) {
        const char* row = (const char*)(tables + (k * j.N + code[k]) * j.H);
        for (int64_t at = 0; at < std::min<int64_t>(256, j.H * sizeof(T)); at += 64)
            __builtin_prefetch(row + at);
        if (j.row_scale) __builtin_prefetch(j.row_scale + k * j.N + code[k]);
    }
}

template <class T>
static void forward(const Job& j, const T* tables, int32_t* code, float* p, float* y) {
    // copying tiles reads every table once, which pays off if the rows would read as much anyway
    const bool by_row = j.B < 5 * j.N;
    const int64_t values = std::max<int64_t>(1, j.K * j.t);
    parallel(j.B, 1 + 16384 / (values + by_row * j.K * j.H), [&](int64_t a, int64_t b) {
        Scratch e(values + V);
        for (int64_t i = a; i < b; i++) {
            const float* z = j.z + i * j.K * j.t;
            find(j, z, code + i * j.K);
            if (by_row) announce(j, tables, code + i * j.K);
            weigh(j, z, e.data, p + i * j.K);
            if (by_row && j.B > 1) read_rows(j, tables, code + i * j.K, p + i * j.K, y + i * j.H, 0, j.H);
        }
    });
    if (by_row) {
        if (j.B == 1)
            parallel((j.H + V - 1) / V, 1 + 65536 / (j.K * V + 1), [&](int64_t a, int64_t b) {
                read_rows(j, tables, code, p, y, a * V, std::min(b * V, j.H));
            });
        return;
    }
    constexpr int W = 32, G = 12;
    // G tables at a time if their tiles fit into half a MiB of cache, otherwise 2
    const bool many = j.N * W * G * 4 <= 1 << 19;
    parallel((j.H + W - 1) / W, 1, [&](int64_t a, int64_t b) {
        Scratch tiles(j.N * W * (many ? G : 2));
        for (int64_t i = a; i < b; i++) {
            if (many) read_tiles<T, W, G>(j, tables, code, p, y, i * W, tiles.data);
            else read_tiles<T, W, 2>(j, tables, code, p, y, i * W, tiles.data);
        }
    });
}

}  // namespace EVOMOE_ISA
