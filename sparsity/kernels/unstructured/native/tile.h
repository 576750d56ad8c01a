// What differs from tile to tile of a gather: what is copied into its slab, and where its units lie in the output.
#pragma once
#include "plan.h"

struct Map {  // bytes between neighbours; images lie side by side
    char* data;
    int64_t channel, row, column;
    int32_t height, width;
    int64_t images;
    bool flat;  // a column is one unit of all that lies side by side: `images` of these
};

template <class E>
struct Layout {
    struct Move {
        int32_t from, to, bytes;
    };
    std::vector<Move> whole, part;
    std::vector<int32_t> zero;
    std::vector<int32_t> at;     // of each output unit
    std::vector<int32_t> bytes;  // of it that are inside the map
    std::vector<Move> pieces;    // where lanes are pixels: of the tile's units, what belongs to the output
    std::vector<Move> apart;     // likewise: what stands a stride apart in the map; so many pixels, not bytes
    int64_t stride, pixel;       // of these: in pixels; the elements of one
    bool inside;                 // all are

    static int32_t valid(const Map& map, int64_t column, int64_t unit) {  // bytes of a unit
        int64_t left = map.flat ? map.images - column * E::IMAGES : map.images - unit * E::IMAGES;
        return int32_t(std::clamp<int64_t>(left, 0, E::IMAGES)) * E::SIZE;
    }

    // Of the tile whose first pixel and unit these are.
    void set(const Gather& plan, const Map& in, const Map& out, int32_t y, int32_t x, int32_t unit) {
        whole.clear(), part.clear(), zero.clear(), at.clear(), bytes.clear();
        for (int32_t r = 0; r < plan.slab_rows; r++)
            for (int32_t q = 0; q < plan.slab_columns; q++)
                for (int32_t u = 0; u < plan.tile.units; u++) {
                    int32_t row = y * plan.stride_y + plan.first_dy + r, column = x * plan.stride_x + plan.first_dx + q;
                    int32_t to = int32_t(r * plan.row_bytes) + (plan.column_at[q] * plan.tile.units + u) * UNIT;
                    bool within = row >= 0 && row < in.height && column >= 0 && column < in.width;
                    int32_t count = within ? valid(in, column, unit + u) : 0;
                    int32_t from = int32_t(row * in.row + column * in.column) + (unit + u) * UNIT;
                    if (count == UNIT) whole.push_back({from, to, count});
                    else zero.push_back(to);
                    if (count > 0 && count < UNIT) part.push_back({from, to, count});
                }
        inside = true;
        for (int32_t r = 0; r < plan.tile.rows; r++)
            for (int32_t c = 0; c < plan.tile.columns; c++)
                for (int32_t u = 0; u < plan.tile.units; u++) {
                    bool within = y + r < out.height && x + c < out.width;
                    at.push_back(int32_t((y + r) * out.row + (x + c) * out.column) + (unit + u) * UNIT);
                    bytes.push_back(within ? valid(out, x + c, unit + u) : 0);
                    inside = inside && bytes.back() == UNIT;
                }
    }

    // Where lanes are pixels: of the tile that begins at this element of the long row of outputs.
    void set_pixels(const Gather& plan, const Map& in, const Map& out, int64_t begin) {
        whole.clear(), part.clear(), zero.clear(), pieces.clear(), apart.clear();
        inside = false, stride = plan.stride_x, pixel = in.images;
        const int64_t images = in.images, end = begin + plan.phase_bytes / E::SIZE;
        for (int32_t py = 0; py < plan.stride_y; py++)
            for (int32_t px = 0; px < plan.stride_x; px++) {
                const int32_t phase = plan.phase_at[py * plan.stride_x + px];
                if (phase < 0) continue;
                const int64_t place = phase * plan.phase_bytes, shift = px + plan.first_dx;
                const Columns columns(in.width, shift, stride);
                int64_t cleared = place;  // all before it is cleared or copied to
                auto clear = [&](int64_t until) {
                    for (; cleared < until; cleared += UNIT) zero.push_back(int32_t(cleared));
                };
                for (int64_t r = begin / plan.pitch; r * plan.pitch < end; r++) {
                    const int64_t row = r * plan.stride_y + py + plan.first_dy, origin = r * plan.pitch - begin;
                    if (row < 0 || row >= in.height) continue;
                    int64_t from = std::max(columns.first * images, -origin);
                    int64_t to = std::min({plan.pitch, columns.end * images, end - r * plan.pitch});
                    if (from >= to) continue;
                    clear(place + (origin + from) * E::SIZE);
                    cleared = std::max(cleared, place + (origin + to) * E::SIZE / UNIT * UNIT);
                    auto move = [&](int64_t q, int64_t count) {  // of the element q of the long row
                        int64_t column = q / images * stride + shift;
                        return Move{int32_t(row * in.row + column * in.column + q % images * E::SIZE),
                                    int32_t(place + (origin + q) * E::SIZE), int32_t(count)};
                    };
                    // what lies together in the map: a pixel, or where the stride is 1 the row
                    auto add = [&](int64_t until) {
                        if (from < until) part.push_back(move(from, (until - from) * E::SIZE));
                        from = std::max(from, until);
                    };
                    if (stride == 1) add(to);
                    if (from % images) add(std::min(to, from + images - from % images));
                    if (const int64_t pixels = (to - from) / images; pixels > 0) {
                        apart.push_back(move(from, pixels));
                        from += pixels * images;
                    }
                    add(to);
                }
                clear(place + plan.phase_bytes);
            }
        const int64_t last = std::min(begin + int64_t(plan.tile.columns) * E::IMAGES, out.height * plan.pitch);
        for (int64_t y = begin / plan.pitch; y * plan.pitch < last; y++) {
            const int64_t from = std::max(begin, y * plan.pitch), to = std::min(last, y * plan.pitch + out.width * images);
            if (from < to)
                pieces.push_back({int32_t((from - begin) * E::SIZE), int32_t(y * out.row + (from - y * plan.pitch) * E::SIZE),
                                  int32_t((to - from) * E::SIZE)});
        }
    }

    // The channels from `first` on, before `end`, of a block; slab: the whole block's.
    void pack(const Gather& plan, const Block& block, const Map& in, char* slab, int32_t first, int32_t end) const {
        const char* source = in.data + (block.channel + first) * in.channel;
        slab += first * plan.channel_bytes;
        for (int32_t c = first; c < end; c++, source += in.channel, slab += plan.channel_bytes) {
            if (c + 4 < end)  // channels lie too far apart for the hardware to foresee
                for (const Move& move : whole) __builtin_prefetch(source + 4 * in.channel + move.from, 0, 1);
            for (const Move& move : whole) store(slab + move.to, load<Words>(source + move.from));
            for (int32_t to : zero) store(slab + to, Words{});
            for (const Move& move : part) copy(slab + move.to, source + move.from, move.bytes);
            for (const Move& move : apart) {
                const auto* __restrict from = reinterpret_cast<const typename E::Stored*>(source + move.from);
                auto* __restrict to = reinterpret_cast<typename E::Stored*>(slab + move.to);
                if (pixel == 1 && stride == 2)
                    for (int32_t i = 0; i < move.bytes; i++) to[i] = from[2 * i];
                else
                    for (int32_t i = 0; i < move.bytes; i++)
                        for (int64_t k = 0; k < pixel; k++) to[i * pixel + k] = from[i * stride * pixel + k];
            }
        }
    }
};

struct Tiles {  // of one output map
    int64_t down, across, units;

    Tiles(const Gather& plan, const Map& out, int images_of_unit) {
        auto parts = [](int64_t whole, int64_t part) { return (whole + part - 1) / part; };
        if (plan.pitch > 0) {
            down = units = 1, across = parts(out.height * plan.pitch, int64_t(plan.tile.columns) * images_of_unit);
            return;
        }
        down = parts(out.height, plan.tile.rows), across = parts(out.width, plan.tile.columns);
        units = out.flat ? 1 : parts(out.images, int64_t(plan.tile.units) * images_of_unit);
    }

    int64_t count() const { return down * across * units; }

    struct Place {
        int32_t y, x, unit;
    };

    Place place(const Gather& plan, int64_t tile) const {
        return {int32_t(tile / units / across * plan.tile.rows), int32_t(tile / units % across * plan.tile.columns),
                int32_t(tile % units * plan.tile.units)};
    }
};

// Fetches the inputs of the next tile into the second cache while this one is computed, some channels with each row.
template <class E>
struct Ahead {
    const Layout<E>& layout;
    const char* from = nullptr;
    int64_t channel = 0;
    int32_t channels = 0, rows = 0;  // still to come

    void aim(const Gather& plan, const Map& in, const Block& first, const Block& last, Tiles::Place here, Tiles::Place next) {
        from = in.data + first.channel * in.channel + (next.y - here.y) * plan.stride_y * in.row +
               (next.x - here.x) * plan.stride_x * in.column + (next.unit - here.unit) * UNIT;
        channel = in.channel;
        channels = last.channel + last.channels - first.channel;
        rows = last.row + last.rows - first.row;
    }

    void fetch() {
        if (rows <= 0) return;
        for (int32_t count = (channels + rows - 1) / rows; count > 0; count--, channels--, from += channel)
            for (const auto& move : layout.whole) __builtin_prefetch(from + move.from, 0, 2);
        rows--;
    }
};
