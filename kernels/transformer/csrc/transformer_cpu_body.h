// The kernels of transformer_cpu.cpp for one instruction set.

namespace EVOMOE_ISA {

// A tile of a product has ROWS times COLUMNS registers.
constexpr int ROWS = V == 16 ? 12 : 6, COLUMNS = 2;

// c (R, G V) = a b, or += if `add`; a (R, K) has any strides, b (K, G V) and c have contiguous rows.
template <int R, int G>
static inline void tile(int64_t K, const float* a, int64_t am, int64_t ak, const float* b, int64_t ldb,
                        float* c, int64_t ldc, bool add) {
    fv sum[R][G];
    for (int r = 0; r < R; r++)
        for (int g = 0; g < G; g++) sum[r][g] = add ? load(c + r * ldc + g * V) : fv{};
    for (int64_t k = 0; k < K; k++) {
        fv row[G];
        for (int g = 0; g < G; g++) row[g] = load(b + k * ldb + g * V);
        for (int r = 0; r < R; r++)
            for (int g = 0; g < G; g++) sum[r][g] += a[r * am + k * ak] * row[g];
    }
    for (int r = 0; r < R; r++)
        for (int g = 0; g < G; g++) store(c + r * ldc + g * V, sum[r][g]);
}

template <int R, int G>
static inline void last_rows(int64_t left, int64_t K, const float* a, int64_t am, int64_t ak, const float* b,
                             int64_t ldb, float* c, int64_t ldc, bool add) {
    if (left == R) {
        tile<R, G>(K, a, am, ak, b, ldb, c, ldc, add);
    } else if constexpr (R > 1) {
        last_rows<R - 1, G>(left, K, a, am, ak, b, ldb, c, ldc, add);
    }
}

template <int G>
static void panel(int64_t M, int64_t K, const float* a, int64_t am, int64_t ak, const float* b, int64_t ldb,
                  float* c, int64_t ldc, bool add) {
    int64_t m = 0;
    for (; m + ROWS <= M; m += ROWS) tile<ROWS, G>(K, a + m * am, am, ak, b, ldb, c + m * ldc, ldc, add);
    last_rows<ROWS, G>(M - m, K, a + m * am, am, ak, b, ldb, c + m * ldc, ldc, add);
}

// c (M, N) = a (M, K) b (K, N), or += if `add`. N is a multiple of V.
static void product(int64_t M, int64_t N, int64_t K, const float* a, int64_t am, int64_t ak, const float* b,
                    int64_t ldb, float* c, int64_t ldc, bool add) {
    int64_t n = 0;
    for (; n + COLUMNS * V <= N; n += COLUMNS * V)
        panel<COLUMNS>(M, K, a, am, ak, b + n, ldb, c + n, ldc, add);
    if (n < N) panel<1>(M, K, a, am, ak, b + n, ldb, c + n, ldc, add);
}

static inline fv larger(fv a, fv b) { return a > b ? a : b; }
static inline float largest(fv v) {
    float m = v[0];
    for (int i = 1; i < V; i++) m = std::max(m, v[i]);
    return m;
}

static inline int64_t padded(int64_t n) { return (n + V - 1) / V * V; }
// Length of a row of n scores. Rows a power of two apart would share a few sets of the cache.
static inline int64_t row_of(int64_t n) { return padded(n) + 16; }

// Rows of a head in one piece; a head's rows lie far apart in a batch.
static inline void pack(const float* from, int64_t stride, int64_t rows, int64_t C, float factor, float* to) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t c = 0; c < C; c += V) store(to + i * C + c, load(from + i * stride + c) * factor);
}
static inline void unpack(const float* from, int64_t rows, int64_t C, float* to, int64_t stride) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t c = 0; c < C; c += V) store(to + i * stride + c, load(from + i * C + c));
}
// (rows, C) -> (C, ld), the columns from `rows` on 0.
static inline void transpose(const float* from, int64_t rows, int64_t C, float* to, int64_t ld) {
    for (int64_t c = 0; c < C; c++) {
        for (int64_t i = 0; i < rows; i++) to[c * ld + i] = from[i * C + c];
        for (int64_t i = rows; i < ld; i++) to[c * ld + i] = 0;
    }
}

// Queries that are treated at once. Their scores should stay in the second cache.
static inline int64_t block_of(int64_t S) {
    return std::max<int64_t>(ROWS, std::min<int64_t>(64, 16384 / std::max<int64_t>(S, 1)));
}

// Number of keys up to the last one that any of these queries may see.
static inline int64_t open_keys(const Attention& j, int64_t b, int64_t n, int64_t first, int64_t last) {
    if (j.mask.data == nullptr) return j.S;
    int64_t open = 0;
    // under a causal mask the last query sees most, and the others are not searched again
    for (int64_t i = last; i-- > first;) {
        const float* row = j.mask_row(b, n, i);
        int64_t s = j.S;
        while (s > open && row[s - 1] == -INFINITY) s--;
        open = std::max(open, s);
        if (j.mask.row == 0) break;
    }
    return open;
}

// `open_keys` of all blocks of a head, computed once where all heads have the same mask.
struct Open {
    const Attention& j;
    const int64_t block;
    const bool shared;
    Scratch counts;
    Open(const Attention& job, int64_t size)
        : j(job), block(size), shared(job.mask.batch == 0 && job.mask.head == 0), counts((j.L + size - 1) / size) {
        if (!shared) return;
        for (int64_t i = 0; i < j.L; i += size)
            ((int32_t*)counts.data)[i / size] = open_keys(j, 0, 0, i, std::min(i + size, j.L));
    }
    int64_t of(int64_t b, int64_t n, int64_t first) const {
        return shared ? ((const int32_t*)counts.data)[first / block]
                      : open_keys(j, b, n, first, std::min(first + block, j.L));
    }
};

// scores[0, n) += mask, whose padding up to a whole register becomes -inf; returns the largest score.
static inline float add_mask(float* scores, const float* mask, int64_t n) {
    fv most = fv{} - INFINITY;
    int64_t s = 0;
    for (; s + V <= n; s += V) {
        fv x = load(scores + s);
        if (mask != nullptr) x += load(mask + s), store(scores + s, x);
        most = larger(x, most);
    }
    float m = largest(most);
    for (; s < n; s++) {
        if (mask != nullptr) scores[s] += mask[s];
        m = std::max(m, scores[s]);
    }
    for (; s < padded(n); s++) scores[s] = -INFINITY;
    return m;
}

// scores[0, n) -> e^(scores - shift) in whole registers; returns the sum.
static inline float exponentials(float* scores, float shift, int64_t n) {
    fv sum{};
    for (int64_t s = 0; s < n; s += V) {
        const fv e = exp_negative(load(scores + s) - shift);
        store(scores + s, e);
        sum += e;
    }
    return total(sum);
}

static void attend(const Attention& j) {
    const int64_t C = j.C, L = j.L, S = j.S, ld = row_of(S), block = block_of(S);
    const Open keys(j, block);
    parallel(j.B * j.N, 1, [&](int64_t from, int64_t to) {
        Scratch room(block * C * 2 + S * C * 2 + C * ld + block * ld);
        float *q = room.data, *y = q + block * C, *k = y + block * C, *v = k + S * C, *kt = v + S * C;
        float* scores = kt + C * ld;
        for (int64_t head = from; head < to; head++) {
            const int64_t b = head / j.N, n = head % j.N;
            pack(j.k.at(b, n), j.k.row, S, C, 1, k);
            pack(j.v.at(b, n), j.v.row, S, C, 1, v);
            transpose(k, S, C, kt, ld);
            for (int64_t first = 0; first < L; first += block) {
                const int64_t rows = std::min(block, L - first), open = keys.of(b, n, first);
                pack(j.q.at(b, n) + first * j.q.row, j.q.row, rows, C, j.scale, q);
                product(rows, padded(open), C, q, C, 1, kt, ld, scores, ld, false);
                float* norm = j.norm + (b * j.N + n) * L + first;
                for (int64_t i = 0; i < rows; i++) {
                    float* row = scores + i * ld;
                    const float most = add_mask(row, j.mask_row(b, n, first + i), open);
                    const float sum = exponentials(row, most == -INFINITY ? 0 : most, padded(open));
                    // a query without keys gets 0, as from torch
                    norm[i] = sum == 0 ? INFINITY : most + std::log(sum);
                    const float factor = sum == 0 ? 0 : 1 / sum;
                    for (int64_t s = 0; s < padded(open); s += V) store(row + s, load(row + s) * factor);
                }
                product(rows, C, open, scores, ld, 1, v, C, y, C, false);
                unpack(y, rows, C, j.y.at(b, n) + first * j.y.row, j.y.row);
            }
        }
    });
}

static void attend_backward(const Attention& j) {
    const int64_t C = j.C, L = j.L, S = j.S, ld = row_of(S), block = block_of(S);
    const Open keys(j, block);
    parallel(j.B * j.N, 1, [&](int64_t from, int64_t to) {
        Scratch room(block * C * 4 + S * C * 4 + 2 * C * ld + 2 * block * ld);
        float *q = room.data, *y = q + block * C, *dy = y + block * C, *dq = dy + block * C, *k = dq + block * C;
        float *v = k + S * C, *dk = v + S * C, *dv = dk + S * C, *kt = dv + S * C, *vt = kt + C * ld;
        float *probs = vt + C * ld, *slopes = probs + block * ld;
        for (int64_t head = from; head < to; head++) {
            const int64_t b = head / j.N, n = head % j.N;
            pack(j.k.at(b, n), j.k.row, S, C, 1, k);
            pack(j.v.at(b, n), j.v.row, S, C, 1, v);
            transpose(k, S, C, kt, ld);
            transpose(v, S, C, vt, ld);
            std::fill(dk, dk + 2 * S * C, 0.f);
            for (int64_t first = 0; first < L; first += block) {
                const int64_t rows = std::min(block, L - first), open = keys.of(b, n, first);
                pack(j.q.at(b, n) + first * j.q.row, j.q.row, rows, C, j.scale, q);
                pack(j.y.at(b, n) + first * j.y.row, j.y.row, rows, C, 1, y);
                pack(j.dy.at(b, n) + first * j.dy.row, j.dy.row, rows, C, 1, dy);
                product(rows, padded(open), C, q, C, 1, kt, ld, probs, ld, false);
                product(rows, padded(open), C, dy, C, 1, vt, ld, slopes, ld, false);
                const float* norm = j.norm + (b * j.N + n) * L + first;
                for (int64_t i = 0; i < rows; i++) {
                    float *p = probs + i * ld, *d = slopes + i * ld;
                    add_mask(p, j.mask_row(b, n, first + i), open);
                    exponentials(p, norm[i], padded(open));
                    fv along{};
                    for (int64_t c = 0; c < C; c += V) along += load(y + i * C + c) * load(dy + i * C + c);
                    const float shared = total(along);
                    for (int64_t s = 0; s < padded(open); s += V)
                        store(d + s, load(p + s) * (load(d + s) - shared));
                }
                product(open, C, rows, probs, 1, ld, dy, C, dv, C, true);
                product(open, C, rows, slopes, 1, ld, q, C, dk, C, true);
                product(rows, C, open, slopes, ld, 1, k, C, dq, C, false);
                pack(dq, C, rows, C, j.scale, dq);
                unpack(dq, rows, C, j.dq.at(b, n) + first * j.dq.row, j.dq.row);
            }
            unpack(dk, S, C, j.dk.at(b, n), j.dk.row);
            unpack(dv, S, C, j.dv.at(b, n), j.dv.row);
        }
    });
}

// See softmax_loss.
static void losses(float* logits, const int64_t* target, int64_t T, int64_t W, double sure, double rest,
                   bool gradient, double* out) {
    const int64_t whole = W / V * V;
    parallel(T, std::max<int64_t>(1, 32768 / std::max<int64_t>(W, 1)), [&](int64_t from, int64_t to) {
        for (int64_t t = from; t < to; t++) {
            float* x = logits + t * W;
            const float at_target = x[target[t]];
            fv most = fv{} - INFINITY;
            for (int64_t w = 0; w < whole; w += V) most = larger(load(x + w), most);
            float m = largest(most);
            for (int64_t w = whole; w < W; w++) m = std::max(m, x[w]);
            // the sums are taken in pieces, whose rounding is that of few terms
            double mass = 0, sum = 0;
            for (int64_t first = 0; first < whole; first += 64 * V) {
                fv masses{}, sums{};
                for (int64_t w = first; w < std::min(first + 64 * V, whole); w += V) {
                    const fv moved = load(x + w) - m, e = exp_negative(moved);
                    store(x + w, e);
                    masses += e;
                    sums += moved;
                }
                mass += total(masses), sum += total(sums);
            }
            for (int64_t w = whole; w < W; w++) {
                const float moved = x[w] - m;
                sum += moved;
                mass += x[w] = std::exp(moved);
            }
            const double log_mass = std::log(mass);
            out[2 * t] = log_mass - ((double)at_target - m);
            out[2 * t + 1] = rest ? W * log_mass - sum : 0;
            if (!gradient) continue;
            const float factor = (float)(1 / mass), less = (float)rest;
            for (int64_t w = 0; w < whole; w += V) store(x + w, load(x + w) * factor - less);
            for (int64_t w = whole; w < W; w++) x[w] = x[w] * factor - less;
            x[target[t]] -= (float)sure;
        }
    });
}

typedef uint32_t uv __attribute__((vector_size(4 * V)));

// 32 bits that depend on all bits of x: the hash "lowbias32" of Chris Wellons' prospector.
static inline uv mixed(uv x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
}

// Which elements dropout keeps, and by what it multiplies them.
struct Mask {
    const uint64_t seed;
    const uint32_t limit;
    const float scale;
    Mask(double p, int64_t s)
        : seed(s), limit(std::min(p * 4294967296., 4294967295.)), scale((float)(1 / (1 - p))) {}
    // The part of the hash that 2^32 positions share.
    uv key(uint64_t i) const { return mixed(uv{} + (uint32_t)(seed >> 32) + (uint32_t)(i >> 32)); }
    // x -> y for the V positions from i on; i is a multiple of V.
    template <class T>
    void apply(const T* x, T* y, uint64_t i, uv shared) const {
        uv at;
        for (int lane = 0; lane < V; lane++) at[lane] = lane;
        const uv words = mixed(mixed(at + (uint32_t)i + (uint32_t)seed) ^ shared);
        store(y, (fv)((uv)(load(x) * scale) & (uv)(words >= limit)));
    }
};

// See dropout.
template <class T>
static void dropout(const T* x, T* y, int64_t n, double p, int64_t seed) {
    const Mask mask(p, seed);
    const int64_t whole = n / V * V;
    parallel(whole / V, 4096, [&](int64_t from, int64_t to) {
        for (int64_t i = from * V; i < to * V;) {
            const uv shared = mask.key(i);
            const int64_t end = std::min(to * V, ((i >> 32) + 1) << 32);
            for (; i < end; i += V) mask.apply(x + i, y + i, i, shared);
        }
    });
    if (const int64_t left = n - whole) {
        T last[V] = {};
        std::memcpy(last, x + whole, left * sizeof(T));
        mask.apply(last, last, whole, mask.key(whole));
        std::memcpy(y + whole, last, left * sizeof(T));
    }
}

}  // namespace EVOMOE_ISA
