// Between torch's memory formats and (channels, pixels, images), where images lie innermost.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

// maps: (images, channels, pixels) with strides in elements, of which that of channels or of pixels is 1.
struct Strides {
    int64_t image, channel, pixel;
};

// Blocks are as large as the lines of both sides that they touch stay in the first cache.
template <class T, bool INNERMOST>  // INNERMOST: to (channels, pixels, images), else from it
void transpose(T* maps, Strides strides, T* innermost, int64_t images, int64_t channels, int64_t pixels, int threads) {
    const bool channels_last = strides.channel == 1;
    const int64_t inner = channels_last ? channels : pixels, outer = channels_last ? pixels : channels;
    const int64_t outer_stride = channels_last ? strides.pixel : strides.channel;
    const int64_t to_inner = channels_last ? pixels * images : images, to_outer = channels_last ? images : pixels * images;
    constexpr int64_t BLOCK = 64 / sizeof(T), OUTER = 8, IMAGES = 64;
    const int64_t inner_blocks = (inner + BLOCK - 1) / BLOCK, outer_blocks = (outer + OUTER - 1) / OUTER;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t b = 0; b < outer_blocks; b++)
        for (int64_t k = 0; k < inner_blocks; k++)
            for (int64_t n = 0; n < images; n += IMAGES)
                for (int64_t o = b * OUTER; o < std::min(outer, (b + 1) * OUTER); o++) {
                    T block[BLOCK][IMAGES];
                    const int64_t first = k * BLOCK, count = std::min(BLOCK, inner - first), many = std::min(IMAGES, images - n);
                    T* map = maps + n * strides.image + o * outer_stride + first;
                    T* other = innermost + o * to_outer + first * to_inner + n;
                    if (INNERMOST) {
                        for (int64_t m = 0; m < many; m++)
                            for (int64_t i = 0; i < count; i++) block[i][m] = map[m * strides.image + i];
                        for (int64_t i = 0; i < count; i++) memcpy(other + i * to_inner, block[i], many * sizeof(T));
                    } else {
                        for (int64_t i = 0; i < count; i++) memcpy(block[i], other + i * to_inner, many * sizeof(T));
                        for (int64_t m = 0; m < many; m++)
                            for (int64_t i = 0; i < count; i++) map[m * strides.image + i] = block[i][m];
                    }
                }
}
