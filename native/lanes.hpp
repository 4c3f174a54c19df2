// SIMD lanes as arithmetic: GCC's and Clang's vector extensions, one register wide.
//
// Every operation is IEEE 754's on each lane and nothing is contracted or reordered, so a lane
// computes what scalar code of the same order computes, bit for bit. Compile with
// -ffp-contract=off and without -ffast-math.
#pragma once

#include <cstdint>
#include <cstring>
#include <immintrin.h>

#ifdef __FAST_MATH__
#error "-ffast-math changes results"
#endif

namespace pi {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Ints __attribute__((vector_size(LANES * sizeof(int32_t))));

inline Floats floats(float value) { return Floats{} + value; }
inline Ints ints(int32_t value) { return Ints{} + value; }
inline Floats to_floats(Ints value) { return __builtin_convertvector(value, Floats); }

template <class To, class From> inline To bits_as(From value) {
    To result;
    static_assert(sizeof result == sizeof value);
    memcpy(&result, &value, sizeof result);
    return result;
}

inline Floats absolute(Floats value) {
    return bits_as<Floats>(bits_as<Ints>(value) & 0x7fffffff);
}

inline Floats square_root(Floats value) {
#ifdef __AVX512F__
    return (Floats)_mm512_sqrt_ps((__m512)value);
#else
    return (Floats)_mm256_sqrt_ps((__m256)value);
#endif
}

// a < b ? a : b and a > b ? a : b, in one instruction of exactly that meaning.
inline Floats lesser(Floats a, Floats b) {
#ifdef __AVX512F__
    return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#endif
}
inline Floats greater(Floats a, Floats b) {
#ifdef __AVX512F__
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#endif
}

// ggml's nearest_int: adds 1.5 * 2^23, whose sum is rounded to an integer by the addition itself.
inline Ints nearest(Floats value) {
    return (bits_as<Ints>(value + 12582912.f) & 0x007fffff) - 0x00400000;
}
inline int32_t nearest(float value) {
    return (bits_as<int32_t>(value + 12582912.f) & 0x007fffff) - 0x00400000;
}

// The same as a float and clamped, in fewer steps; equal to the above while |value| is at most
// NEAREST_LIMIT, beyond which ggml's bits wrap around.
constexpr float NEAREST_LIMIT = 4194303.f;
inline Floats nearest_float(Floats value, float low, float high) {
    const Floats rounded = (value + 12582912.f) - 12582912.f;
    return greater(lesser(rounded, floats(high)), floats(low));
}

inline Ints clamp(Ints value, int32_t low, int32_t high) {
    value = value < high ? value : ints(high);
    return value > low ? value : ints(low);
}

// Whether any lane of a comparison's result is set.
inline bool any(Ints mask) {
    bool found = false;
    for (int lane = 0; lane < LANES; ++lane) found |= mask[lane] != 0;
    return found;
}

inline uint16_t to_half(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
inline float from_half(uint16_t bits) { return _cvtsh_ss(bits); }

}  // namespace pi
