// Look-up of few rows on a GPU, as in decoding: one token of one or a few sentences.
//
// Letters: B rows, K tables, t bits per table, N = 2^t rows per table, H output width, S splits.
//
// A block owns one row, a strip of columns and one split of the tables. A warp hashes a table (the code
// is a ballot of signs) and adds the weighted table row, of which each lane reads 16 bytes. The sums of
// the warps are added in order in shared memory. If S > 1, blocks write partial sums, which a second
// kernel adds in order. There are no atomics, no buffers to reset and no synchronization with the host,
// so a CUDA graph can capture the launches.

#ifdef EVOMOE_EMULATE
#include "cuda_on_cpu.h"
#else
#include <cuda_runtime.h>
#define LAUNCH(kernel, blocks, threads, stream, job) (kernel)<<<blocks, threads, 0, stream>>>(job)
#endif

#include <stdint.h>

namespace {

enum Type : int { F32, BF16, I8 };
enum Score : int { PROB, ABS_PROB, L1 };
constexpr int LANES = 32, WARPS = 8;
constexpr unsigned ALL = 0xffffffffu;

struct bfloat {
    uint16_t bits;
};

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(int8_t x) { return (float)x; }
__device__ inline float widen(bfloat x) {
    union {
        uint32_t u;
        float f;
    } v;
    v.u = (uint32_t)x.bits << 16;
    return v.f;
}
__device__ inline void put(float* to, float x) { *to = x; }
__device__ inline void put(bfloat* to, float x) {
    union {
        float f;
        uint32_t u;
    } v;
    v.f = x;
    // round to nearest, ties to even; a NaN stays a NaN and keeps its sign
    const uint32_t up = v.u + 0x7fffu + ((v.u >> 16) & 1);
    to->bits = (uint16_t)(x != x ? (v.u >> 16) | 0x40 : up >> 16);
}

struct Job {
    const void* z;           // (B, K, t), float32 or bfloat16
    const void* tables;      // (K, N, H), float32, bfloat16 or int8
    const float* row_scale;  // (K, N) or null
    void* y;                 // (B, H), type of z
    float* sums;             // (S, B, H), used if S > 1
    int B, K, t, H, S, score;
    float slope;             // 2 / temperature
};

// 16 bytes of a table row
template <class T>
struct alignas(16) Piece {
    static constexpr int N = 16 / sizeof(T);
    T x[N];
};

// Look-up of one row and one strip of columns in one split of the tables.
// Grid: (strips of LANES * V columns, B, S). Block: (LANES, WARPS) threads.
template <class Z, class T>
__global__ void __launch_bounds__(LANES* WARPS) few_rows(const Job j) {
    constexpr int V = Piece<T>::N;
    __shared__ float all[WARPS][LANES * V];
    const int lane = threadIdx.x, warp = threadIdx.y, b = blockIdx.y, s = blockIdx.z;
    const int first = (int)((int64_t)j.K * s / j.S), last = (int)((int64_t)j.K * (s + 1) / j.S);
    const int h = ((int)blockIdx.x * LANES + lane) * V;
    const Z* z = (const Z*)j.z + (int64_t)b * j.K * j.t;
    const bool whole = j.H % V == 0;
    float sum[V];
    for (int i = 0; i < V; i++) sum[i] = 0;
    for (int k = first + warp; k < last; k += WARPS) {
        const float v = lane < j.t ? widen(z[(int64_t)k * j.t + lane]) : -1.0f;
        const unsigned code = __ballot_sync(ALL, v >= 0);
        const int64_t row = ((int64_t)k << j.t) + code;
        const T* from = (const T*)j.tables + row * j.H + h;
        // load the table row before computing the score, so that the two overlap
        Piece<T> piece;
        if (whole && h < j.H) {
            piece = *(const Piece<T>*)from;
        } else {
            for (int i = 0; i < V; i++)
                if (h + i < j.H) piece.x[i] = from[i];
        }
        float size = lane < j.t ? fabsf(v) : 0.0f;
        // log sigmoid in a form that never overflows
        float log_p = lane < j.t ? -log1pf(expf(-j.slope * size)) : 0.0f;
        for (int d = LANES / 2; d > 0; d /= 2) {
            size += __shfl_xor_sync(ALL, size, d);
            log_p += __shfl_xor_sync(ALL, log_p, d);
        }
        float w = j.score == L1 ? size / j.t : expf(log_p);
        if (j.score == ABS_PROB) w *= size;
        if (j.row_scale) w *= j.row_scale[row];
        for (int i = 0; i < V; i++)
            if (h + i < j.H) sum[i] += w * widen(piece.x[i]);
    }
    for (int i = 0; i < V; i++) all[warp][lane * V + i] = sum[i];
    __syncthreads();
    for (int c = warp * LANES + lane; c < LANES * V; c += LANES * WARPS) {
        const int at = (int)blockIdx.x * LANES * V + c;
        if (at >= j.H) continue;
        float total = 0;
        for (int g = 0; g < WARPS; g++) total += all[g][c];
        if (j.S > 1) j.sums[((int64_t)s * j.B + b) * j.H + at] = total;
        else put((Z*)j.y + (int64_t)b * j.H + at, total);
    }
}

// Sum of the S splits, in order.
// Grid: (blocks,). Block: (BLOCK,) threads, one per element of y.
template <class Z>
__global__ void add_shares(const Job j) {
    const int64_t size = (int64_t)j.B * j.H;
    const int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= size) return;
    float total = 0;
    for (int s = 0; s < j.S; s++) total += j.sums[s * size + at];
    put((Z*)j.y + at, total);
}

template <class Z, class T>
int launch(Job j, cudaStream_t stream) {
    constexpr int STRIP = LANES * Piece<T>::N, BLOCK = 256;
    const dim3 blocks((j.H + STRIP - 1) / STRIP, j.B, j.S), threads(LANES, WARPS);
    LAUNCH((few_rows<Z, T>), blocks, threads, stream, j);
    if (j.S > 1) {
        const dim3 more((unsigned)(((int64_t)j.B * j.H + BLOCK - 1) / BLOCK));
        LAUNCH(add_shares<Z>, more, dim3(BLOCK), stream, j);
    }
    return (int)cudaGetLastError();
}

template <class Z>
int by_tables(int type, const Job& j, cudaStream_t stream) {
    switch (type) {
        case I8: return launch<Z, int8_t>(j, stream);
        case BF16: return launch<Z, bfloat>(j, stream);
        default: return launch<Z, float>(j, stream);
    }
}

}  // namespace

// Whether this build can run on this machine: returns CUDA's error code, or 0 if there is none.
extern "C" int evomoe_cuda_ready() { return (int)cudaFree(nullptr); }

// z (B, K, t) and y (B, H) have type z_type, and tables (K, 2^t, H) has t_type. All are contiguous, and
// tables is aligned to 16 bytes. sums is (S, B, H) float32 if S > 1. t must be at most 31.
// Returns CUDA's error code, or 0 if there is none.
extern "C" int evomoe_lookup_few_rows(const void* z, const void* tables, const float* row_scale, void* y,
                                      float* sums, int z_type, int t_type, int B, int K, int t, int H,
                                      int S, int score, float slope, int device, void* stream) {
    const Job j{z, tables, row_scale, y, sums, B, K, t, H, S, score, slope};
    if (B == 0 || H == 0) return 0;
    int before = device;
    cudaGetDevice(&before);
    if (before != device) cudaSetDevice(device);
    const auto on = (cudaStream_t)stream;
    const int error = z_type == BF16 ? by_tables<bfloat>(t_type, j, on) : by_tables<float>(t_type, j, on);
    if (before != device) cudaSetDevice(before);
    return error;
}
