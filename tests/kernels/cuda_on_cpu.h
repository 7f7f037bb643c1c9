// Enough of CUDA to run a kernel on a CPU, to the letter: a thread for each thread of a block, one block
// after another, barriers where the kernel has them. For tests; a block takes milliseconds.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(n)
#define LAUNCH(kernel, blocks, threads, stream, job) run_on_cpu(kernel, blocks, threads, job)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
typedef void* cudaStream_t;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaFree(void*) { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* d) { return *d = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

namespace on_cpu {

struct Warp {
    std::barrier<> meet{32};
    uint32_t words[32];
};

struct Block {
    std::barrier<> meet;
    std::vector<std::unique_ptr<Warp>> warps;
    explicit Block(unsigned threads) : meet(threads) {
        for (unsigned i = 0; i < threads; i += 32) warps.push_back(std::make_unique<Warp>());
    }
};

inline thread_local Block* block;
inline thread_local unsigned linear;

// every lane's word, read by `read`, which runs between two meetings of the warp
template <class F>
auto exchange(uint32_t word, F read) {
    Warp& warp = *block->warps[linear / 32];
    warp.words[linear % 32] = word;
    warp.meet.arrive_and_wait();
    auto found = read(warp.words);
    warp.meet.arrive_and_wait();
    return found;
}

}  // namespace on_cpu

inline thread_local dim3 threadIdx, blockIdx, blockDim;

inline void __syncthreads() { on_cpu::block->meet.arrive_and_wait(); }

inline unsigned __ballot_sync(unsigned, bool yes) {
    return on_cpu::exchange(yes, [](const uint32_t* words) {
        unsigned found = 0;
        for (int i = 0; i < 32; i++) found |= words[i] << i;
        return found;
    });
}

inline float __shfl_xor_sync(unsigned, float x, int mask) {
    union {
        float f;
        uint32_t u;
    } v;
    v.f = x;
    const unsigned lane = on_cpu::linear % 32;
    v.u = on_cpu::exchange(v.u, [&](const uint32_t* words) { return words[lane ^ mask]; });
    return v.f;
}

template <class K, class J>
void run_on_cpu(K kernel, dim3 blocks, dim3 threads, const J& job) {
    const unsigned count = threads.x * threads.y * threads.z;
    for (unsigned z = 0; z < blocks.z; z++)
        for (unsigned y = 0; y < blocks.y; y++)
            for (unsigned x = 0; x < blocks.x; x++) {
                on_cpu::Block block(count);
                std::vector<std::jthread> running;
                for (unsigned i = 0; i < count; i++)
                    running.emplace_back([&, i] {
                        on_cpu::block = &block;
                        on_cpu::linear = i;
                        threadIdx = dim3(i % threads.x, i / threads.x % threads.y);
                        blockIdx = dim3(x, y, z);
                        blockDim = threads;
                        kernel(job);
                        // who has left no longer counts at barriers
                        block.meet.arrive_and_drop();
                    });
            }
}
