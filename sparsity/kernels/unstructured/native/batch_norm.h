// BatchNorm in training, with what stands behind it: y = relu(scale * x + shift + other).
//
// A channel of (channels, height, width, images) is one run of `count` numbers. One thread takes it at a time: what
// its first pass over the channel has read, its second finds in the cache. Results do not depend on the number of
// threads. `count` is a multiple of a unit's images.
#pragma once
#include <cmath>

#include "vector.h"

enum Behind { NOTHING, RELU, ADD_RELU };  // BatchNorm

struct Norm {
    int64_t channels, count;
    float epsilon;
    int32_t behind, past_caches;  // past_caches: results are written past them
};

struct Statistics {  // of each channel
    float *mean, *inverse, *variance;  // inverse: of the standard deviation; variance: unbiased, for running statistics
};

struct Channel {  // x -> scale * x + shift
    float mean, scale, shift;

    Channel(float mean, float inverse, float weight, float bias)
        : mean(mean), scale(weight * inverse), shift(bias - weight * inverse * mean) {}
    Floats operator()(Floats x) const { return scale * x + shift; }
};

inline double total(Floats vector) {
    double sum = 0;
    for (int i = 0; i < LANES; i++) sum += vector[i];
    return sum;
}

inline Floats positive(Floats value) { return value < 0 ? Floats{} : value; }  // NaN stays NaN

inline void put(char* to, Words unit, bool past_caches) { past_caches ? stream(to, unit) : store(to, unit); }

// run(at, sums): for each unit of a channel, at its bytes from the first. Sums in float32 reach over few units, then
// go on as doubles.
template <int SUMS, class E, class Run>
void sum_over(int64_t count, double* totals, Run run) {
    constexpr int64_t FEW = 64;
    const int64_t end = count * E::SIZE;
    std::fill(totals, totals + SUMS, 0.0);
    for (int64_t begin = 0; begin < end; begin += FEW * UNIT) {
        Floats sums[SUMS][E::PARTS] = {};
        for (int64_t at = begin; at < std::min(end, begin + FEW * UNIT); at += UNIT) run(at, sums);
        for (int s = 0; s < SUMS; s++)
            for (int p = 0; p < E::PARTS; p++) totals[s] += total(sums[s][p]);
    }
}

template <class E, Behind BEHIND>
void norm_forward(const Norm& norm, const char* x, const char* other, const float* weight, const float* bias, char* y,
                  const Statistics& statistics, int threads) {
    const int64_t bytes = norm.count * E::SIZE;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t c = 0; c < norm.channels; c++) {
        const char *from = x + c * bytes, *summand = other + (BEHIND == ADD_RELU ? c * bytes : 0);
        Floats first[E::PARTS];
        E::widen(load<Words>(from), first);
        const float near = float(total(first[0]) / LANES);  // of the mean: keeps squares small
        double totals[2];
        sum_over<2, E>(norm.count, totals, [&](int64_t at, auto& sums) {
            Floats parts[E::PARTS];
            E::widen(load<Words>(from + at), parts);
            UNROLL for (int p = 0; p < E::PARTS; p++) {
                const Floats difference = parts[p] - near;
                sums[0][p] += difference;
                sums[1][p] += difference * difference;
            }
        });
        const double mean = totals[0] / norm.count, variance = std::max(totals[1] / norm.count - mean * mean, 0.0);
        statistics.mean[c] = float(near + mean);
        statistics.inverse[c] = float(1 / std::sqrt(variance + norm.epsilon));
        statistics.variance[c] = float(variance * norm.count / std::max<int64_t>(norm.count - 1, 1));
        const Channel channel(statistics.mean[c], statistics.inverse[c], weight[c], bias[c]);
        for (int64_t at = 0; at < bytes; at += UNIT) {
            Floats parts[E::PARTS], added[E::PARTS];
            E::widen(load<Words>(from + at), parts);
            if (BEHIND == ADD_RELU) E::widen(load<Words>(summand + at), added);
            UNROLL for (int p = 0; p < E::PARTS; p++) {
                parts[p] = channel(parts[p]);
                if (BEHIND == ADD_RELU) parts[p] += added[p];
                if (BEHIND != NOTHING) parts[p] = positive(parts[p]);
            }
            put(y + c * bytes + at, E::round(parts), norm.past_caches);
        }
        if (norm.past_caches) end_of_stream();
    }
}

// y: with ADD_RELU, the output. dx, d_other (with ADD_RELU): the gradients of x and other.
template <class E, Behind BEHIND>
void norm_backward(const Norm& norm, const char* dy, const char* x, const char* y, const float* weight, const float* bias,
                   const Statistics& statistics, char* dx, char* d_other, float* d_weight, float* d_bias, int threads) {
    const int64_t bytes = norm.count * E::SIZE;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t c = 0; c < norm.channels; c++) {
        const float mean = statistics.mean[c], inverse = statistics.inverse[c];
        const Channel channel(mean, inverse, weight[c], bias[c]);
        // The gradient behind BatchNorm itself, and x
        auto read = [&](int64_t at, Floats* gradient, Floats* input) {
            E::widen(load<Words>(dy + c * bytes + at), gradient);
            E::widen(load<Words>(x + c * bytes + at), input);
            if (BEHIND == NOTHING) return;
            Floats output[E::PARTS];
            if (BEHIND == ADD_RELU) E::widen(load<Words>(y + c * bytes + at), output);
            UNROLL for (int p = 0; p < E::PARTS; p++) {
                if (BEHIND == RELU) output[p] = channel(input[p]);
                gradient[p] = output[p] <= 0 ? Floats{} : gradient[p];
            }
        };
        double totals[2];
        sum_over<2, E>(norm.count, totals, [&](int64_t at, auto& sums) {
            Floats gradient[E::PARTS], input[E::PARTS];
            read(at, gradient, input);
            UNROLL for (int p = 0; p < E::PARTS; p++) {
                sums[0][p] += gradient[p];
                sums[1][p] += gradient[p] * (input[p] - mean);
            }
        });
        d_bias[c] = float(totals[0]), d_weight[c] = float(totals[1] * inverse);
        // dx = scale * (g - mean of g - (x - mean) * inverse^2 * mean of g (x - mean))
        const float of_input = float(-channel.scale * inverse * inverse * totals[1] / norm.count);
        const float constant = float(-channel.scale * totals[0] / norm.count) - of_input * mean;
        for (int64_t at = 0; at < bytes; at += UNIT) {
            Floats gradient[E::PARTS], input[E::PARTS];
            read(at, gradient, input);
            if (BEHIND == ADD_RELU) put(d_other + c * bytes + at, E::round(gradient), norm.past_caches);
            UNROLL for (int p = 0; p < E::PARTS; p++) input[p] = channel.scale * gradient[p] + (of_input * input[p] + constant);
            put(dx + c * bytes + at, E::round(input), norm.past_caches);
        }
        if (norm.past_caches) end_of_stream();
    }
}
