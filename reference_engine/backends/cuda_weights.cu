// How stored rows of weights become numbers (SPEC.md section "Encodings"; flashfmt/encodings.py).
//
// All .cu files of this folder are one translation unit, joined in the order that cupy_sources.py gives. They include
// nothing, so that NVRTC needs no headers; a host compiler can build them too, given stand-ins for what CUDA provides.
//
// A row is read in units: 16 bytes of a plain row or of q8, 8 bytes of q4 (so that a unit of either is 16 weights).
// Consecutive lanes read consecutive units. `n` is always the number of weights a row.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

#define WARP 32
#define ALL_LANES 0xffffffffu
#define INFINITE __uint_as_float(0x7f800000u)  // NVRTC has no INFINITY

#ifndef HOST_BUILD
__device__ __forceinline__ float half_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ __forceinline__ u16 float_to_half(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

enum { F32 = 0, F16 = 1, BF16 = 2, Q8 = 3, Q4 = 4 };

__device__ __forceinline__ i64 round_up(i64 value, i64 multiple) { return (value + multiple - 1) / multiple * multiple; }

// `Stored<E>`: N weights in a unit of BYTES bytes; `column(unit, k)` is the first of the four weights 4k..4k+3 of a
// unit; `halves(row, unit, s)` gives the scales of the first and the second half of a unit.
template <int E> struct Stored;

struct Plain {
    static const bool SCALED = false;
    __device__ static i64 values_offset(int) { return 0; }
    __device__ static void halves(const u8*, int, float* s) { s[0] = s[1] = 1.0f; }
};

template <> struct Stored<F32> : Plain {
    typedef float4 Raw;
    typedef float Value;
    static const int N = 4;
    static const int BYTES = 16;
    __device__ static int column(int unit, int) { return 4 * unit; }
    __device__ static void unpack(Raw r, float* w) { w[0] = r.x; w[1] = r.y; w[2] = r.z; w[3] = r.w; }
    __device__ static float one(Value v) { return v; }
};

template <> struct Stored<F16> : Plain {
    typedef uint4 Raw;
    typedef u16 Value;
    static const int N = 8;
    static const int BYTES = 16;
    __device__ static int column(int unit, int k) { return 8 * unit + 4 * k; }
    __device__ static void unpack(Raw r, float* w) {
        const u32 words[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            w[2 * i] = half_to_float((u16)(words[i] & 0xffffu));
            w[2 * i + 1] = half_to_float((u16)(words[i] >> 16));
        }
    }
    __device__ static float one(Value v) { return half_to_float(v); }
};

template <> struct Stored<BF16> : Plain {
    typedef uint4 Raw;
    typedef u16 Value;
    static const int N = 8;
    static const int BYTES = 16;
    __device__ static int column(int unit, int k) { return 8 * unit + 4 * k; }
    __device__ static void unpack(Raw r, float* w) {
        const u32 words[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            w[2 * i] = __uint_as_float(words[i] << 16);
            w[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
        }
    }
    __device__ static float one(Value v) { return __uint_as_float((u32)v << 16); }
};

// One float32 scale, zeros to 64 bytes, n int8.
template <> struct Stored<Q8> {
    typedef uint4 Raw;
    typedef u8 Value;
    static const bool SCALED = true;
    static const int N = 16;
    static const int BYTES = 16;
    __device__ static i64 values_offset(int) { return 64; }
    __device__ static int column(int unit, int k) { return 16 * unit + 4 * k; }
    __device__ static void halves(const u8* row, int, float* s) { s[0] = s[1] = *(const float*)row; }
    __device__ static void unpack(Raw r, float* w) {
        const u32 words[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int b = 0; b < 4; b++) w[4 * i + b] = (float)(signed char)(words[i] >> (8 * b));
        }
    }
};

// n/32 float16 scales, zeros to a multiple of 64 bytes, then blocks of 32 bytes: low nibbles are weights 0..31 of a
// block of 64, high nibbles 32..63. A unit is a quarter of a block: 8 weights of either half.
template <> struct Stored<Q4> {
    typedef uint2 Raw;
    typedef u8 Value;
    static const bool SCALED = true;
    static const int N = 16;
    static const int BYTES = 8;
    __device__ static i64 values_offset(int n) { return round_up(n / 16, 64); }
    __device__ static int column(int unit, int k) { return unit / 4 * 64 + unit % 4 * 8 + k % 2 * 4 + k / 2 * 32; }
    __device__ static void halves(const u8* row, int unit, float* s) {
        const u32 both = ((const u32*)row)[unit / 4];
        s[0] = half_to_float((u16)(both & 0xffffu));
        s[1] = half_to_float((u16)(both >> 16));
    }
    // 2^23 + nibble is exact in float32, and its lowest mantissa bits are the nibble.
    __device__ static float nibble(u32 word, int shift) {
        return __uint_as_float(((word >> shift) & 15u) | 0x4b000000u) - 8388616.0f;
    }
    __device__ static void unpack(Raw r, float* w) {
#pragma unroll
        for (int b = 0; b < 4; b++) {
            w[b] = nibble(r.x, 8 * b);
            w[4 + b] = nibble(r.y, 8 * b);
            w[8 + b] = nibble(r.x, 8 * b + 4);
            w[12 + b] = nibble(r.y, 8 * b + 4);
        }
    }
};

// Weights are read once: they must not drive the activations out of the caches.
template <int E> __device__ __forceinline__ typename Stored<E>::Raw load_unit(const u8* row, i64 offset, int unit) {
    return __ldcs((const typename Stored<E>::Raw*)(row + offset) + unit);
}

// One decoded weight; plain rows may have any alignment that suits their values.
template <int E> struct Weight {
    __device__ static float at(const u8* row, int, int column) {
        return Stored<E>::one(((const typename Stored<E>::Value*)row)[column]);
    }
};
template <> struct Weight<Q8> {
    __device__ static float at(const u8* row, int n, int column) {
        return (float)(signed char)row[Stored<Q8>::values_offset(n) + column] * *(const float*)row;
    }
};
template <> struct Weight<Q4> {
    __device__ static float at(const u8* row, int n, int column) {
        const u32 pair = row[Stored<Q4>::values_offset(n) + column / 64 * 32 + column % 32];
        const float scale = half_to_float(((const u16*)row)[column / 32]);
        return Stored<Q4>::nibble(pair, column % 64 < 32 ? 0 : 4) * scale;
    }
};

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int step = WARP / 2; step; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}

// The row of bundle or matrix row `i`: the slots say where, or rows follow each other.
__device__ __forceinline__ const u8* row_at(const u8* base, i64 stride, const int* slots, int i) {
    return base + (slots ? slots[i] : i) * stride;
}
