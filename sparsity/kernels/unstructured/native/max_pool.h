// Max pooling over maps that have their images innermost; of a pixel, they fill whole units.
#pragma once
#include <limits>
#include <vector>

#include "vector.h"

struct Pool {
    int64_t channels, images;
    int32_t in_height, in_width, out_height, out_width;
    int32_t height, width;  // of the window, 65,535 pixels at most
    int32_t stride_y, stride_x, padding_y, padding_x;
};

// which: of a window's pixels, row by row, the number of the greatest, in as many bytes as a number of the maps.
template <class E>
void max_pool_forward(const Pool& pool, const char* x, char* y, char* which, int threads) {
    const int64_t pixel = pool.images * E::SIZE;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t c = 0; c < pool.channels; c++)
        for (int32_t row = 0; row < pool.out_height; row++) {
            const char* map = x + c * pool.in_height * pool.in_width * pixel;
            for (int32_t column = 0; column < pool.out_width; column++) {
                const int64_t place = ((c * pool.out_height + row) * pool.out_width + column) * pixel;
                for (int64_t at = 0; at < pixel; at += UNIT) {
                    Floats greatest[E::PARTS], parts[E::PARTS];
                    Words index[E::PARTS] = {};
                    for (int p = 0; p < E::PARTS; p++) greatest[p] = Floats{} - std::numeric_limits<float>::infinity();
                    for (int32_t ky = 0; ky < pool.height; ky++)
                        for (int32_t kx = 0; kx < pool.width; kx++) {
                            const int32_t in_y = row * pool.stride_y - pool.padding_y + ky;
                            const int32_t in_x = column * pool.stride_x - pool.padding_x + kx;
                            if (in_y < 0 || in_y >= pool.in_height || in_x < 0 || in_x >= pool.in_width) continue;
                            E::widen(load<Words>(map + (int64_t(in_y) * pool.in_width + in_x) * pixel + at), parts);
                            for (int p = 0; p < E::PARTS; p++) {
                                auto greater = (parts[p] > greatest[p]) | (parts[p] != parts[p]);  // NaN stays
                                greatest[p] = greater ? parts[p] : greatest[p];
                                index[p] = greater ? Words{} + uint32_t(ky * pool.width + kx) : index[p];
                            }
                        }
                    store(y + place + at, E::round(greatest));
                    store(which + place + at, E::PARTS == 1 ? index[0] : index[0] | index[E::PARTS - 1] << 16);
                }
            }
        }
}

struct Window {
    int32_t place, tap;  // of the output; where the input is in it
};

// Of each input row or column, the windows that reach it.
inline std::vector<std::vector<Window>> windows_of(int32_t inputs, int32_t outputs, int32_t size, int32_t stride, int32_t padding) {
    std::vector<std::vector<Window>> found(inputs);
    for (int32_t place = 0; place < outputs; place++)
        for (int32_t tap = 0; tap < size; tap++) {
            const int32_t input = place * stride - padding + tap;
            if (input >= 0 && input < inputs) found[input].push_back({place, tap});
        }
    return found;
}

template <class E>
void max_pool_backward(const Pool& pool, const char* dy, const char* which, char* dx, int threads) {
    const int64_t pixel = pool.images * E::SIZE;
    const auto rows = windows_of(pool.in_height, pool.out_height, pool.height, pool.stride_y, pool.padding_y);
    const auto columns = windows_of(pool.in_width, pool.out_width, pool.width, pool.stride_x, pool.padding_x);
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (int64_t c = 0; c < pool.channels; c++)
        for (int32_t y = 0; y < pool.in_height; y++)
            for (int32_t x = 0; x < pool.in_width; x++)
                for (int64_t at = 0; at < pixel; at += UNIT) {
                    Floats sum[E::PARTS] = {}, parts[E::PARTS];
                    for (const Window& row : rows[y])
                        for (const Window& column : columns[x]) {
                            const int64_t place = ((c * pool.out_height + row.place) * pool.out_width + column.place) * pixel + at;
                            const Words index = load<Words>(which + place), tap = Words{} + uint32_t(row.tap * pool.width + column.tap);
                            const Words indices[2] = {E::PARTS == 1 ? index : index & 0xffffu, index >> 16};
                            E::widen(load<Words>(dy + place), parts);
                            for (int p = 0; p < E::PARTS; p++) sum[p] += indices[p] == tap ? parts[p] : Floats{};
                        }
                    store(dx + ((c * pool.in_height + y) * pool.in_width + x) * pixel + at, E::round(sum));
                }
}
