// The feed-forward network over bundles at scattered slots, straight from their stored bytes.
//
// Bundles are added in blocks of FFN_BLOCK: a block's sum is formed on its own, then added to the output in the order
// of the blocks. So cutting the sequence at multiples of FFN_BLOCK, and the slots, change no bit of the result.

#define FFN_BLOCK 64
#define DOWN_THREADS 64  // across columns
#define DOWN_GROUPS 4    // across the bundles of a block

__device__ float activate(int kind, float threshold, float x) {
    switch (kind) {  // ACTIVATION_CODES of activations.py
        case 1: return x > 0.0f || x != x ? x : 0.0f;
        case 2: return x > 0.0f || x != x ? x * x : 0.0f;
        case 3: return x > threshold ? x : 0.0f;
        case 4: return x / (1.0f + expf(-x));
        case 5: return 0.5f * x * (1.0f + erff(x * 0.70710678f));
        case 6: return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
        case 7: return x / (1.0f + expf(-1.702f * x));
    }
    return x;
}

// h [n_tokens, n_bundles] for a few tokens: a warp takes one bundle, block row y takes TT tokens.
template <int E, int R, int TT>
__device__ void ffn_up(
    const u8* base, i64 stride, const int* slots, i64 part, int n_bundles, int n, const float* x, int n_tokens,
    const float* gate_bias, const float* up_bias, int kind, float threshold, int up_kind, float up_threshold,
    int is_aligned, float* h
) {
    const int bundle = blockIdx.x * MATVEC_WARPS + threadIdx.x / WARP;
    const int token = blockIdx.y * TT;
    if (bundle >= n_bundles) return;
    const u8* row = row_at(base, stride, slots, bundle);
    const u8* rows[2] = {row, row + part};
    const int count = min(TT, n_tokens - token);
    float sums[R][TT];
    dot_rows<E, R, TT>(rows, n, x + (i64)token * n, count, is_aligned, sums);
    if (threadIdx.x % WARP) return;
#pragma unroll
    for (int t = 0; t < TT; t++) {
        if (t >= count) continue;
        float value = sums[R - 1][t] + (up_bias ? up_bias[bundle] : 0.0f);
        if (R == 2) {
            const float gate = sums[0][t] + (gate_bias ? gate_bias[bundle] : 0.0f);
            value = activate(kind, threshold, gate) * activate(up_kind, up_threshold, value);
        } else {
            value = activate(kind, threshold, value);
        }
        h[(i64)(token + t) * n_bundles + bundle] = value;
    }
}

// The same from finished projections [n_values]; `gate` is null where there is none. May write over its input.
extern "C" __global__ void ffn_activate(
    const float* gate, const float* up, int n_values, int kind, float threshold, int up_kind, float up_threshold,
    float* h
) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n_values) return;
    h[i] = gate ? activate(kind, threshold, gate[i]) * activate(up_kind, up_threshold, up[i])
                : activate(kind, threshold, up[i]);
}

// partial [block, token, column]: sums over each block of bundles, for a few tokens.
template <int E, int TT>
__device__ void ffn_down(
    const u8* base, i64 stride, const int* slots, i64 part, int n_bundles, int n, const float* h, int n_tokens,
    int is_aligned, float* partial
) {
    typedef Stored<E> S;
    __shared__ float4 storage[DOWN_GROUPS * DOWN_THREADS * S::N / 4];
    float* shared = (float*)storage;
    const int lane = threadIdx.x % DOWN_THREADS, group = threadIdx.x / DOWN_THREADS;
    const int unit = blockIdx.x * DOWN_THREADS + lane;
    const int token = blockIdx.z * TT, count = min(TT, n_tokens - token);
    const int begin = blockIdx.y * FFN_BLOCK + group * (FFN_BLOCK / DOWN_GROUPS);
    const int end = min(begin + FFN_BLOCK / DOWN_GROUPS, n_bundles);
    const bool has_columns = unit * S::N < n;
    float acc[TT][S::N] = {};
    if (has_columns && (S::SCALED || is_aligned)) {
        const i64 offset = S::values_offset(n);
#pragma unroll(S::N > 8 ? 2 : 4)
        for (int j = begin; j < end; j++) {
            const u8* row = row_at(base, stride, slots, j) + part;
            float w[S::N], scale[2];
            S::unpack(load_unit<E>(row, offset, unit), w);
            S::halves(row, unit, scale);
#pragma unroll
            for (int t = 0; t < TT; t++) {
                const float value = t < count ? h[(i64)(token + t) * n_bundles + j] : 0.0f;
                const float scaled[2] = {S::SCALED ? value * scale[0] : value, S::SCALED ? value * scale[1] : value};
#pragma unroll
                for (int i = 0; i < S::N; i++) acc[t][i] = fmaf(scaled[2 * i >= S::N], w[i], acc[t][i]);
            }
        }
    } else if (has_columns) {
        for (int j = begin; j < end; j++) {
            const u8* row = row_at(base, stride, slots, j) + part;
#pragma unroll
            for (int i = 0; i < S::N; i++) {
                const int column = S::column(unit, i / 4) + i % 4;
                const float w = column < n ? Weight<E>::at(row, n, column) : 0.0f;
#pragma unroll
                for (int t = 0; t < TT; t++) {
                    if (t < count) acc[t][i] = fmaf(h[(i64)(token + t) * n_bundles + j], w, acc[t][i]);
                }
            }
        }
    }
#pragma unroll
    for (int t = 0; t < TT; t++) {
        if (t >= count) break;
#pragma unroll
        for (int i = 0; i < S::N; i++) shared[(group * S::N + i) * DOWN_THREADS + lane] = acc[t][i];
        __syncthreads();
        float* to = partial + ((i64)blockIdx.y * n_tokens + token + t) * n;
        for (int i = group; i < S::N && has_columns; i += DOWN_GROUPS) {
            const int column = S::column(unit, i / 4) + i % 4;
            float sum = 0.0f;
            for (int g = 0; g < DOWN_GROUPS; g++) sum += shared[(g * S::N + i) * DOWN_THREADS + lane];
            if (column < n) to[column] = sum;
        }
        __syncthreads();
    }
}

// out [n_values] += partial [n_blocks, n_values], block after block.
extern "C" __global__ void ffn_add_blocks(const float* partial, int n_blocks, int n_values, float* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n_values) return;
    float sum = out[i];
#pragma unroll 16
    for (int b = 0; b < n_blocks; b++) sum += partial[(i64)b * n_values + i];
    out[i] = sum;
}

// out [n_tokens, n] += h [n_tokens, n_bundles] times the down parts, for many tokens.
template <int E>
__device__ void ffn_down_many(
    const u8* base, i64 stride, const int* slots, i64 part, int n_bundles, int n, const float* h, int n_tokens,
    float* out
) {
    __shared__ float4 storage[2 * TILE * TILE_PITCH / 4];
    float* tokens = (float*)storage;
    float* rows = tokens + TILE * TILE_PITCH;
    const int first_column = blockIdx.x * TILE, first_token = blockIdx.y * TILE;
    const int own_column = first_column + threadIdx.x % 16 * 4, own_token = first_token + threadIdx.x / 16 * 4;
    float total[4][4];
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < 4; j++) {
            const bool is_inside = own_token + i < n_tokens && own_column + j < n;
            total[i][j] = is_inside ? out[(i64)(own_token + i) * n + own_column + j] : 0.0f;
        }
    }
    for (int start = 0; start < n_bundles; start += FFN_BLOCK) {
        const int lane = threadIdx.x % TILE;
        for (int i = threadIdx.x / TILE; i < TILE; i += TILE_THREADS / TILE) {
            const bool has_weight = start + i < n_bundles && first_column + lane < n;
            const bool has_token = first_token + i < n_tokens && start + lane < n_bundles;
            rows[i * TILE_PITCH + lane] =
                has_weight ? Weight<E>::at(row_at(base, stride, slots, start + i) + part, n, first_column + lane) : 0.0f;
            tokens[lane * TILE_PITCH + i] =
                has_token ? h[(i64)(first_token + i) * n_bundles + start + lane] : 0.0f;
        }
        __syncthreads();
        float acc[4][4] = {};
        multiply_tiles(tokens, rows, acc);
        __syncthreads();
        for (int i = 0; i < 4; i++) {
            for (int j = 0; j < 4; j++) total[i][j] += acc[i][j];
        }
    }
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < 4; j++) {
            if (own_token + i < n_tokens && own_column + j < n) {
                out[(i64)(own_token + i) * n + own_column + j] = total[i][j];
            }
        }
    }
}

#define UP_KERNEL(E, name, parts, R, TT)                                                                              \
    extern "C" __global__ void __launch_bounds__(MATVEC_WARPS* WARP) ffn_up_##parts##_##TT##_##name(                  \
        const u8* base, i64 stride, const int* slots, i64 part, int n_bundles, int n, const float* x, int n_tokens,   \
        const float* gate_bias, const float* up_bias, int kind, float threshold, int up_kind, float up_threshold,     \
        int is_aligned, float* h                                                                                      \
    ) {                                                                                                               \
        ffn_up<E, R, TT>(                                                                                             \
            base, stride, slots, part, n_bundles, n, x, n_tokens, gate_bias, up_bias, kind, threshold, up_kind,       \
            up_threshold, is_aligned, h                                                                               \
        );                                                                                                            \
    }

#define DOWN_KERNEL(E, name, TT)                                                                                      \
    extern "C" __global__ void __launch_bounds__(DOWN_THREADS* DOWN_GROUPS, TT == 1 ? 4 : 2) ffn_down_##TT##_##name( \
        const u8* base, i64 stride, const int* slots, i64 part, int n_bundles, int n, const float* h, int n_tokens,   \
        int is_aligned, float* partial                                                                                \
    ) {                                                                                                               \
        ffn_down<E, TT>(base, stride, slots, part, n_bundles, n, h, n_tokens, is_aligned, partial);                   \
    }

#define FFN_KERNELS(E, name)                                                                                          \
    UP_KERNEL(E, name, plain, 1, 1)                                                                                   \
    UP_KERNEL(E, name, plain, 1, 4)                                                                                   \
    UP_KERNEL(E, name, gated, 2, 1)                                                                                   \
    UP_KERNEL(E, name, gated, 2, 4)                                                                                   \
    DOWN_KERNEL(E, name, 1)                                                                                           \
    DOWN_KERNEL(E, name, 4)                                                                                           \
    extern "C" __global__ void __launch_bounds__(TILE_THREADS) ffn_down_many_##name(                                  \
        const u8* base, i64 stride, const int* slots, i64 part, int n_bundles, int n, const float* h, int n_tokens,   \
        float* out                                                                                                    \
    ) {                                                                                                               \
        ffn_down_many<E>(base, stride, slots, part, n_bundles, n, h, n_tokens, out);                                  \
    }

FFN_KERNELS(F32, f32)
FFN_KERNELS(F16, f16)
FFN_KERNELS(BF16, bf16)
FFN_KERNELS(Q8, q8)
FFN_KERNELS(Q4, q4)
