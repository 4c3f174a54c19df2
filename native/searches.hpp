// The searches by which ggml finds a sub-block's scale, each lane searching a sub-block of its own.
//
// They are ggml-quants.c's (llama.cpp 0c1e57098) make_qkx2_quants, make_qx_quants, make_q3_quants
// and quantize_row_iq4_nl_impl: the same operations on the same operands in the same order. ggml
// runs one sub-block after the other, and its sums over a sub-block must stay serial, since another
// order of additions gives other bytes. Sub-blocks do not depend on each other, so a register of
// them goes through the serial sums at once. Where ggml branches, a lane keeps what it had.
//
// Weights are the caller's, as in ggml: with an importance matrix they are
// importance * sqrt(sigma2 + x^2), and search_symmetric (with Top 4 for q3_K too) and search_iq4 are
// the same loops. q2_K, q4_K and q5_K then have make_qkx3_quants, which is search_with_minimum with
// other candidates, and the block's own scales are searched (make_qp_quants), which is not here.
#pragma once

#include <cmath>

#include "lanes.hpp"

namespace pi {

constexpr float SMALLEST_BLOCK = 1e-15f;  // ggml's GROUP_MAX_EPS: below it a sub-block is zero

// A scale and a minimum, levels from 0 to Top. Weights are the caller's; errors are squared, or
// absolute where Absolute. Candidates are (Top + first + 0.1 step) / range; the best of them by
// weighted error, each refined by least squares, wins over the plain (Top / range). A lane whose
// range all but vanishes beside its values gets a scale of NaN: ggml has to make it.
template <int Size, int Top, int Steps, bool Absolute>
void search_with_minimum(const Floats *x, const Floats *weight, float first, Floats &scale,
                         Floats &minimum) {
    Floats low = x[0], high = x[0], sum_w = weight[0], sum_x = sum_w * x[0];
    for (int i = 1; i < Size; ++i) {
        low = lesser(x[i], low);
        high = greater(x[i], high);
        sum_w += weight[i];
        sum_x += weight[i] * x[i];
    }
    low = low > 0 ? floats(0) : low;
    const Floats lowest = low;
    const Ints flat = high == low;
    Ints wraps = ints(0);

    const auto level_of = [&](int i, Floats inverse) {
        return nearest_float(inverse * (x[i] - low), 0, Top);
    };
    const auto watch = [&](Floats inverse) {
        const Floats widest = absolute(high) + absolute(lowest) + absolute(low);
        wraps |= ~(absolute(inverse) * widest < NEAREST_LIMIT);
    };
    const auto error_of = [&](int i, Floats level, Floats by, Floats from) {
        const Floats off = by * level + from - x[i];
        return weight[i] * (Absolute ? absolute(off) : off * off);
    };

    Floats inverse = float(Top) / (high - low);
    watch(inverse);
    scale = 1 / inverse;
    Floats best = floats(0);
    for (int i = 0; i < Size; ++i) best += error_of(i, level_of(i, inverse), scale, low);

    for (int step = 0; step <= Steps; ++step) {
        // As in ggml, ``low`` is the best minimum so far, not the sub-block's.
        inverse = (first + 0.1f * step + Top) / (high - low);
        watch(inverse);
        Floats level[Size], sum_l = floats(0), sum_l2 = floats(0), sum_xl = floats(0);
        for (int i = 0; i < Size; ++i) {
            level[i] = level_of(i, inverse);
            const Floats weighted = weight[i] * level[i];
            sum_l += weighted;
            sum_l2 += weighted * level[i];
            sum_xl += weighted * x[i];
        }
        const Floats determinant = sum_w * sum_l2 - sum_l * sum_l;
        Floats by = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        Floats from = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        const Ints above = from > 0;
        by = above ? sum_xl / sum_l2 : by;
        from = above ? floats(0) : from;
        Floats error = floats(0);
        for (int i = 0; i < Size; ++i) error += error_of(i, level[i], by, from);
        const Ints better = (determinant > 0) & (error < best);
        best = better ? error : best;
        scale = better ? by : scale;
        low = better ? from : low;
    }
    scale = flat ? floats(0) : wraps ? floats(NAN) : scale;
    minimum = -(flat ? lowest : low);
}

// The element of largest magnitude, the first of equals, with its sign.
template <int Size> Floats extreme(const Floats *x, Floats &magnitude) {
    Floats found = floats(0);
    magnitude = floats(0);
    for (int i = 0; i < Size; ++i) {
        const Floats size = absolute(x[i]);
        const Ints larger = size > magnitude;
        magnitude = larger ? size : magnitude;
        found = larger ? x[i] : found;
    }
    return found;
}

// A scale alone, levels from -Top to Top - 1: of 19 candidates the one that leaves the least
// weighted squared error.
template <int Size, int Top> Floats search_symmetric(const Floats *x, const Floats *weight) {
    Floats magnitude, sum_xl, sum_l2, weighted[Size];
    const Floats largest = extreme<Size>(x, magnitude);
    for (int i = 0; i < Size; ++i) weighted[i] = weight[i] * x[i];
    const auto sum = [&](Floats inverse) {
        sum_xl = sum_l2 = floats(0);
        for (int i = 0; i < Size; ++i) {
            // At most Top + 1, since x is at most the largest.
            const Floats level = nearest_float(inverse * x[i], -Top, Top - 1);
            sum_xl += weighted[i] * level;
            sum_l2 += weight[i] * level * level;
        }
    };
    sum(float(-Top) / largest);
    Floats scale = sum_l2 != 0 ? sum_xl / sum_l2 : floats(0);
    Floats best = scale * sum_xl;
    for (int step = -9; step <= 9; ++step) {
        if (step == 0) continue;
        sum(-(Top + 0.1f * step) / largest);
        const Ints better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2);
        scale = better ? sum_xl / sum_l2 : scale;
        best = better ? scale * sum_xl : best;
    }
    return magnitude < SMALLEST_BLOCK ? floats(0) : scale;
}

// A scale alone, levels from -Top to Top - 1: levels are improved one by one, at most five times
// through. A lane that has come to rest stays as it is while others go on. Elements are weighted by
// their squares: ggml never calls this search with an importance matrix.
template <int Size, int Top> Floats search_by_exchange(const Floats *x) {
    Floats magnitude, level[Size], weighted[Size], square[Size];
    Floats sum_xl = floats(0), sum_l2 = floats(0);
    const Floats inverse = float(-Top) / extreme<Size>(x, magnitude);
    for (int i = 0; i < Size; ++i) {
        level[i] = to_floats(clamp(nearest(inverse * x[i]), -Top, Top - 1));
        square[i] = x[i] * x[i];
        weighted[i] = square[i] * x[i];
        sum_xl += weighted[i] * level[i];
        sum_l2 += square[i] * level[i] * level[i];
    }
    for (int pass = 0; pass < 5; ++pass) {
        Ints changed = ints(0);
        for (int i = 0; i < Size; ++i) {
            Floats rest_xl = sum_xl - weighted[i] * level[i];
            Floats rest_l2 = sum_l2 - square[i] * level[i] * level[i];
            const Floats other =
                to_floats(clamp(nearest(x[i] * rest_l2 / rest_xl), -Top, Top - 1));
            const Ints tried = (rest_xl > 0) & (other != level[i]);
            rest_xl += weighted[i] * other;
            rest_l2 += square[i] * other * other;
            const Ints better = tried & (rest_l2 > 0) &
                                (rest_xl * rest_xl * sum_l2 > sum_xl * sum_xl * rest_l2);
            level[i] = better ? other : level[i];
            sum_xl = better ? rest_xl : sum_xl;
            sum_l2 = better ? rest_l2 : sum_l2;
            changed |= better;
        }
        if (!any(changed)) break;
    }
    const Floats scale = sum_l2 > 0 ? sum_xl / sum_l2 : floats(0);
    return magnitude < SMALLEST_BLOCK ? floats(0) : scale;
}

// iq4's sixteen levels, and the nearest of them (its index) as ggml's best_index_int8 picks it.
constexpr float IQ4_LEVELS[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                  1,    13,   25,  38,  53,  69,  89,  113};

inline Floats iq4_level(Ints index) {
#ifdef __AVX512F__
    return (Floats)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(IQ4_LEVELS));
#else
    const __m256i at = (__m256i)index;
    const __m256 lower = _mm256_permutevar8x32_ps(_mm256_loadu_ps(IQ4_LEVELS), at);
    const __m256 upper = _mm256_permutevar8x32_ps(_mm256_loadu_ps(IQ4_LEVELS + 8), at);
    return index > 7 ? (Floats)upper : (Floats)lower;
#endif
}

inline Ints iq4_index(Floats x) {
    Ints below = ints(0);  // how many of the levels 1 to 14 x is not under
    for (int k = 1; k < 15; ++k) below -= ~(x < IQ4_LEVELS[k]);
    const Ints upper = below + 1;
    return x - iq4_level(below) < iq4_level(upper) - x ? below : upper;
}

// A scale for iq4's levels: of 16 candidates the one of the least weighted squared error.
template <int Size> Floats search_iq4(const Floats *x, const Floats *weight) {
    Floats magnitude, sum_xq, sum_q2;
    const Floats largest = extreme<Size>(x, magnitude);
    const auto sum = [&](Floats inverse) {
        sum_xq = sum_q2 = floats(0);
        for (int i = 0; i < Size; ++i) {
            const Floats level = iq4_level(iq4_index(inverse * x[i]));
            const Floats weighted = weight[i] * level;
            sum_xq += weighted * x[i];
            sum_q2 += weighted * level;
        }
    };
    sum(1 / (-largest / IQ4_LEVELS[0]));
    Floats scale = sum_q2 > 0 ? sum_xq / sum_q2 : floats(0);
    Floats best = scale * sum_xq;
    for (int step = -7; step <= 7; ++step) {
        sum((step + IQ4_LEVELS[0]) / largest);
        const Ints better = (sum_q2 > 0) & (sum_xq * sum_xq > best * sum_q2);
        scale = better ? sum_xq / sum_q2 : scale;
        best = better ? scale * sum_xq : best;
    }
    return magnitude < SMALLEST_BLOCK ? floats(0) : scale;
}

}  // namespace pi
