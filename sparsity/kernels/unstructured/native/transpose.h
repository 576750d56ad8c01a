// Between torch's memory formats and (channels, pixels, images), where images lie innermost.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

// maps: (images, pixels, channels) in channels_last, where channels lie side by side here, and pixels with their images
// there; else (images, channels, pixels), with pixels here, images there.
template <class T, bool INNERMOST>  // INNERMOST: to (channels, pixels, images), else from it
void transpose(T* maps, T* innermost, int64_t images, int64_t channels, int64_t pixels, bool channels_last, int threads) {
    const int64_t rows = channels_last ? 1 : channels, here = channels_last ? channels : pixels;
    const int64_t there = channels_last ? pixels * images : images;
    constexpr int64_t HERE = 64 / sizeof(T), THERE = 32;  // of a block: lines of both sides stay in the first cache
    const int64_t chunk = (8 * images + THERE - 1) / THERE * THERE;  // pages of both sides stay known
    const int64_t chunks = (there + chunk - 1) / chunk, heres = (here + HERE - 1) / HERE;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t part = 0; part < rows * chunks * heres; part++) {
        const int64_t k = part % heres * HERE, begin = part / heres % chunks * chunk, row = part / heres / chunks;
        for (int64_t g = begin; g < std::min(there, begin + chunk); g += THERE) {
            T block[HERE][THERE];
            const int64_t count = std::min(HERE, here - k), many = std::min(THERE, there - g);
            T* const other = innermost + (row * here + k) * there + g;
            int64_t image = g % images, pixel = g / images;  // of g; in turn, divisions take longer than copies
            T* maps_here[THERE];
            for (int64_t m = 0; m < many; m++) {
                maps_here[m] = maps + image * channels * pixels + (channels_last ? pixel * channels : row * pixels) + k;
                if (++image == images) image = 0, pixel++;
            }
            if (INNERMOST) {
                for (int64_t m = 0; m < many; m++)
                    for (int64_t i = 0; i < count; i++) block[i][m] = maps_here[m][i];
                for (int64_t i = 0; i < count; i++) memcpy(other + i * there, block[i], many * sizeof(T));
            } else {
                for (int64_t i = 0; i < count; i++) memcpy(block[i], other + i * there, many * sizeof(T));
                for (int64_t m = 0; m < many; m++)
                    for (int64_t i = 0; i < count; i++) maps_here[m][i] = block[i][m];
            }
        }
    }
}
