// Norms, rotary positions, the KV cache and attention.

#define ATTEND_WARPS 4
#define ATTEND_BATCH 4  // positions a warp looks at together
#define ATTEND_STRETCH 128  // positions that one block attends to, while there are few queries
#define ATTEND_BLOCKS 64    // stretches, and so blocks, of all queries of a head

// Into how many stretches attention cuts the positions.
__device__ __forceinline__ int stretches_of(int n_tokens, int n_positions) {
    return min((n_positions + ATTEND_STRETCH - 1) / ATTEND_STRETCH, max(1, ATTEND_BLOCKS / n_tokens));
}

// out [n] = a + b; may write over either.
extern "C" __global__ void add_values(const float* a, const float* b, int n, float* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = a[i] + b[i];
}

// Sum over a block of up to 32 whole warps; `shared` holds 32 floats. All threads get it.
__device__ float block_sum(float value, float* shared) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, n_warps = blockDim.x / WARP;
    value = warp_sum(value);
    __syncthreads();
    if (lane == 0) shared[warp] = value;
    __syncthreads();
    return warp_sum(lane < n_warps ? shared[lane] : 0.0f);
}

// Layer norm where `is_centred`, else RMS norm; a block takes one row [width].
extern "C" __global__ void norm_rows(
    const float* x, int width, const float* weight, const float* bias, float eps, int is_centred, float* out
) {
    __shared__ float shared[WARP];
    const float* row = x + (i64)blockIdx.x * width;
    float mean = 0.0f;
    if (is_centred) {
        float sum = 0.0f;
        for (int i = threadIdx.x; i < width; i += blockDim.x) sum += row[i];
        mean = block_sum(sum, shared) / width;
    }
    float squares = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) squares += (row[i] - mean) * (row[i] - mean);
    const float root = sqrtf(block_sum(squares, shared) / width + eps);
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        const float y = (row[i] - mean) / root * (weight ? weight[i] : 1.0f);
        out[(i64)blockIdx.x * width + i] = bias ? y + bias[i] : y;
    }
}

// Turn pairs of x [n_tokens, n_heads, width] in place; a thread takes one pair. cos, sin [n_tokens, n_pairs].
extern "C" __global__ void rotate_pairs(
    float* x, int n_tokens, int n_heads, int width, const float* cos, const float* sin, int n_pairs, int is_interleaved
) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n_tokens * n_heads * n_pairs) return;
    const int pair = i % n_pairs, head = i / n_pairs, token = head / n_heads;
    float* a = x + (i64)head * width + (is_interleaved ? 2 * pair : pair);
    float* b = a + (is_interleaved ? 1 : n_pairs);
    const float c = cos[token * n_pairs + pair], s = sin[token * n_pairs + pair];
    const float first = *a, second = *b;
    *a = first * c - second * s;
    *b = second * c + first * s;
}

template <int IS_HALF> struct Kept;
template <> struct Kept<0> {
    typedef float Value;
    __device__ static float get(Value v) { return v; }
    __device__ static Value put(float v) { return v; }
};
template <> struct Kept<1> {
    typedef u16 Value;
    __device__ static float get(Value v) { return half_to_float(v); }
    __device__ static Value put(float v) { return float_to_half(v); }
};

// Store new keys and values [n_new, n_kv_heads, width] behind `n_past` of a layer [n_kv_heads, capacity, width]; `past`,
// where it is not null, has their number instead, so that a captured launch serves every token.
template <int IS_HALF>
__device__ void append_kv(
    const float* new_keys, const float* new_values, int n_new, int n_kv_heads, int width, const int* past,
    int n_past, int capacity, void* keys, void* values
) {
    typedef Kept<IS_HALF> K;
    if (past) n_past = *past;
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n_new * n_kv_heads * width) return;
    const int column = i % width, head = i / width % n_kv_heads, token = i / width / n_kv_heads;
    const i64 to = ((i64)head * capacity + n_past + token) * width + column;
    ((typename K::Value*)keys)[to] = K::put(new_keys[i]);
    ((typename K::Value*)values)[to] = K::put(new_values[i]);
}

// One query head (y) of one token (z) over one stretch of positions (x): unnormalised sum and its scale. A lane holds
// VALUES values of a head, so that heads are up to 32 * VALUES wide. `past` as in `append_kv`; blocks that then have no
// stretch do nothing.
// partial [n_tokens, n_heads, n_stretches, width + 2]: largest score, sum of weights, weighted values.
template <int IS_HALF, int VALUES>
__device__ void attend(
    const float* q, const void* keys, const void* values, int n_heads, int n_kv_heads, int width, int capacity,
    const int* past, int n_past, float scale, int window, float* partial
) {
    typedef Kept<IS_HALF> K;
    if (past) n_past = *past;
    const int n_positions = n_past + gridDim.z, n_stretches = stretches_of(gridDim.z, n_positions);
    const int stretch = (n_positions + n_stretches - 1) / n_stretches;
    if ((int)blockIdx.x >= n_stretches) return;
    __shared__ float best_of[ATTEND_WARPS], total_of[ATTEND_WARPS], mixed_of[ATTEND_WARPS][VALUES * WARP];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int head = blockIdx.y, token = blockIdx.z;
    const int last = n_past + token + 1, first = window ? max(0, last - window) : 0;
    const int begin = max((int)blockIdx.x * stretch, first), end = min(((int)blockIdx.x + 1) * stretch, last);
    const i64 kv_base = (i64)(head * n_kv_heads / n_heads) * capacity * width;
    const typename K::Value* k = (const typename K::Value*)keys + kv_base;
    const typename K::Value* v = (const typename K::Value*)values + kv_base;
    float query[VALUES], mixed[VALUES];
#pragma unroll
    for (int i = 0; i < VALUES; i++) {
        const int column = i * WARP + lane;
        query[i] = column < width ? q[((i64)token * n_heads + head) * width + column] * scale : 0.0f;
        mixed[i] = 0.0f;
    }
    float best = -INFINITE, total = 0.0f;
    for (int position = begin + warp * ATTEND_BATCH; position < end; position += ATTEND_WARPS * ATTEND_BATCH) {
        float score[ATTEND_BATCH] = {};
#pragma unroll
        for (int i = 0; i < VALUES; i++) {
            const int column = i * WARP + lane;
#pragma unroll
            for (int b = 0; b < ATTEND_BATCH; b++) {
                if (column < width && position + b < end) {
                    score[b] = fmaf(query[i], K::get(k[(i64)(position + b) * width + column]), score[b]);
                }
            }
        }
        float peak = best;
#pragma unroll
        for (int b = 0; b < ATTEND_BATCH; b++) {
            score[b] = warp_sum(score[b]);
            if (position + b >= end) score[b] = -INFINITE;
            peak = fmaxf(peak, score[b]);
        }
        const float shrink = expf(best - peak);
        best = peak;
        total *= shrink;
        float weight[ATTEND_BATCH];
#pragma unroll
        for (int b = 0; b < ATTEND_BATCH; b++) {
            weight[b] = expf(score[b] - peak);
            total += weight[b];
        }
#pragma unroll
        for (int i = 0; i < VALUES; i++) {
            const int column = i * WARP + lane;
            mixed[i] *= shrink;
#pragma unroll
            for (int b = 0; b < ATTEND_BATCH; b++) {
                if (column < width && position + b < end) {
                    mixed[i] = fmaf(weight[b], K::get(v[(i64)(position + b) * width + column]), mixed[i]);
                }
            }
        }
    }
    if (lane == 0) {
        best_of[warp] = best;
        total_of[warp] = total;
    }
#pragma unroll
    for (int i = 0; i < VALUES; i++) {
        const int column = i * WARP + lane;
        if (column < width) mixed_of[warp][column] = mixed[i];
    }
    __syncthreads();
    float peak = -INFINITE, sum = 0.0f, share[ATTEND_WARPS];
    for (int w = 0; w < ATTEND_WARPS; w++) peak = fmaxf(peak, best_of[w]);
    for (int w = 0; w < ATTEND_WARPS; w++) {
        share[w] = total_of[w] > 0.0f || total_of[w] != total_of[w] ? expf(best_of[w] - peak) : 0.0f;
        sum += share[w] * total_of[w];
    }
    float* to = partial + (((i64)token * n_heads + head) * n_stretches + blockIdx.x) * (width + 2);
    if (threadIdx.x == 0) {
        to[0] = peak;
        to[1] = sum;
    }
    for (int column = threadIdx.x; column < width; column += blockDim.x) {
        float value = 0.0f;
        for (int w = 0; w < ATTEND_WARPS; w++) value += share[w] * mixed_of[w][column];
        to[2 + column] = value;
    }
}

// out [n_tokens * n_heads, width] from the stretches, in their order; a block takes one head of one token.
extern "C" __global__ void attend_combine(
    const float* partial, int n_tokens, const int* past, int n_past, int width, float* out
) {
    const int n_stretches = stretches_of(n_tokens, (past ? *past : n_past) + n_tokens);
    const float* from = partial + (i64)blockIdx.x * n_stretches * (width + 2);
    float peak = -INFINITE, total = 0.0f;
    for (int s = 0; s < n_stretches; s++) {
        if (from[s * (width + 2) + 1] != 0.0f) peak = fmaxf(peak, from[s * (width + 2)]);
    }
    for (int s = 0; s < n_stretches; s++) {
        const float sum = from[s * (width + 2) + 1];
        if (sum != 0.0f) total += sum * expf(from[s * (width + 2)] - peak);
    }
    for (int column = threadIdx.x; column < width; column += blockDim.x) {
        float value = 0.0f;
        for (int s = 0; s < n_stretches; s++) {
            const float* stretch = from + s * (width + 2);
            if (stretch[1] != 0.0f) value += stretch[2 + column] * expf(stretch[0] - peak);
        }
        out[(i64)blockIdx.x * width + column] = value / total;
    }
}

#define ATTEND_KERNEL(IS_HALF, VALUES, name)                                                                          \
    extern "C" __global__ void __launch_bounds__(ATTEND_WARPS* WARP) attend_##VALUES##_##name(                        \
        const float* q, const void* keys, const void* values, int n_heads, int n_kv_heads, int width, int capacity,   \
        const int* past, int n_past, float scale, int window, float* partial                                          \
    ) {                                                                                                               \
        attend<IS_HALF, VALUES>(                                                                                      \
            q, keys, values, n_heads, n_kv_heads, width, capacity, past, n_past, scale, window, partial               \
        );                                                                                                            \
    }

#define KV_KERNELS(IS_HALF, name)                                                                                     \
    ATTEND_KERNEL(IS_HALF, 4, name)                                                                                   \
    ATTEND_KERNEL(IS_HALF, 16, name)                                                                                  \
    extern "C" __global__ void append_kv_##name(                                                                      \
        const float* new_keys, const float* new_values, int n_new, int n_kv_heads, int width, const int* past,        \
        int n_past, int capacity, void* keys, void* values                                                            \
    ) {                                                                                                               \
        append_kv<IS_HALF>(new_keys, new_values, n_new, n_kv_heads, width, past, n_past, capacity, keys, values);     \
    }

KV_KERNELS(0, f32)
KV_KERNELS(1, f16)
