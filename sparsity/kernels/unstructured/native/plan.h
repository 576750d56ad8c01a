// The plan of one gather: the kept weights of a layer in the order in which a tile walks them.
//
// All three products of a layer are gathers over a map of inputs (see convolve.h):
//
//     out[o, y, x, image] = sum over kept weights (o, c, tap) of weight * in[c, y * sy + tap.dy, x * sx + tap.dx, image]
//
// A tile is `rows` x `columns` output pixels of `units` units of images (a unit: one register, see vector.h). What
// the tile reads of a block of input channels is first copied, with zeros around the map, into a slab that stays in
// the cache; columns that are a multiple of the stride apart lie side by side there, so that the pixels of one row of
// a tile, seen through any tap, are one run of units.
//
// With few images their lanes would be empty. Then the lanes are pixels: the map, with its zeros between the rows,
// is taken for one long row of `pitch` elements a row of pixels, a tile is a run of units of that, and a tap is a
// shift. A stride takes the map apart into one such row for each rest modulo the stride. What is computed between the
// rows is not stored.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "vector.h"

struct Tile {
    int32_t rows, columns, units;
    int32_t slab_bytes;  // at most, for one block of channels (at least one channel)
};

struct Tap {
    int dy, dx;
};

struct Entry {  // a kept weight, before it has its place
    int32_t output, input, tap;
    int64_t weight;  // where it lies in the dense weight
};

struct Kept {
    int32_t offset;  // of the first unit that it multiplies, in bytes of the slab
    float value;
};

struct Row {
    int32_t output, count;  // kept weights of this output in this block
    int64_t kept;           // index of the first
};

struct Block {  // of input channels
    int32_t channel, channels;
    int32_t row, rows;
    int64_t kept;  // index of its first
};

struct Pixels {  // of a plan whose lanes are pixels; none: images 0
    int64_t images, in_width, out_width;
    int32_t size;  // bytes of an element
};

struct Gather {
    int32_t outputs = 0, stride_y = 1, stride_x = 1;
    int32_t first_dy = 0, first_dx = 0;  // of the taps
    Tile tile{};
    int32_t slab_rows = 0, slab_columns = 0;
    std::vector<int32_t> column_at;  // column, from the tile's first -> its place in a row of the slab
    int64_t row_bytes = 0, channel_bytes = 0;  // of the slab
    int64_t pitch = 0, phase_bytes = 0;  // where lanes are pixels: elements of a row; bytes of a rest, of a channel
    std::vector<int32_t> phase_at;       // rest -> its place among those that taps look at; -1: none does
    std::vector<Block> blocks;
    std::vector<Row> rows;
    std::vector<Kept> kept;
    std::vector<int64_t> weights;  // of each kept weight, where it lies in the dense weight

    int64_t step_bytes() const { return row_bytes * stride_y; }  // between output rows of the tile
    int64_t slab_bytes() const { return channel_bytes * blocks[0].channels; }
    bool is_reached() const { return blocks.empty() || slab_bytes() <= INT32_MAX; }  // by offsets
};

// Columns x of a row in the map that stand `stride` apart, from `shift` on: those from first on, before end, are in it.
struct Columns {
    int64_t first, end;

    Columns(int64_t width, int64_t shift, int64_t stride)
        : first(shift >= 0 ? 0 : (-shift + stride - 1) / stride), end(width > shift ? (width - shift - 1) / stride + 1 : 0) {}
};

// Pixels from row to row: taps see as many zeros behind the last pixel of a row as before the first one, and those
// behind it are those before the next row's.
inline int64_t pitch_of(const Pixels& pixels, Tap first, Tap last, int64_t stride) {
    int64_t pitch = pixels.out_width;
    for (int64_t rest = 0; rest < stride; rest++) {
        const int64_t seen = pixels.out_width + (last.dx - first.dx - rest) / stride;
        pitch = std::max(pitch, std::min(Columns(pixels.in_width, rest + first.dx, stride).end, seen));
    }
    return pitch;
}

// entries: sorted by output, and within an output by input and tap. sparse_rows: leave out rows without kept weights
// (else each output has a row in the first and in the last block, which begin and end its sum).
inline Gather plan_gather(const std::vector<Entry>& entries, const std::vector<Tap>& taps, int32_t outputs, int32_t inputs,
                          int32_t stride_y, int32_t stride_x, Tile tile, bool sparse_rows, Pixels pixels = {}) {
    Gather plan;
    plan.outputs = outputs, plan.stride_y = stride_y, plan.stride_x = stride_x;
    plan.tile = tile;
    Tap first = taps[0], last = taps[0];
    for (const Tap& tap : taps) {
        first = {std::min(first.dy, tap.dy), std::min(first.dx, tap.dx)};
        last = {std::max(last.dy, tap.dy), std::max(last.dx, tap.dx)};
    }
    plan.first_dy = first.dy, plan.first_dx = first.dx;
    plan.slab_rows = (tile.rows - 1) * stride_y + last.dy - first.dy + 1;
    plan.slab_columns = (tile.columns - 1) * stride_x + last.dx - first.dx + 1;
    plan.column_at.resize(plan.slab_columns);
    int32_t place = 0;
    for (int32_t rest = 0; rest < stride_x; rest++)
        for (int32_t x = rest; x < plan.slab_columns; x += stride_x) plan.column_at[x] = place++;
    plan.row_bytes = int64_t(plan.slab_columns) * tile.units * UNIT;
    plan.channel_bytes = plan.row_bytes * plan.slab_rows;
    std::vector<int64_t> offset_of(taps.size());
    for (size_t t = 0; t < taps.size(); t++)
        offset_of[t] = (taps[t].dy - first.dy) * plan.row_bytes +
                       int64_t(plan.column_at[taps[t].dx - first.dx]) * tile.units * UNIT;

    if (pixels.images > 0) {
        const int64_t down = (last.dy - first.dy) / stride_y, across = (last.dx - first.dx) / stride_x;
        plan.pitch = pitch_of(pixels, first, last, stride_x) * pixels.images;
        const int64_t span = down * plan.pitch + across * pixels.images;  // the longest shift
        plan.phase_bytes = (tile.columns + (span * pixels.size + UNIT - 1) / UNIT) * UNIT;
        plan.phase_at.assign(stride_y * stride_x, -1);
        int32_t phases = 0;
        for (size_t t = 0; t < taps.size(); t++) {
            const int32_t dy = taps[t].dy - first.dy, dx = taps[t].dx - first.dx;
            const int64_t shift = dy / stride_y * plan.pitch + dx / stride_x * pixels.images;
            int32_t& phase = plan.phase_at[dy % stride_y * stride_x + dx % stride_x];
            if (phase < 0) phase = phases++;
            offset_of[t] = phase * plan.phase_bytes + shift * pixels.size;
        }
        plan.channel_bytes = plan.phase_bytes * phases;
    }
    int32_t most = std::clamp<int64_t>(tile.slab_bytes / plan.channel_bytes, 1, inputs);
    int32_t num_blocks = (inputs + most - 1) / most, channels = (inputs + num_blocks - 1) / num_blocks;
    num_blocks = (inputs + channels - 1) / channels;
    std::vector<int32_t> counts(size_t(num_blocks) * outputs);
    for (const Entry& entry : entries) counts[size_t(entry.input / channels) * outputs + entry.output]++;
    std::vector<int64_t> next(counts.size());
    int64_t total = 0;
    for (int32_t b = 0; b < num_blocks; b++) {
        Block block{b * channels, std::min(channels, inputs - b * channels), int32_t(plan.rows.size()), 0, total};
        bool needed = !sparse_rows && (b == 0 || b == num_blocks - 1);
        for (int32_t o = 0; o < outputs; o++) {
            int32_t count = counts[size_t(b) * outputs + o];
            next[size_t(b) * outputs + o] = total;
            total += count;
            if (count > 0 || needed) plan.rows.push_back({o, count, next[size_t(b) * outputs + o]});
        }
        block.rows = int32_t(plan.rows.size()) - block.row;
        plan.blocks.push_back(block);
    }
    plan.kept.resize(total);
    plan.weights.resize(total);
    for (const Entry& entry : entries) {
        int32_t b = entry.input / channels;
        int64_t at = next[size_t(b) * outputs + entry.output]++;
        plan.kept[at].offset = int32_t((entry.input - b * channels) * plan.channel_bytes + offset_of[entry.tap]);
        plan.weights[at] = entry.weight;
    }
    return plan;
}
