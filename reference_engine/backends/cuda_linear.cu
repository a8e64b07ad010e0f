// Products with stored matrices: a few tokens at memory bandwidth, many tokens by tiles, and the lookup of rows.

#define MATVEC_WARPS 8

// Dot products of R stored rows with TT tokens, by one warp; every lane gets the sums, `n_tokens` <= TT of them.
// x is [n_tokens, n]. Quantised rows are always aligned. The order of the sum depends on n and alignment alone.
template <int E, int R, int TT>
__device__ __forceinline__ void dot_rows(
    const u8* const* rows, int n, const float* x, int n_tokens, int is_aligned, float (*sums)[TT]
) {
    typedef Stored<E> S;
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int r = 0; r < R; r++) {
#pragma unroll
        for (int t = 0; t < TT; t++) sums[r][t] = 0.0f;
    }
    if (S::SCALED || is_aligned) {
        const i64 offset = S::values_offset(n);
        const int n_units = n / S::N;
#pragma unroll 4
        for (int unit = lane; unit < n_units; unit += WARP) {
            typename S::Raw raw[R];
#pragma unroll
            for (int r = 0; r < R; r++) raw[r] = load_unit<E>(rows[r], offset, unit);
            float4 xs[TT][S::N / 4];
#pragma unroll
            for (int t = 0; t < TT; t++) {
#pragma unroll
                for (int k = 0; k < S::N / 4; k++) {
                    xs[t][k] = t < n_tokens ? *(const float4*)(x + (i64)t * n + S::column(unit, k))
                                            : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                }
            }
#pragma unroll
            for (int r = 0; r < R; r++) {
                float w[S::N], scale[2];
                S::unpack(raw[r], w);
                S::halves(rows[r], unit, scale);
#pragma unroll
                for (int t = 0; t < TT; t++) {
                    float half[2] = {0.0f, 0.0f};
#pragma unroll
                    for (int k = 0; k < S::N / 4; k++) {
                        float* h = half + (2 * k >= S::N / 4);
                        *h = fmaf(w[4 * k], xs[t][k].x, *h);
                        *h = fmaf(w[4 * k + 1], xs[t][k].y, *h);
                        *h = fmaf(w[4 * k + 2], xs[t][k].z, *h);
                        *h = fmaf(w[4 * k + 3], xs[t][k].w, *h);
                    }
                    sums[r][t] += S::SCALED ? fmaf(half[0], scale[0], half[1] * scale[1]) : half[0] + half[1];
                }
            }
        }
    } else {
        for (int column = lane; column < n; column += WARP) {
#pragma unroll
            for (int r = 0; r < R; r++) {
                const float w = Weight<E>::at(rows[r], n, column);
#pragma unroll
                for (int t = 0; t < TT; t++) {
                    if (t < n_tokens) sums[r][t] = fmaf(w, x[(i64)t * n + column], sums[r][t]);
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
#pragma unroll
        for (int t = 0; t < TT; t++) sums[r][t] = warp_sum(sums[r][t]);
    }
}

// out [n_tokens, n_rows] = x @ matrix.T + bias, for a few tokens: a warp takes two rows, block row y takes TT tokens.
template <int E, int TT>
__device__ void matvec(
    const u8* base, i64 stride, int n_rows, int n, const float* x, int n_tokens, const float* bias, int is_aligned,
    float* out
) {
    const int first = 2 * (blockIdx.x * MATVEC_WARPS + threadIdx.x / WARP);
    const int token = blockIdx.y * TT;
    if (first >= n_rows) return;
    const bool has_second = first + 1 < n_rows;
    const u8* rows[2] = {base + first * stride, base + (first + has_second) * stride};
    const int count = min(TT, n_tokens - token);
    float sums[2][TT];
    dot_rows<E, 2, TT>(rows, n, x + (i64)token * n, count, is_aligned, sums);
    if (threadIdx.x % WARP) return;
#pragma unroll
    for (int t = 0; t < TT; t++) {
        if (t < count) {
            float* to = out + (i64)(token + t) * n_rows + first;
            to[0] = sums[0][t] + (bias ? bias[first] : 0.0f);
            if (has_second) to[1] = sums[1][t] + (bias ? bias[first + 1] : 0.0f);
        }
    }
}

#define TILE 64        // rows, tokens and columns of a tile
#define TILE_PITCH 68  // floats from one tile row to the next: a multiple of 4 that spreads over the banks
#define TILE_THREADS 256

// acc [4][4] += tokens^T rows, over the TILE steps of two tiles [step][TILE].
__device__ __forceinline__ void multiply_tiles(const float* tokens, const float* rows, float (*acc)[4]) {
    const int row = threadIdx.x % 16 * 4, token = threadIdx.x / 16 * 4;
#pragma unroll 8
    for (int step = 0; step < TILE; step++) {
        const float4 a = *(const float4*)(tokens + step * TILE_PITCH + token);
        const float4 b = *(const float4*)(rows + step * TILE_PITCH + row);
        const float as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int j = 0; j < 4; j++) acc[i][j] = fmaf(as[i], bs[j], acc[i][j]);
        }
    }
}

// out [n_tokens, n_rows] = x @ rows.T + bias, for many tokens; row i is at `row_at(i)`, `part` bytes in.
template <int E>
__device__ void matmul(
    const u8* base, i64 stride, const int* slots, i64 part, int n_rows, int n, const float* x, int n_tokens,
    const float* bias, float* out
) {
    __shared__ float4 storage[2 * TILE * TILE_PITCH / 4];
    float* tokens = (float*)storage;
    float* rows = tokens + TILE * TILE_PITCH;
    const int first_row = blockIdx.x * TILE, first_token = blockIdx.y * TILE;
    const int step = threadIdx.x % TILE;
    float acc[4][4] = {};
    for (int start = 0; start < n; start += TILE) {
        const int column = start + step;
        for (int i = threadIdx.x / TILE; i < TILE; i += TILE_THREADS / TILE) {
            const bool has_row = first_row + i < n_rows && column < n;
            const bool has_token = first_token + i < n_tokens && column < n;
            rows[step * TILE_PITCH + i] =
                has_row ? Weight<E>::at(row_at(base, stride, slots, first_row + i) + part, n, column) : 0.0f;
            tokens[step * TILE_PITCH + i] = has_token ? x[(i64)(first_token + i) * n + column] : 0.0f;
        }
        __syncthreads();
        multiply_tiles(tokens, rows, acc);
        __syncthreads();
    }
    const int row = first_row + threadIdx.x % 16 * 4, token = first_token + threadIdx.x / 16 * 4;
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < 4; j++) {
            if (token + i < n_tokens && row + j < n_rows) {
                out[(i64)(token + i) * n_rows + row + j] = acc[i][j] + (bias ? bias[row + j] : 0.0f);
            }
        }
    }
}

// out [n_ids, n]: decoded rows; a block takes one id.
template <int E>
__device__ void decode_rows(const u8* base, i64 stride, const int* ids, int n, float* out) {
    const u8* row = row_at(base, stride, ids, blockIdx.x);
    for (int column = threadIdx.x; column < n; column += blockDim.x) {
        out[(i64)blockIdx.x * n + column] = Weight<E>::at(row, n, column);
    }
}

#define LINEAR_KERNELS(E, name)                                                                                       \
    extern "C" __global__ void __launch_bounds__(MATVEC_WARPS* WARP) matvec_1_##name(                                 \
        const u8* base, i64 stride, int n_rows, int n, const float* x, int n_tokens, const float* bias,               \
        int is_aligned, float* out                                                                                    \
    ) {                                                                                                               \
        matvec<E, 1>(base, stride, n_rows, n, x, n_tokens, bias, is_aligned, out);                                    \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(MATVEC_WARPS* WARP) matvec_4_##name(                                 \
        const u8* base, i64 stride, int n_rows, int n, const float* x, int n_tokens, const float* bias,               \
        int is_aligned, float* out                                                                                    \
    ) {                                                                                                               \
        matvec<E, 4>(base, stride, n_rows, n, x, n_tokens, bias, is_aligned, out);                                    \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(TILE_THREADS) matmul_##name(                                         \
        const u8* base, i64 stride, const int* slots, i64 part, int n_rows, int n, const float* x, int n_tokens,      \
        const float* bias, float* out                                                                                 \
    ) {                                                                                                               \
        matmul<E>(base, stride, slots, part, n_rows, n, x, n_tokens, bias, out);                                      \
    }                                                                                                                 \
    extern "C" __global__ void decode_rows_##name(const u8* base, i64 stride, const int* ids, int n, float* out) {    \
        decode_rows<E>(base, stride, ids, n, out);                                                                    \
    }

LINEAR_KERNELS(F32, f32)
LINEAR_KERNELS(F16, f16)
LINEAR_KERNELS(BF16, bf16)
LINEAR_KERNELS(Q8, q8)
LINEAR_KERNELS(Q4, q4)
