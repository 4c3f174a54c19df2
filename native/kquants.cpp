// ggml's K-quants and iq4 with the bytes of ggml, many sub-blocks at once.
//
// Compiled once for each instruction set (see hatch_build.py). A block whose levels ggml would take
// from its search, because a sub-block's final scale is zero, goes to ggml itself: it is rare, and
// the search here keeps no levels. Block layouts: ggml-common.h of llama.cpp 0c1e57098.

#include <algorithm>
#include <cmath>

#include "searches.hpp"

namespace pi {

constexpr int QK_K = 256;
// ggml's quantize_q4_K and its like.
using Reference = size_t (*)(const float *x, void *y, int64_t rows, int64_t row_elements,
                             const float *importance);

inline bool finite_half(uint16_t bits) { return (bits & 0x7c00) != 0x7c00; }

// The scales of one block: what a sub-block's levels are made with, and whether all are usable.
struct Steps {
    float *step, *offset;  // level = round((x + offset) / step)

    bool set(int sub, float by, float from) const {
        step[sub] = by;
        offset[sub] = from;
        return by != 0;
    }
};

// q4_K and q5_K: scales and minimums of 6 bits, eight of each packed into 12 bytes.
struct SixBitScales {
    static bool write(const float *scales, const float *minimums, uint8_t *d, uint8_t *packed,
                      Steps steps) {
        const float largest = std::max(0.f, *std::max_element(scales, scales + 8));
        const float deepest = std::max(0.f, *std::max_element(minimums, minimums + 8));
        const float inverse = largest > 0 ? 63.f / largest : 0.f;
        const float inverse_min = deepest > 0 ? 63.f / deepest : 0.f;
        const uint16_t halves[2] = {to_half(largest / 63.f), to_half(deepest / 63.f)};
        memcpy(d, halves, sizeof halves);
        const float unit = from_half(halves[0]), unit_min = from_half(halves[1]);
        bool whole = finite_half(halves[0]) && finite_half(halves[1]);
        for (int j = 0; j < 8; ++j) {
            const int s = std::min<uint8_t>(63, nearest(inverse * scales[j]));
            const int m = std::min<uint8_t>(63, nearest(inverse_min * minimums[j]));
            if (j < 4) {
                packed[j] = s;
                packed[j + 4] = m;
            } else {
                packed[j + 4] = (s & 0xf) | (m & 0xf) << 4;
                packed[j - 4] |= s >> 4 << 6;
                packed[j] |= m >> 4 << 6;
            }
            whole &= steps.set(j, unit * s, unit_min * m);
        }
        return whole;
    }
};

template <int Top> Ints level_above(Floats x, Floats step, Floats offset) {
    return clamp(nearest((x + offset) / step), 0, Top);
}

template <int Top> Ints level_around(Floats x, Floats step) {
    return clamp(nearest(x / step), -Top, Top - 1) + Top;
}

// Weights, element by element. Those of q4_K and q5_K: the root mean square plus the magnitude.
template <int Size> void magnitude_weights(const Floats *x, Floats *weight) {
    Floats sum = floats(0);
    for (int i = 0; i < Size; ++i) sum += x[i] * x[i];
    const Floats typical = square_root(sum / float(Size));
    for (int i = 0; i < Size; ++i) weight[i] = typical + absolute(x[i]);
}

// Those of q6_K and iq4.
template <int Size> void square_weights(const Floats *x, Floats *weight) {
    for (int i = 0; i < Size; ++i) weight[i] = x[i] * x[i];
}

struct Q4K {
    static constexpr int BLOCK = QK_K, SUB = 32, BYTES = 144;
    static void search(const Floats *x, Floats &scale, Floats &minimum) {
        Floats weight[SUB];
        magnitude_weights<SUB>(x, weight);
        search_with_minimum<SUB, 15, 20, false>(x, weight, -1.f, scale, minimum);
    }
    static bool scales(const float *scale, const float *minimum, uint8_t *y, Steps steps) {
        return SixBitScales::write(scale, minimum, y, y + 4, steps);
    }
    static Ints level(Floats x, Floats step, Floats offset) {
        return level_above<15>(x, step, offset);
    }
    static void pack(const uint8_t *level, uint8_t *y) {
        uint8_t *low = y + 16;
        for (int j = 0; j < QK_K; j += 64, low += 32)
            for (int i = 0; i < 32; ++i) low[i] = level[j + i] | level[j + i + 32] << 4;
    }
};

struct Q5K {
    static constexpr int BLOCK = QK_K, SUB = 32, BYTES = 176;
    static void search(const Floats *x, Floats &scale, Floats &minimum) {
        Floats weight[SUB];
        magnitude_weights<SUB>(x, weight);
        search_with_minimum<SUB, 31, 15, false>(x, weight, -0.5f, scale, minimum);
    }
    static bool scales(const float *scale, const float *minimum, uint8_t *y, Steps steps) {
        return SixBitScales::write(scale, minimum, y, y + 4, steps);
    }
    static Ints level(Floats x, Floats step, Floats offset) {
        return level_above<31>(x, step, offset);
    }
    static void pack(const uint8_t *level, uint8_t *y) {
        uint8_t *high = y + 16, *low = y + 48;
        memset(high, 0, QK_K / 8);
        for (int j = 0; j < QK_K; j += 64, low += 32)
            for (int i = 0; i < 32; ++i) {
                const int first = level[j + i], second = level[j + i + 32];
                low[i] = (first & 15) | (second & 15) << 4;
                high[i] |= (first >> 4 | second >> 4 << 1) << (j / 32);
            }
    }
};

struct Q2K {
    static constexpr int BLOCK = QK_K, SUB = 16, BYTES = 84;
    static void search(const Floats *x, Floats &scale, Floats &minimum) {
        Floats weight[SUB];
        for (int i = 0; i < SUB; ++i) weight[i] = absolute(x[i]);
        search_with_minimum<SUB, 3, 15, true>(x, weight, -0.5f, scale, minimum);
    }
    static bool scales(const float *scale, const float *minimum, uint8_t *y, Steps steps) {
        const float largest = std::max(0.f, *std::max_element(scale, scale + 16));
        const float deepest = std::max(0.f, *std::max_element(minimum, minimum + 16));
        const float inverse = 15.f / largest, inverse_min = 15.f / deepest;
        const uint16_t halves[2] = {to_half(largest > 0 ? largest / 15.f : 0.f),
                                    to_half(deepest > 0 ? deepest / 15.f : 0.f)};
        memcpy(y + 80, halves, sizeof halves);
        const float unit = from_half(halves[0]), unit_min = from_half(halves[1]);
        bool whole = finite_half(halves[0]) && finite_half(halves[1]);
        for (int j = 0; j < 16; ++j) {
            uint8_t both = largest > 0 ? nearest(inverse * scale[j]) : 0;
            if (deepest > 0) both |= nearest(inverse_min * minimum[j]) << 4;
            y[j] = both;
            whole &= steps.set(j, unit * (both & 15), unit_min * (both >> 4));
        }
        return whole;
    }
    static Ints level(Floats x, Floats step, Floats offset) {
        return level_above<3>(x, step, offset);
    }
    static void pack(const uint8_t *level, uint8_t *y) {
        for (int j = 0; j < QK_K; j += 128)
            for (int i = 0; i < 32; ++i) {
                const uint8_t *l = level + j + i;
                y[16 + j / 4 + i] = l[0] | l[32] << 2 | l[64] << 4 | l[96] << 6;
            }
    }
};

// The scale of largest magnitude, the first of equals, with its sign.
inline float extreme_scale(const float *scale, int count) {
    float magnitude = 0, found = 0;
    for (int j = 0; j < count; ++j)
        if (std::fabs(scale[j]) > magnitude) {
            magnitude = std::fabs(scale[j]);
            found = scale[j];
        }
    return found;
}

struct Q6K {
    static constexpr int BLOCK = QK_K, SUB = 16, BYTES = 210;
    static void search(const Floats *x, Floats &scale, Floats &minimum) {
        Floats weight[SUB];
        square_weights<SUB>(x, weight);
        scale = search_symmetric<SUB, 32>(x, weight);
        minimum = floats(0);
    }
    static bool scales(const float *scale, const float *, uint8_t *y, Steps steps) {
        const float extreme = extreme_scale(scale, 16);
        if (std::fabs(extreme) < SMALLEST_BLOCK) return false;
        const float inverse = -128.f / extreme;
        const uint16_t half = to_half(1 / inverse);
        memcpy(y + 208, &half, sizeof half);
        bool whole = finite_half(half);
        for (int j = 0; j < 16; ++j) {
            const int8_t s = std::min(127, nearest(inverse * scale[j]));
            y[192 + j] = uint8_t(s);
            whole &= steps.set(j, from_half(half) * s, 0);
        }
        return whole;
    }
    static Ints level(Floats x, Floats step, Floats) { return level_around<32>(x, step); }
    static void pack(const uint8_t *level, uint8_t *y) {
        uint8_t *low = y, *high = y + 128;
        for (int j = 0; j < QK_K; j += 128, low += 64, high += 32)
            for (int i = 0; i < 32; ++i) {
                const uint8_t *l = level + j + i;
                low[i] = (l[0] & 15) | l[64] << 4;
                low[i + 32] = (l[32] & 15) | l[96] << 4;
                high[i] = l[0] >> 4 | l[32] >> 4 << 2 | l[64] >> 4 << 4 | l[96] >> 4 << 6;
            }
    }
};

struct Q3K {
    static constexpr int BLOCK = QK_K, SUB = 16, BYTES = 110;
    static void search(const Floats *x, Floats &scale, Floats &minimum) {
        scale = search_by_exchange<SUB, 4>(x);
        minimum = floats(0);
    }
    static bool scales(const float *scale, const float *, uint8_t *y, Steps steps) {
        const float extreme = extreme_scale(scale, 16);
        if (extreme == 0) return false;
        const float inverse = -32.f / extreme;
        const uint16_t half = to_half(1 / inverse);
        uint8_t *packed = y + 96;
        memcpy(y + 108, &half, sizeof half);
        memset(packed, 0, 12);
        bool whole = finite_half(half);
        for (int j = 0; j < 16; ++j) {
            const int8_t rounded = nearest(inverse * scale[j]);
            const int s = std::clamp<int>(rounded, -32, 31) + 32;
            packed[j % 8] |= (s & 15) << (j / 8 * 4);
            packed[8 + j % 4] |= s >> 4 << (j / 4 * 2);
            whole &= steps.set(j, from_half(half) * (s - 32), 0);
        }
        return whole;
    }
    static Ints level(Floats x, Floats step, Floats) { return level_around<4>(x, step); }
    static void pack(const uint8_t *level, uint8_t *y) {
        memset(y, 0, QK_K / 8);
        for (int j = 0; j < QK_K; ++j) y[j % 32] |= (level[j] > 3) << (j / 32);
        for (int j = 0; j < QK_K; j += 128)
            for (int i = 0; i < 32; ++i) {
                const uint8_t *l = level + j + i;
                y[32 + j / 4 + i] = (l[0] & 3) | (l[32] & 3) << 2 | (l[64] & 3) << 4 | l[96] << 6;
            }
    }
};

// iq4_xs and iq4_nl: levels are indices of unequal steps; ``step`` is the inverse of the scale.
inline void pack_iq4(const uint8_t *level, uint8_t *y, int count) {
    for (int j = 0; j < count; j += 32)
        for (int i = 0; i < 16; ++i) y[j / 2 + i] = level[j + i] | level[j + i + 16] << 4;
}

struct IQ4XS {
    static constexpr int BLOCK = QK_K, SUB = 32, BYTES = 136;
    static void search(const Floats *x, Floats &scale, Floats &minimum) {
        Floats weight[SUB];
        square_weights<SUB>(x, weight);
        scale = search_iq4<SUB>(x, weight);
        minimum = floats(0);
    }
    static bool scales(const float *scale, const float *, uint8_t *y, Steps steps) {
        const float unit = -extreme_scale(scale, 8) / 32;
        const float inverse = unit != 0 ? 1 / unit : 0.f;
        const uint16_t half = to_half(unit);
        uint16_t high = 0;
        memset(y + 4, 0, 4);
        for (int j = 0; j < 8; ++j) {
            const int s = std::clamp(nearest(inverse * scale[j]), -32, 31);
            const float step = unit * s;
            steps.set(j, step != 0 ? 1 / step : 0.f, 0);
            y[4 + j / 2] |= ((s + 32) & 15) << (j % 2 * 4);
            high |= (s + 32) >> 4 << (2 * j);
        }
        memcpy(y, &half, sizeof half);
        memcpy(y + 2, &high, sizeof high);
        return finite_half(half);
    }
    static Ints level(Floats x, Floats step, Floats) { return iq4_index(step * x); }
    static void pack(const uint8_t *level, uint8_t *y) { pack_iq4(level, y + 8, BLOCK); }
};

struct IQ4NL {
    static constexpr int BLOCK = 32, SUB = 32, BYTES = 18;
    static void search(const Floats *x, Floats &scale, Floats &minimum) {
        IQ4XS::search(x, scale, minimum);
    }
    static bool scales(const float *scale, const float *, uint8_t *y, Steps steps) {
        const uint16_t half = to_half(scale[0]);
        memcpy(y, &half, sizeof half);
        steps.set(0, scale[0] != 0 ? 1 / scale[0] : 0.f, 0);
        return finite_half(half);
    }
    static Ints level(Floats x, Floats step, Floats) { return iq4_index(step * x); }
    static void pack(const uint8_t *level, uint8_t *y) { pack_iq4(level, y + 2, BLOCK); }
};

// A group of blocks fills whole registers: element i of every sub-block stands in column i.
template <class Kind> struct Group {
    static constexpr int SUBS = Kind::BLOCK / Kind::SUB;  // of one block
    static constexpr int BLOCKS = SUBS < LANES ? LANES / SUBS : 1;
    static constexpr int REGISTERS = BLOCKS * SUBS / LANES;
    static constexpr int ELEMENTS = BLOCKS * Kind::BLOCK;

    Floats column[REGISTERS][Kind::SUB];
    alignas(64) float scale[BLOCKS * SUBS], minimum[BLOCKS * SUBS];
    alignas(64) float step[BLOCKS * SUBS], offset[BLOCKS * SUBS];
    uint8_t level[ELEMENTS];

    void search(const float *x) {
        for (int r = 0; r < REGISTERS; ++r) {
            float turned[Kind::SUB * LANES];
            for (int lane = 0; lane < LANES; ++lane)
                for (int i = 0; i < Kind::SUB; ++i)
                    turned[i * LANES + lane] = x[(r * LANES + lane) * Kind::SUB + i];
            memcpy(column[r], turned, sizeof turned);
            Floats s, m;
            Kind::search(column[r], s, m);
            memcpy(scale + r * LANES, &s, sizeof s);
            memcpy(minimum + r * LANES, &m, sizeof m);
        }
    }

    bool write_scales(int block, uint8_t *y) {
        const int first = block * SUBS;
        for (int j = first; j < first + SUBS; ++j)
            if (std::isnan(scale[j])) return false;
        return Kind::scales(scale + first, minimum + first, y, {step + first, offset + first});
    }

    void find_levels() {
        for (int r = 0; r < REGISTERS; ++r) {
            Floats by, from;
            int32_t turned[Kind::SUB * LANES];
            memcpy(&by, step + r * LANES, sizeof by);
            memcpy(&from, offset + r * LANES, sizeof from);
            for (int i = 0; i < Kind::SUB; ++i) {
                const Ints found = Kind::level(column[r][i], by, from);
                memcpy(turned + i * LANES, &found, sizeof found);
            }
            for (int lane = 0; lane < LANES; ++lane)
                for (int i = 0; i < Kind::SUB; ++i)
                    level[(r * LANES + lane) * Kind::SUB + i] = uint8_t(turned[i * LANES + lane]);
        }
    }
};

// ``blocks`` blocks of x into y; how many of them ggml's own ``reference`` made.
template <class Kind>
int64_t quantize(const float *x, uint8_t *y, int64_t blocks, Reference reference) {
    using G = Group<Kind>;
    int64_t handed = 0;
    for (int64_t first = 0; first < blocks; first += G::BLOCKS) {
        const int count = int(std::min<int64_t>(G::BLOCKS, blocks - first));
        const float *from = x + first * Kind::BLOCK;
        uint8_t *to = y + first * Kind::BYTES;
        G group;
        float padded[G::ELEMENTS];
        if (count < G::BLOCKS) {
            memset(padded, 0, sizeof padded);
            memcpy(padded, from, count * Kind::BLOCK * sizeof(float));
        }
        group.search(count < G::BLOCKS ? padded : from);
        bool whole[G::BLOCKS];
        memset(group.step, 0, sizeof group.step);
        memset(group.offset, 0, sizeof group.offset);
        for (int b = 0; b < count; ++b) whole[b] = group.write_scales(b, to + b * Kind::BYTES);
        group.find_levels();
        for (int b = 0; b < count; ++b) {
            uint8_t *block = to + b * Kind::BYTES;
            if (whole[b]) {
                Kind::pack(group.level + b * Kind::BLOCK, block);
            } else {
                reference(from + b * Kind::BLOCK, block, 1, Kind::BLOCK, nullptr);
                ++handed;
            }
        }
    }
    return handed;
}

}  // namespace pi

extern "C" {

int pi_lanes() { return pi::LANES; }

// Whether this processor runs what this file was compiled to.
int pi_supported() {
#ifdef __AVX512F__
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("f16c");
#else
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
#endif
}

#define PI_QUANTIZER(name, Kind)                                                             \
    int64_t pi_quantize_##name(const float *x, uint8_t *y, int64_t elements,                 \
                               pi::Reference reference) {                                    \
        return pi::quantize<pi::Kind>(x, y, elements / pi::Kind::BLOCK, reference);          \
    }

PI_QUANTIZER(q2_k, Q2K)
PI_QUANTIZER(q3_k, Q3K)
PI_QUANTIZER(q4_k, Q4K)
PI_QUANTIZER(q5_k, Q5K)
PI_QUANTIZER(q6_k, Q6K)
PI_QUANTIZER(iq4_nl, IQ4NL)
PI_QUANTIZER(iq4_xs, IQ4XS)
}
