// Choosing bundles and moving them: no arithmetic on weights.

#define COMPACT_THREADS 1024

// found [1 + n] = how many neurons exceed `cut` for any token, then their ids in order. One block.
// scores [n_tokens, n]; their size is compared where `is_magnitude`. The ids come out sorted: no atomics.
extern "C" __global__ void __launch_bounds__(COMPACT_THREADS) compact_active(
    const float* scores, int n_tokens, int n, float cut, int is_magnitude, int* found
) {
    __shared__ int counts[COMPACT_THREADS / WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int n_found = 0;
    for (int start = 0; start < n; start += COMPACT_THREADS) {
        const int neuron = start + threadIdx.x;
        bool is_active = false;
        for (int t = 0; t < n_tokens && neuron < n; t++) {
            const float score = scores[(i64)t * n + neuron];
            is_active |= (is_magnitude ? fabsf(score) : score) > cut;
        }
        const u32 lanes = __ballot_sync(ALL_LANES, is_active);
        if (lane == 0) counts[warp] = __popc(lanes);
        __syncthreads();
        int before = n_found;
        for (int w = 0; w < COMPACT_THREADS / WARP; w++) {
            before += w < warp ? counts[w] : 0;
            n_found += counts[w];
        }
        if (is_active) found[1 + before + __popc(lanes & ((1u << lane) - 1u))] = neuron;
        __syncthreads();
    }
    if (threadIdx.x == 0) found[0] = n_found;
}

// Copy rows of `nbytes` (a multiple of 16): row from[i] of `source` to row to[i] of `target`; null lists mean row i.
// Either side may be page-locked host memory, which the device reaches at the same address.
extern "C" __global__ void move_rows(
    const u8* source, const int* from, u8* target, const int* to, i64 stride, i64 nbytes
) {
    const uint4* read = (const uint4*)row_at(source, stride, from, blockIdx.x);
    uint4* write = (uint4*)row_at(target, stride, to, blockIdx.x);
#pragma unroll 4
    for (int i = threadIdx.x; i < nbytes / 16; i += blockDim.x) write[i] = read[i];
}
