// Sparse gathers over maps of activations that have their images innermost: (channels, height, width, images).
//
// Outputs: for each tile, for each block of channels: pack the slab, then for each output walk its kept weights and add
// weight * slab to the sums in the registers, one for each unit of the tile. Sums that several blocks add to wait
// in `partial` meanwhile.
// Weight gradients: for each tile, pack the slab, load the output gradient's tile into registers, and for each kept
// weight take the dot product with what it multiplied. Tiles are divided into shares that do not depend on the number
// of threads, each share has sums of its own, and these are added in order: so are results, bit for bit.
#pragma once
#include <cstdlib>
#include <memory>

#include "tile.h"

struct Epilogue {  // a convolution, in inference: y = relu(sums + bias + other), each where it is there
    const float* bias;
    const char* other;  // a map like the output
    int32_t relu;
};

enum Ending { KEEP, STORE, STREAM, STORE_PART, STORE_PIECES };  // what happens to the sums of a row behind its block

// The sums of one output, which began with the bias, with what else stands behind.
template <class E, int ROWS, int RUN>
[[gnu::always_inline]] inline void finish(  // a call would have the sums leave their registers
    const Epilogue& epilogue, int32_t output, const Map& out, const Layout<E>& layout, Ending ending, Floats* sum) {
    constexpr int NUM = ROWS * RUN, SUMS = NUM * E::PARTS;
    if (epilogue.other) {
        const char* other = epilogue.other + output * out.channel;
        char pieces[NUM * UNIT] = {};
        if (ending == STORE_PIECES)
            for (const auto& piece : layout.pieces) copy(pieces + piece.from, other + piece.to, piece.bytes);
        UNROLL for (int i = 0; i < NUM; i++) {
            Floats added[E::PARTS];
            E::widen(ending == STORE_PIECES ? load<Words>(pieces + i * UNIT)
                     : ending == STORE_PART ? load_part(other + layout.at[i], layout.bytes[i])
                                            : load<Words>(other + layout.at[i]),
                     added);
            UNROLL for (int p = 0; p < E::PARTS; p++) sum[i * E::PARTS + p] += added[p];
        }
    }
    if (epilogue.relu) {
        UNROLL for (int i = 0; i < SUMS; i++) sum[i] = sum[i] < Floats{} ? Floats{} : sum[i];  // NaN stays NaN
    }
}

// ROWS x RUN units of a tile at once. partial: one place for each output.
template <class E, int ROWS, int RUN>
void multiply(const Gather& plan, const Row* row, const Row* end, const char* slab, char* partial, const Map& out,
              const Layout<E>& layout, bool first, Ending ending, const Epilogue* epilogue, Ahead<E>& ahead) {
    constexpr int NUM = ROWS * RUN, SUMS = NUM * E::PARTS;
    constexpr bool TWICE = SUMS <= 4;  // each sum as two, else the next product waits for the last one's
    const int64_t step = plan.step_bytes();
    const int32_t* at = layout.at.data();
    const float* bias = first && epilogue ? epilogue->bias : nullptr;
    auto add = [&](const Kept* kept, Floats* sum) {
        const char* from = slab + kept->offset;
        const typename E::Factor factor(kept->value);
        UNROLL for (int r = 0; r < ROWS; r++) {
            UNROLL for (int k = 0; k < RUN; k++) {
                factor.add_product(load<Words>(from + r * step + k * UNIT), sum + (r * RUN + k) * E::PARTS);
            }
        }
    };
    char units[NUM * UNIT], *before = nullptr;  // of STORE_PIECES: sums of the row before, by now in the cache
    auto pieces_to = [&](char* to) {
        for (const auto& piece : layout.pieces) copy(to + piece.to, units + piece.from, piece.bytes);
    };
    auto fetch = [&](int32_t output) {  // what a row writes, and adds, while the row before it is computed
        auto at_place = [&](int64_t place) {
            place += output * out.channel;
            if (ending != STREAM) __builtin_prefetch(out.data + place, 1);
            if (epilogue && epilogue->other) __builtin_prefetch(epilogue->other + place);
        };
        if (ending == STORE_PIECES)
            for (const auto& piece : layout.pieces) at_place(piece.to);
        else
            UNROLL for (int i = 0; i < NUM; i++) at_place(at[i]);
    };
    for (; row < end; row++) {
        if (ending != KEEP && row + 1 < end) fetch(row[1].output);
        char* mine = partial + int64_t(row->output) * (SUMS * UNIT);
        Floats sum[SUMS];
        ahead.fetch();
        const Floats begin = Floats{} + (bias ? bias[row->output] : 0.f);
        UNROLL for (int i = 0; i < SUMS; i++) sum[i] = first ? begin : load<Floats>(mine + i * UNIT);
        const Kept* kept = plan.kept.data() + row->kept;
        const Kept* last = kept + row->count;
        if constexpr (TWICE) {
            Floats others[SUMS] = {};
            for (; kept + 1 < last; kept += 2) add(kept, sum), add(kept + 1, others);
            UNROLL for (int i = 0; i < SUMS; i++) sum[i] += others[i];
        }
        for (; kept < last; kept++) add(kept, sum);
        if (ending == KEEP) {
            UNROLL for (int i = 0; i < SUMS; i++) store(mine + i * UNIT, sum[i]);
            continue;
        }
        if (epilogue) finish<E, ROWS, RUN>(*epilogue, row->output, out, layout, ending, sum);
        char* to = out.data + row->output * out.channel;
        if (ending == STREAM) {
            UNROLL for (int i = 0; i < NUM; i++) stream(to + at[i], E::round(sum + i * E::PARTS));
        } else if (ending == STORE) {
            UNROLL for (int i = 0; i < NUM; i++) store(to + at[i], E::round(sum + i * E::PARTS));
        } else if (ending == STORE_PART) {
            UNROLL for (int i = 0; i < NUM; i++) store_part(to + at[i], E::round(sum + i * E::PARTS), layout.bytes[i]);
        } else {
            if (before) pieces_to(before);
            UNROLL for (int i = 0; i < NUM; i++) store(units + i * UNIT, E::round(sum + i * E::PARTS));
            before = to;
        }
    }
    if (before) pieces_to(before);
}

// gradients: of the block's kept weights; added to.
template <class E, int ROWS, int RUN>
void correlate(const Gather& plan, const Block& block, const char* slab, const Map& out, const Layout<E>& layout,
               float* gradients, Ahead<E>& ahead) {
    constexpr int NUM = ROWS * RUN;
    const Kept* kept = plan.kept.data() + block.kept;
    const int64_t step = plan.step_bytes();
    const int32_t* at = layout.at.data();
    Floats waiting[LANES];  // products of kept weights whose lanes are still to be summed
    int count = 0;
    const Row *row = plan.rows.data() + block.row, *end = row + block.rows;
    for (; row < end; row++) {
        const char* from = out.data + row->output * out.channel;
        Words of_output[NUM];
        ahead.fetch();
        if (layout.inside) {
            const char* next = out.data + row[row + 3 < end ? 3 : 0].output * out.channel;
            UNROLL for (int i = 0; i < NUM; i++) __builtin_prefetch(next + at[i]);
            UNROLL for (int i = 0; i < NUM; i++) of_output[i] = load<Words>(from + at[i]);
        } else {
            UNROLL for (int i = 0; i < NUM; i++) of_output[i] = load_part(from + at[i], layout.bytes[i]);
        }
        for (const Kept* last = kept + row->count; kept < last; kept++) {
            const char* input = slab + kept->offset;
            Floats sum[2] = {};
            UNROLL for (int r = 0; r < ROWS; r++) {
                UNROLL for (int k = 0; k < RUN; k++) {
                    int i = r * RUN + k;
                    sum[i % 2] = E::dot(sum[i % 2], of_output[i], load<Words>(input + r * step + k * UNIT));
                }
            }
            waiting[count++] = sum[0] + sum[1];
            if (count == LANES) {
                store(gradients, load<Floats>(gradients) + sums(waiting));
                gradients += LANES;
                count = 0;
            }
        }
    }
    if (count > 0) {
        for (int i = count; i < LANES; i++) waiting[i] = Floats{};
        Floats last = sums(waiting);
        for (int i = 0; i < count; i++) gradients[i] += last[i];
    }
}

inline char* workspace(int which, size_t bytes) {  // this thread's, kept from call to call
    struct Buffer {
        std::unique_ptr<char, decltype(&std::free)> data{nullptr, &std::free};
        size_t bytes = 0;
    };
    static thread_local Buffer buffers[3];
    Buffer& buffer = buffers[which];
    if (buffer.bytes < bytes) {
        constexpr size_t page = 4096;
        buffer.bytes = (bytes + page - 1) / page * page;
        buffer.data.reset(static_cast<char*>(std::aligned_alloc(page, buffer.bytes)));
        if (!buffer.data) std::abort();
    }
    return buffer.data.get();
}

// The rows of a block whose outputs belong to one of `parts` equal parts of all outputs.
inline std::pair<const Row*, const Row*> rows_of_part(const Gather& plan, const Block& block, int64_t part, int64_t parts) {
    const Row *first = plan.rows.data() + block.row, *last = first + block.rows;
    auto at = [&](int64_t p) {
        auto before = [](const Row& row, int64_t output) { return row.output < output; };
        return std::lower_bound(first, last, plan.outputs * p / parts, before);
    };
    return {at(part), at(part + 1)};
}

// How the sums of a row leave the registers, behind the last block.
template <class E>
Ending ending_of(const Gather& plan, const Layout<E>& layout, bool past_caches) {
    return plan.pitch > 0 ? STORE_PIECES : !layout.inside ? STORE_PART : past_caches ? STREAM : STORE;
}

template <class E>
void set(Layout<E>& layout, const Gather& plan, const Map& in, const Map& out, Tiles::Place here) {
    if (plan.pitch > 0) layout.set_pixels(plan, in, out, int64_t(here.x) * E::IMAGES);
    else layout.set(plan, in, out, here.y, here.x, here.unit);
}

// Few tiles: all threads pack a slab, then all walk it, each for parts of the outputs.
template <class E, int ROWS, int RUN>
void outputs_of_few(const Gather& plan, const Map& in, const Map& out, bool past_caches, const Epilogue* epilogue, int threads,
                    const Tiles& tiles, int64_t parts) {
    const size_t last = plan.blocks.size() - 1;
    char* slab = workspace(0, plan.slab_bytes());
    char* partial = last > 0 ? workspace(1, size_t(plan.outputs) * ROWS * RUN * E::PARTS * UNIT) : nullptr;
#pragma omp parallel num_threads(threads)
    {
        Layout<E> layout;
        for (int64_t tile = 0; tile < tiles.count(); tile++) {
            set(layout, plan, in, out, tiles.place(plan, tile));
            const Ending ending = ending_of(plan, layout, past_caches);
            for (size_t b = 0; b <= last; b++) {
                const Block& block = plan.blocks[b];
#pragma omp for schedule(static)
                for (int32_t c = 0; c < block.channels; c += 8)
                    layout.pack(plan, block, in, slab, c, std::min(c + 8, block.channels));
#pragma omp for schedule(dynamic, 1)
                for (int64_t part = 0; part < parts; part++) {
                    auto [row, end] = rows_of_part(plan, block, part, parts);
                    Ahead<E> nothing{layout};
                    multiply<E, ROWS, RUN>(plan, row, end, slab, partial, out, layout, b == 0, b == last ? ending : KEEP,
                                           epilogue, nothing);
                }
            }
        }
        end_of_stream();
    }
}

template <class E, int ROWS, int RUN>
void outputs_of(const Gather& plan, const Map& in, const Map& out, bool past_caches, const Epilogue* epilogue, int threads) {
    const Tiles tiles(plan, out, E::IMAGES);
    const int64_t parts = std::clamp<int64_t>(3 * threads / std::max<int64_t>(tiles.count(), 1), 1, (plan.outputs + 15) / 16);
    if (parts > 1) return outputs_of_few<E, ROWS, RUN>(plan, in, out, past_caches, epilogue, threads, tiles, parts);
    // Of tiles: neighbours share cache lines of the input
    const int64_t chunk = std::clamp<int64_t>(tiles.count() / (2 * threads), 1, 4);
    const size_t last = plan.blocks.size() - 1;
#pragma omp parallel num_threads(threads)
    {
        char* slab = workspace(0, plan.slab_bytes());
        char* partial = last > 0 ? workspace(1, size_t(plan.outputs) * ROWS * RUN * E::PARTS * UNIT) : nullptr;
        Layout<E> layout;
#pragma omp for schedule(dynamic, chunk)
        for (int64_t tile = 0; tile < tiles.count(); tile++) {
            const Tiles::Place here = tiles.place(plan, tile);
            Ahead<E> ahead{layout};
            set(layout, plan, in, out, here);
            if (plan.pitch == 0 && tile % chunk < chunk - 1 && tile + 1 < tiles.count())
                ahead.aim(plan, in, plan.blocks[0], plan.blocks[last], here, tiles.place(plan, tile + 1));
            const Ending ending = ending_of(plan, layout, past_caches);
            for (size_t b = 0; b <= last; b++) {
                const Block& block = plan.blocks[b];
                layout.pack(plan, block, in, slab, 0, block.channels);
                const Row* row = plan.rows.data() + block.row;
                multiply<E, ROWS, RUN>(plan, row, row + block.rows, slab, partial, out, layout, b == 0,
                                       b == last ? ending : KEEP, epilogue, ahead);
            }
        }
        end_of_stream();
    }
}

// gradient: dense, as the weight lies in memory; dropped weights' are 0.
template <class E, int ROWS, int RUN>
void weight_gradient_of(const Gather& plan, const Map& in, const Map& out, float* gradient, int64_t numel, int threads) {
    constexpr int64_t MOST_SHARES = 32, MOST_SUMS = 1 << 21;  // sums: 8 MB, not to be written and read for little
    const Tiles tiles(plan, out, E::IMAGES);
    const int64_t kept = int64_t(plan.kept.size()), blocks = int64_t(plan.blocks.size());
    const int64_t shares = std::clamp<int64_t>(MOST_SUMS / (kept + 1), 1, std::clamp<int64_t>(tiles.count(), 1, MOST_SHARES));
    const int64_t block_shares = std::min(blocks, (MOST_SHARES + shares - 1) / shares);
    float* sums = reinterpret_cast<float*>(workspace(2, size_t(shares * kept) * sizeof(float)));
#pragma omp parallel num_threads(threads)
    {
        char* slab = workspace(0, plan.slab_bytes());
        Layout<E> layout;
#pragma omp for schedule(dynamic, 1)
        for (int64_t share = 0; share < shares * block_shares; share++) {
            int64_t of_tiles = share / block_shares, of_blocks = share % block_shares;
            int64_t first_block = blocks * of_blocks / block_shares, end_block = blocks * (of_blocks + 1) / block_shares;
            float* mine = sums + of_tiles * kept;
            std::fill(mine + plan.blocks[first_block].kept, mine + (end_block < blocks ? plan.blocks[end_block].kept : kept), 0.f);
            const int64_t end = tiles.count() * (of_tiles + 1) / shares;
            for (int64_t tile = tiles.count() * of_tiles / shares; tile < end; tile++) {
                const Tiles::Place here = tiles.place(plan, tile);
                layout.set(plan, in, out, here.y, here.x, here.unit);
                Ahead<E> ahead{layout};
                if (tile + 1 < end)
                    ahead.aim(plan, in, plan.blocks[first_block], plan.blocks[end_block - 1], here, tiles.place(plan, tile + 1));
                for (int64_t b = first_block; b < end_block; b++) {
                    const Block& block = plan.blocks[b];
                    if (block.rows == 0) continue;
                    layout.pack(plan, block, in, slab, 0, block.channels);
                    correlate<E, ROWS, RUN>(plan, block, slab, out, layout, mine + block.kept, ahead);
                }
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < numel; i++) gradient[i] = 0;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < kept; i++) {
            float sum = 0;
            for (int64_t share = 0; share < shares; share++) sum += sums[share * kept + i];
            gradient[plan.weights[i]] = sum;
        }
    }
}
