// Vectors of one machine register, by the compiler's own vector types: one source for AVX-512, AVX2, NEON and
// whatever else the compiler knows. And the two formats in which activations lie in memory.
//
// A unit is what fits one register: LANES images in float32, twice as many in bfloat16. Products and sums are
// always float32: sums of a bfloat16 unit are two vectors (of images 0, 2, 4, ... and of 1, 3, 5, ...: a bfloat16 is
// the upper half of a float32), put together again, rounded once, where they are stored.
#pragma once
#include <cstdint>
#include <cstring>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define UNROLL _Pragma("GCC unroll 64")

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define UNIT 64  // bytes of a register
#elif defined(__AVX2__)
#define UNIT 32
#else
#define UNIT 16
#endif
constexpr int LANES = UNIT / 4;

typedef float Floats __attribute__((vector_size(UNIT)));
typedef uint32_t Words __attribute__((vector_size(UNIT)));

template <class V>
inline V load(const void* from) {  // from any address
    V vector;
    memcpy(&vector, from, UNIT);
    return vector;
}

template <class V>
inline void store(void* to, V vector) {
    memcpy(to, &vector, UNIT);
}

// Fewer than 2 * SIZE bytes, an even number. memcpy would be a call: it does not know how many there are.
template <int SIZE = UNIT / 2>
inline void copy_part(char* to, const char* from, int64_t bytes) {
    if (bytes & SIZE) {
        memcpy(to, from, SIZE);
        to += SIZE, from += SIZE;
    }
    if constexpr (SIZE > 2) copy_part<SIZE / 2>(to, from, bytes);
}

// The first bytes of a unit, from any address to any. By masks where there is code for them: memory that was just
// written is slow to read back in other pieces. Whole units without, which is faster.
inline Words load_part(const char* from, int64_t bytes) {
    if (bytes == UNIT) return load<Words>(from);
#if UNIT == 64
    return reinterpret_cast<Words>(_mm512_maskz_loadu_epi8((__mmask64{1} << bytes) - 1, from));
#else
    Words unit{};
    copy_part(reinterpret_cast<char*>(&unit), from, bytes);
    return unit;
#endif
}

inline void store_part(char* to, Words unit, int64_t bytes) {
    if (bytes == UNIT) return store(to, unit);
#if UNIT == 64
    _mm512_mask_storeu_epi8(to, (__mmask64{1} << bytes) - 1, reinterpret_cast<__m512i>(unit));
#else
    copy_part(to, reinterpret_cast<const char*>(&unit), bytes);
#endif
}

inline void copy(char* to, const char* from, int64_t bytes) {  // that do not overlap
    for (; bytes >= UNIT; to += UNIT, from += UNIT, bytes -= UNIT) store(to, load<Words>(from));
#if UNIT == 64
    store_part(to, load_part(from, bytes), bytes);
#else
    copy_part(to, from, bytes);
#endif
}

// Past the caches, for results that are not read soon. `to` is a multiple of UNIT.
inline void stream(void* to, Words vector) {
#if UNIT == 64
    _mm512_stream_si512(static_cast<__m512i*>(to), reinterpret_cast<__m512i>(vector));
#elif UNIT == 32
    _mm256_stream_si256(static_cast<__m256i*>(to), reinterpret_cast<__m256i>(vector));
#else
    store(to, vector);
#endif
}

inline void end_of_stream() {  // before another thread reads what was streamed
#ifdef __x86_64__
    _mm_sfence();
#endif
}

struct Float32 {
    using Stored = uint32_t;
    static constexpr int PARTS = 1, SIZE = 4, IMAGES = UNIT / SIZE;

    struct Factor {  // a weight that many units are multiplied by
        float value;
        explicit Factor(float weight) : value(weight) {}
        void add_product(Words unit, Floats* sum) const { sum[0] += value * reinterpret_cast<Floats>(unit); }
    };

    static Floats dot(Floats sum, Words a, Words b) {
        return sum + reinterpret_cast<Floats>(a) * reinterpret_cast<Floats>(b);
    }

    static void widen(Words unit, Floats* parts) { parts[0] = reinterpret_cast<Floats>(unit); }
    static Words round(const Floats* parts) { return reinterpret_cast<Words>(parts[0]); }
};

struct BFloat16 {
    using Stored = uint16_t;
    static constexpr int PARTS = 2, SIZE = 2, IMAGES = UNIT / SIZE;

#ifdef __AVX512BF16__
    // One instruction multiplies pairs and adds both products: with a 0 beside the weight it takes one image of a pair
    struct Factor {
        __m512bh even, odd;
        explicit Factor(float weight)
            : even(reinterpret_cast<__m512bh>(_mm512_srli_epi32(_mm512_castps_si512(_mm512_set1_ps(weight)), 16))),
              odd(reinterpret_cast<__m512bh>(_mm512_set1_ps(weight))) {}
        void add_product(Words unit, Floats* sum) const {
            sum[0] = _mm512_dpbf16_ps(sum[0], reinterpret_cast<__m512bh>(unit), even);
            sum[1] = _mm512_dpbf16_ps(sum[1], reinterpret_cast<__m512bh>(unit), odd);
        }
    };

    static Floats dot(Floats sum, Words a, Words b) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }
#else
    struct Factor {
        float value;
        explicit Factor(float weight) : value(weight) {}
        void add_product(Words unit, Floats* sum) const {
            sum[0] += value * even(unit);
            sum[1] += value * odd(unit);
        }
    };

    static Floats dot(Floats sum, Words a, Words b) { return sum + even(a) * even(b) + odd(a) * odd(b); }
#endif

    static float weight(float value) {  // rounded to bfloat16
        Words bits = upper(Floats{} + value) & 0xffff0000u;
        float rounded;
        memcpy(&rounded, &bits, sizeof rounded);
        return rounded;
    }

    static void widen(Words unit, Floats* parts) { parts[0] = even(unit), parts[1] = odd(unit); }
#ifdef __AVX512BF16__
    static Words round(const Floats* parts) {
        auto lower = [](Floats value) {
            const auto half = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(value));
            return reinterpret_cast<Words>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(half)));
        };
        return lower(parts[0]) | lower(parts[1]) << 16;
    }
#else
    static Words round(const Floats* parts) { return upper(parts[0]) >> 16 | (upper(parts[1]) & 0xffff0000u); }
#endif

  private:
    static Floats even(Words unit) { return reinterpret_cast<Floats>(unit << 16); }
    static Floats odd(Words unit) { return reinterpret_cast<Floats>(unit & 0xffff0000u); }

    static Words upper(Floats value) {  // rounded to the upper halves, to nearest, ties to even; NaN stays NaN
        Words bits = reinterpret_cast<Words>(value);
        Words nearest = bits + 0x7fffu + (bits >> 16 & 1u);
        return (bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : nearest;
    }
};

// a[0] + a[1], a[2] + a[3], ..., then the same of b
inline Floats add_pairs(Floats a, Floats b) {
#if UNIT == 64
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif UNIT == 32
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

// Lane i of the result: the sum over the lanes of vectors[i], for LANES vectors, which are overwritten.
inline Floats sums(Floats* vectors) {
    UNROLL for (int count = LANES; count > 1; count /= 2) {
        UNROLL for (int i = 0; i < count / 2; i++) vectors[i] = add_pairs(vectors[2 * i], vectors[2 * i + 1]);
    }
    return vectors[0];
}
