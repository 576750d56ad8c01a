// A masked layer: its plans, and the functions that Python calls through ctypes (see ../library.py).
#include <tuple>

#include "batch_norm.h"
#include "convolve.h"
#include "max_pool.h"
#include "transpose.h"

struct Geometry {  // of a convolution; a linear layer is one of 1 x 1
    int32_t outputs, inputs, groups, height, width;  // inputs: of all groups; height, width: of the kernel
    int32_t stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
    int64_t strides[4];  // of the dense weight and of its gradient: (output, input of the group, y, x)
};

struct Size {  // of the maps
    int64_t images;
    int32_t in_height, in_width, out_height, out_width;
};

struct Residue {  // input positions with these rests modulo the stride: their gradient is a gather of its own
    int32_t y, x;
    Gather plan;
};

struct Layer {
    Geometry geometry;
    bool bfloat16;
    int64_t numel;
    Gather forward, weight;
    std::vector<Residue> input;
};

namespace {

// Output rows, and units in a row, of the tiles that there is code for. What a register holds no longer is slow.
template <int R, int U>
struct Grid {
    static constexpr int ROWS = R, RUN = U;
};
#if UNIT == 64
using Grids = std::tuple<Grid<1, 2>, Grid<1, 4>, Grid<1, 7>, Grid<1, 8>, Grid<1, 14>, Grid<2, 4>, Grid<2, 7>>;
#else
using Grids = std::tuple<Grid<1, 2>, Grid<1, 4>, Grid<1, 6>, Grid<1, 7>, Grid<2, 3>>;
#endif

// run<rows, units in a row>() for this tile; false where there is no code for it.
template <class... G, class Run>
bool with_grid(std::tuple<G...>, const Tile& tile, Run run) {
    return ((tile.rows == G::ROWS && tile.columns * tile.units == G::RUN && (run(G{}), true)) || ...);
}

// run<format, what stands behind BatchNorm>()
template <class Run>
void dispatch(bool bfloat16, int behind, Run run) {
    auto with_format = [&](auto format) {
        if (behind == NOTHING) run(format, std::integral_constant<Behind, NOTHING>{});
        else if (behind == RELU) run(format, std::integral_constant<Behind, RELU>{});
        else run(format, std::integral_constant<Behind, ADD_RELU>{});
    };
    bfloat16 ? with_format(BFloat16{}) : with_format(Float32{});
}

template <class Run>
void dispatch(bool bfloat16, const Tile& tile, Run run) {
    with_grid(Grids{}, tile, [&](auto grid) { bfloat16 ? run(BFloat16{}, grid) : run(Float32{}, grid); });
}

bool is_flat(const Geometry& g) {
    return g.height == 1 && g.width == 1 && g.stride_y == 1 && g.stride_x == 1 && !g.padding_y && !g.padding_x;
}

Map map_of(const Layer& layer, const void* data, int64_t images, int32_t height, int32_t width) {
    int64_t size = layer.bfloat16 ? 2 : 4, plane = images * height * width * size;
    char* bytes = static_cast<char*>(const_cast<void*>(data));
    if (is_flat(layer.geometry))
        return {bytes, plane, 0, UNIT, 1, int32_t((plane + UNIT - 1) / UNIT), images * height * width, true};
    return {bytes, plane, width * images * size, images * size, height, width, images, false};
}

bool can_stream(const Map& map) {  // all units are aligned
    auto aligned = [](int64_t bytes) { return bytes % UNIT == 0; };
    return aligned(reinterpret_cast<int64_t>(map.data)) && aligned(map.channel) && aligned(map.row) && aligned(map.column);
}

void gather_values(Gather& plan, const float* weight, bool bfloat16, int threads) {
    const int64_t count = int64_t(plan.kept.size());
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < count; i++) {
        float value = weight[plan.weights[i]];
        plan.kept[i].value = bfloat16 ? BFloat16::weight(value) : value;
    }
}

void run_outputs(bool bfloat16, const Gather& plan, const Map& in, const Map& out, bool past_caches, int threads,
                 const Epilogue* epilogue = nullptr) {
    dispatch(bfloat16, plan.tile, [&](auto format, auto grid) {
        outputs_of<decltype(format), grid.ROWS, grid.RUN>(plan, in, out, past_caches && can_stream(out), epilogue, threads);
    });
}

std::vector<Entry> entries_of(const Geometry& g, const bool* mask, bool transposed) {
    // sorted by output, or transposed: by input
    std::vector<Entry> entries;
    const int32_t inputs = g.inputs / g.groups, outputs = g.outputs / g.groups, taps = g.height * g.width;
    auto add = [&](int32_t o, int32_t c) {
        const bool* of_pair = mask + (int64_t(o) * inputs + c) * taps;
        for (int32_t t = 0; t < taps; t++) {
            if (!of_pair[t]) continue;
            int32_t channel = o / outputs * inputs + c;
            int64_t at = o * g.strides[0] + c * g.strides[1] + t / g.width * g.strides[2] + t % g.width * g.strides[3];
            entries.push_back(transposed ? Entry{channel, o, t, at} : Entry{o, channel, t, at});
        }
    };
    if (!transposed) {
        for (int32_t o = 0; o < g.outputs; o++)
            for (int32_t c = 0; c < inputs; c++) add(o, c);
    } else {
        for (int32_t channel = 0; channel < g.inputs; channel++)
            for (int32_t o = channel / inputs * outputs, end = o + outputs; o < end; o++) add(o, channel % inputs);
    }
    return entries;
}

// out[y] takes in[(y + padding - tap * dilation) / stride] where that is whole: the same for all y of a residue
std::vector<Residue> plan_input_gradient(const Geometry& g, const bool* mask, Tile tile) {
    const std::vector<Entry> all = entries_of(g, mask, true);
    if (is_flat(g)) tile.columns *= tile.units, tile.units = 1;
    std::vector<Residue> residues;
    for (int32_t y = 0; y < g.stride_y; y++)
        for (int32_t x = 0; x < g.stride_x; x++) {
            std::vector<int32_t> number(g.height * g.width, -1);
            std::vector<Tap> taps;
            for (int32_t t = 0; t < g.height * g.width; t++) {
                int32_t dy = y + g.padding_y - t / g.width * g.dilation_y, dx = x + g.padding_x - t % g.width * g.dilation_x;
                if (dy % g.stride_y || dx % g.stride_x) continue;
                number[t] = int32_t(taps.size());
                taps.push_back({dy / g.stride_y, dx / g.stride_x});
            }
            Residue residue{y, x, {}};
            if (!taps.empty()) {
                std::vector<Entry> entries;
                for (Entry entry : all) {
                    entry.tap = number[entry.tap];
                    if (entry.tap >= 0) entries.push_back(entry);
                }
                residue.plan = plan_gather(entries, taps, g.inputs, g.outputs, 1, 1, tile, false);
            }
            residues.push_back(std::move(residue));
        }
    return residues;
}

std::vector<Tap> taps_of(const Geometry& g) {
    std::vector<Tap> taps;
    for (int32_t y = 0; y < g.height; y++)
        for (int32_t x = 0; x < g.width; x++)
            taps.push_back({y * g.dilation_y - g.padding_y, x * g.dilation_x - g.padding_x});
    return taps;
}

}  // namespace

extern "C" {

// Whether there is code for tiles of so many output rows, and units in a row.
int has_tile(int rows, int run) { return with_grid(Grids{}, Tile{rows, run, 1, 0}, [](auto) {}); }

// mask: (outputs, inputs / groups, height, width). tiles: of the output, the input gradient, the weight gradient. Null
// where a slab is too large for offsets.
Layer* layer_new(const Geometry* geometry, const bool* mask, const Tile* tiles, int bfloat16) {
    const Geometry& g = *geometry;
    const std::vector<Tap> taps = taps_of(g);
    const std::vector<Entry> entries = entries_of(g, mask, false);
    auto plan = [&](Tile tile, bool sparse_rows) {
        if (is_flat(g)) tile.columns *= tile.units, tile.units = 1;
        return plan_gather(entries, taps, g.outputs, g.inputs, g.stride_y, g.stride_x, tile, sparse_rows);
    };
    int64_t numel = int64_t(g.outputs) * (g.inputs / g.groups) * g.height * g.width;
    Layer layer{g, bfloat16 != 0, numel, plan(tiles[0], false), plan(tiles[2], true), plan_input_gradient(g, mask, tiles[1])};
    bool reached = layer.forward.is_reached() && layer.weight.is_reached();
    for (const Residue& residue : layer.input) reached = reached && residue.plan.is_reached();
    return reached ? new Layer(std::move(layer)) : nullptr;
}

// For forward products alone. images and widths: where lanes are pixels, for these; else 0.
Layer* layer_new_forward(const Geometry* geometry, const bool* mask, const Tile* tile, int bfloat16, int64_t images,
                         int64_t in_width, int64_t out_width) {
    const Geometry& g = *geometry;
    Tile shape = *tile;
    if (is_flat(g)) shape.columns *= shape.units, shape.units = 1;
    Layer layer{g, bfloat16 != 0, 0, {}, {}, {}};
    layer.forward = plan_gather(entries_of(g, mask, false), taps_of(g), g.outputs, g.inputs, g.stride_y, g.stride_x, shape,
                                false, {images, in_width, out_width, bfloat16 ? 2 : 4});
    return layer.forward.is_reached() ? new Layer(std::move(layer)) : nullptr;
}

void layer_free(Layer* layer) { delete layer; }

// The weights of layer_infer.
void layer_freeze(Layer* layer, const float* weight, int threads) {
    gather_values(layer->forward, weight, layer->bfloat16, threads);
}

// The forward product with weights that stay. epilogue: null for none.
void layer_infer(Layer* layer, const Size* size, const void* x, const Epilogue* epilogue, void* y, int past_caches, int threads) {
    run_outputs(layer->bfloat16, layer->forward, map_of(*layer, x, size->images, size->in_height, size->in_width),
                map_of(*layer, y, size->images, size->out_height, size->out_width), past_caches, threads, epilogue);
}

// Several such products, each with maps that earlier ones gave.
struct Step {
    Layer* layer;
    Size size;
    Epilogue epilogue;  // `other` is not read
    int32_t input, other, output;  // which of the maps; other: -1 for none
    int32_t past_caches;
};

void layers_infer(const Step* steps, int32_t count, char* const* maps, int threads) {
    for (const Step* step = steps; step < steps + count; step++) {
        Epilogue epilogue = step->epilogue;
        epilogue.other = step->other < 0 ? nullptr : maps[step->other];
        layer_infer(step->layer, &step->size, maps[step->input], &epilogue, maps[step->output], step->past_caches, threads);
    }
}

// The three products. x, y: the maps, whole in memory as (channels, height, width, images).
void layer_forward(Layer* layer, const Size* size, const void* x, const float* weight, void* y, int past_caches, int threads) {
    gather_values(layer->forward, weight, layer->bfloat16, threads);
    layer_infer(layer, size, x, nullptr, y, past_caches, threads);
}

void layer_input_gradient(Layer* layer, const Size* size, const void* dy, const float* weight, void* dx, int past_caches,
                          int threads) {
    const Geometry& g = layer->geometry;
    const Map in = map_of(*layer, dy, size->images, size->out_height, size->out_width);
    const Map all = map_of(*layer, dx, size->images, size->in_height, size->in_width);
    for (Residue& residue : layer->input) {
        Map out = all;
        out.data += residue.y * all.row + residue.x * all.column;
        out.row *= g.stride_y, out.column *= g.stride_x;
        out.height = (all.height - residue.y + g.stride_y - 1) / g.stride_y;
        out.width = (all.width - residue.x + g.stride_x - 1) / g.stride_x;
        if (out.height <= 0 || out.width <= 0) continue;
        if (residue.plan.kept.empty()) {
            int64_t bytes = out.flat ? all.channel : all.images * (layer->bfloat16 ? 2 : 4);
#pragma omp parallel for num_threads(threads)
            for (int32_t c = 0; c < g.inputs; c++)
                for (int32_t y = 0; y < out.height; y++)
                    for (int32_t x = 0; x < (out.flat ? 1 : out.width); x++)
                        memset(out.data + c * out.channel + y * out.row + x * out.column, 0, bytes);
            continue;
        }
        gather_values(residue.plan, weight, layer->bfloat16, threads);
        run_outputs(layer->bfloat16, residue.plan, in, out, past_caches, threads);
    }
}

void layer_weight_gradient(Layer* layer, const Size* size, const void* x, const void* dy, float* gradient, int threads) {
    const Map in = map_of(*layer, x, size->images, size->in_height, size->in_width);
    const Map out = map_of(*layer, dy, size->images, size->out_height, size->out_width);
    dispatch(layer->bfloat16, layer->weight.tile, [&](auto format, auto grid) {
        weight_gradient_of<decltype(format), grid.ROWS, grid.RUN>(layer->weight, in, out, gradient, layer->numel, threads);
    });
}

// Of BatchNorm, see batch_norm.h. Maps as above; statistics: (3, channels). y, other: null but with ADD_RELU.
void batch_norm(const Norm* norm, int bfloat16, const char* x, const char* other, const float* weight, const float* bias,
                char* y, float* statistics, int threads) {
    const Statistics parts{statistics, statistics + norm->channels, statistics + 2 * norm->channels};
    dispatch(bfloat16, norm->behind, [&](auto format, auto behind) {
        norm_forward<decltype(format), behind.value>(*norm, x, other, weight, bias, y, parts, threads);
    });
}

void batch_norm_gradient(const Norm* norm, int bfloat16, const char* dy, const char* x, const char* y, const float* weight,
                         const float* bias, float* statistics, char* dx, char* d_other, float* d_weight, float* d_bias,
                         int threads) {
    const Statistics parts{statistics, statistics + norm->channels, statistics + 2 * norm->channels};
    dispatch(bfloat16, norm->behind, [&](auto format, auto behind) {
        norm_backward<decltype(format), behind.value>(*norm, dy, x, y, weight, bias, parts, dx, d_other, d_weight, d_bias,
                                                      threads);
    });
}

// See max_pool.h.
void max_pool(const Pool* pool, int bfloat16, const char* x, char* y, char* which, int threads) {
    bfloat16 ? max_pool_forward<BFloat16>(*pool, x, y, which, threads) : max_pool_forward<Float32>(*pool, x, y, which, threads);
}

void max_pool_gradient(const Pool* pool, int bfloat16, const char* dy, const char* which, char* dx, int threads) {
    bfloat16 ? max_pool_backward<BFloat16>(*pool, dy, which, dx, threads)
             : max_pool_backward<Float32>(*pool, dy, which, dx, threads);
}

// size: bytes of an element, 2 or 4. innermost: whether to (channels, pixels, images), else from it.
void transpose_maps(void* maps, void* other, int64_t images, int64_t channels, int64_t pixels, int size, int channels_last,
                    int innermost, int threads) {
    auto run = [&](auto element, auto direction) {
        using T = decltype(element);
        transpose<T, direction.value>(static_cast<T*>(maps), static_cast<T*>(other), images, channels, pixels, channels_last,
                                      threads);
    };
    if (size == 4) innermost ? run(uint32_t{}, std::true_type{}) : run(uint32_t{}, std::false_type{});
    else innermost ? run(uint16_t{}, std::true_type{}) : run(uint16_t{}, std::false_type{});
}

}  // extern "C"
