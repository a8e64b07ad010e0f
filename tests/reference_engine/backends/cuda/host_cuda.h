// Stand-ins for what CUDA provides, so that a host compiler can build the kernels and a test can run them: every thread
// of a block is a fibre with a stack of its own, run in turn up to its next barrier. Finds wrong indices, wrong
// arithmetic and barriers that some threads miss. Does not find races, misaligned accesses, or anything of timing.
#define HOST_BUILD
#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

struct Dimensions { unsigned x, y, z; };
static Dimensions threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class T> static T __ldcs(const T* at) { return *at; }
static int min(int a, int b) { return a < b ? a : b; }
static int max(int a, int b) { return a > b ? a : b; }
static int __popc(unsigned word) { return __builtin_popcount(word); }

static float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static float half_to_float(unsigned short bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                       : exponent == 0 ? ldexpf(fraction, -24)
                                       : ldexpf(1024 + fraction, exponent - 25);
    return bits >> 15 ? -size : size;
}

static unsigned short float_to_half(float value) {
    const unsigned short sign = signbit(value) ? 0x8000 : 0;
    const float size = fabsf(value);
    if (size != size) return sign | 0x7e00;
    if (size >= 65520.0f) return sign | 0x7c00;
    if (size == 0.0f) return sign;
    int exponent = 0;
    frexpf(size, &exponent);
    const int unit = exponent - 11 < -24 ? -24 : exponent - 11;
    const int steps = (int)nearbyintf(ldexpf(size, -unit));  // to nearest, ties to even; 2048 steps carry upwards
    return sign | (unsigned short)(unit == -24 ? steps : (unit + 24) * 1024 + steps);
}

struct Fibre {
    jmp_buf place;
    ucontext_t start;
    std::vector<char> stack = std::vector<char>(128 << 10);
    int state;  // NEW, READY, AT_WARP, AT_BLOCK, DONE
};
enum { NEW, READY, AT_WARP, AT_BLOCK, DONE };

static std::vector<Fibre*> fibres;
static std::function<void()> body;
static jmp_buf scheduler;
static unsigned current;
static unsigned long long exchanged[32][32];

static void stop(const char* why) {
    fprintf(stderr, "block (%u, %u, %u), thread %u: %s\n", blockIdx.x, blockIdx.y, blockIdx.z, current, why);
    abort();
}

static void wait_at(int barrier) {
    fibres[current]->state = barrier;
    if (!_setjmp(fibres[current]->place)) _longjmp(scheduler, 1);
}

static void enter() {
    body();
    fibres[current]->state = DONE;
    _longjmp(scheduler, 1);
}

static void resume(unsigned index) {
    current = index;
    threadIdx = {index, 0, 0};
    Fibre* fibre = fibres[index];
    const int state = fibre->state;
    fibre->state = READY;
    if (_setjmp(scheduler)) return;
    if (state == NEW) setcontext(&fibre->start);
    _longjmp(fibre->place, 1);
}

// Let threads of a group go on once all of them, but those that have ended, wait at the same barrier.
static bool release(unsigned first, unsigned last, int barrier) {
    bool any = false;
    for (unsigned i = first; i < last; i++) {
        if (fibres[i]->state != barrier && fibres[i]->state != DONE) return false;
        any |= fibres[i]->state == barrier;
        if (barrier == AT_WARP && fibres[i]->state == DONE && any) stop("a lane ended before its warp's exchange");
    }
    for (unsigned i = first; any && i < last; i++) {
        if (fibres[i]->state == barrier) fibres[i]->state = READY;
    }
    return any;
}

static void run_block() {
    for (unsigned i = 0; i < blockDim.x; i++) {
        if (i == fibres.size()) fibres.push_back(new Fibre);
        Fibre* fibre = fibres[i];
        getcontext(&fibre->start);
        fibre->start.uc_stack.ss_sp = fibre->stack.data();
        fibre->start.uc_stack.ss_size = fibre->stack.size();
        makecontext(&fibre->start, enter, 0);
        fibre->state = NEW;
    }
    for (bool goes_on = true; goes_on;) {
        goes_on = false;
        for (unsigned i = 0; i < blockDim.x; i++) {
            if (fibres[i]->state <= READY) {
                resume(i);
                goes_on = true;
            }
        }
        for (unsigned warp = 0; warp < blockDim.x; warp += 32) goes_on |= release(warp, warp + 32, AT_WARP);
        goes_on |= release(0, blockDim.x, AT_BLOCK);
    }
    for (unsigned i = 0; i < blockDim.x; i++) {
        current = i;
        if (fibres[i]->state != DONE) stop("waits at a barrier that others do not reach");
    }
}

static void __syncthreads() { wait_at(AT_BLOCK); }

template <class T> static T __shfl_xor_sync(unsigned, T value, int mask) {
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    memcpy(&exchanged[warp][lane], &value, sizeof value);
    wait_at(AT_WARP);
    memcpy(&value, &exchanged[warp][lane ^ mask], sizeof value);
    wait_at(AT_WARP);
    return value;
}

static unsigned __ballot_sync(unsigned, int predicate) {
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    exchanged[warp][lane] = predicate != 0;
    wait_at(AT_WARP);
    unsigned votes = 0;
    for (unsigned i = 0; i < 32; i++) votes |= (unsigned)exchanged[warp][i] << i;
    wait_at(AT_WARP);
    return votes;
}

template <class... A, size_t... I>
static void launch(void (*kernel)(A...), const unsigned* grid, unsigned n_threads, void** arguments,
                   std::index_sequence<I...>) {
    body = [&] { kernel(*(A*)arguments[I]...); };
    blockDim = {n_threads, 1, 1};
    gridDim = {grid[0], grid[1], grid[2]};
    if (n_threads % 32 || n_threads > 1024 || grid[1] > 65535 || grid[2] > 65535) stop("no such launch");
    for (blockIdx.z = 0; blockIdx.z < grid[2]; blockIdx.z++)
        for (blockIdx.y = 0; blockIdx.y < grid[1]; blockIdx.y++)
            for (blockIdx.x = 0; blockIdx.x < grid[0]; blockIdx.x++) run_block();
}

template <class... A>
static void launch(void (*kernel)(A...), const unsigned* grid, unsigned n_threads, void** arguments) {
    launch(kernel, grid, n_threads, arguments, std::index_sequence_for<A...>());
}

#define EXPORT(name)                                                                                  \
    extern "C" void launch_##name(const unsigned* grid, unsigned n_threads, void** arguments) {      \
        launch(name, grid, n_threads, arguments);                                                    \
    }
