// Loads an operator exported by `negtome-fast export` with the CUDA driver API, runs it on random
// tokens and compares every token with a computation in double precision on the CPU.
//
//     negtome-fast export --target sm_90 --dtype bf16 --channels 3072 --out exported
//     g++ -std=c++17 -O2 -I exported -I $CUDA_HOME/include negtome.cpp -lcuda -o negtome
//     ./negtome exported [ITEMS TOKENS CHANNELS]
//
// Exit code 0: every token is right. For exports with the default choices (reference "first",
// matching "paper", no masks); in place or not, of any target and dtype.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "negtome.h"

#if NEGTOME_HIP || !NEGTOME_FIRST || NEGTOME_OFFICIAL || NEGTOME_SUM || NEGTOME_REFERENCE_MASK || \
    NEGTOME_SOURCE_MASK
#error "this example is for CUDA and an export with the default choices"
#endif

namespace {

// ---------------------------------------------------------------------------------------------
// Tokens of the exported dtype
// ---------------------------------------------------------------------------------------------
#if NEGTOME_FLOAT32
using Element = float;
constexpr double kEpsilon = 1.0 / (1 << 23);
double to_double(Element value) { return value; }
Element from_double(double value) { return static_cast<Element>(value); }
#elif NEGTOME_BFLOAT16
using Element = uint16_t;
constexpr double kEpsilon = 1.0 / (1 << 7);
double to_double(Element value) {
    uint32_t bits = static_cast<uint32_t>(value) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}
Element from_double(double value) {
    float narrow = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &narrow, sizeof bits);
    return static_cast<Element>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
#else
using Element = uint16_t;
constexpr double kEpsilon = 1.0 / (1 << 10);
double to_double(Element value) {
    int sign = value >> 15, exponent = (value >> 10) & 31, fraction = value & 1023;
    double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
    return sign ? -size : size;
}
Element from_double(double value) {  // for sizes between 2^-14 and 65504; smaller ones become 0
    int exponent;
    double fraction = std::frexp(std::fabs(value), &exponent);
    if (exponent < -13) return std::signbit(value) ? 0x8000 : 0;
    long units = std::lrint(fraction * 2048.0);  // 1024..2048
    long bits = ((exponent + 13L) << 10) + units;
    return static_cast<Element>(bits | (std::signbit(value) ? 0x8000 : 0));
}
#endif

struct Shape {
    int items = 4, tokens = 512, channels = NEGTOME_CHANNELS;
    size_t token(int item, int token) const {
        return (static_cast<size_t>(item) * tokens + token) * channels;
    }
    size_t elements() const { return token(items, 0); }
};

// Tokens near a pattern that all items share, so that matches exist on both sides of a threshold.
std::vector<Element> random_tokens(const Shape &shape) {
    std::mt19937 generator(0);
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> uniform;
    std::vector<double> pattern(static_cast<size_t>(shape.tokens) * shape.channels);
    for (double &value : pattern) value = normal(generator);
    std::vector<Element> tokens(shape.elements());
    for (int item = 0; item < shape.items; ++item)
        for (int token = 0; token < shape.tokens; ++token) {
            double strength = 2.5 * uniform(generator);
            for (int d = 0; d < shape.channels; ++d)
                tokens[shape.token(item, token) + d] = from_double(
                    strength * pattern[static_cast<size_t>(token) * shape.channels + d] +
                    normal(generator));
        }
    return tokens;
}

// ---------------------------------------------------------------------------------------------
// The same on the CPU
// ---------------------------------------------------------------------------------------------
struct Report {
    long pushed = 0, wrong = 0;
};

// Every token against fp64: its match must be the best one, or as good to the rounding of fp32; the
// decision must follow the threshold, the output the formula, rounded once.
Report check(const Shape &shape, const std::vector<Element> &before,
    const std::vector<Element> &after, const std::vector<int64_t> &pushed, double alpha,
    double threshold) {
    std::vector<double> wide(before.size());
    for (size_t i = 0; i < before.size(); ++i) wide[i] = to_double(before[i]);
    std::vector<double> norm(static_cast<size_t>(shape.items) * shape.tokens);
    for (size_t i = 0; i < norm.size(); ++i) {
        double squares = 0.0;
        for (int d = 0; d < shape.channels; ++d) {
            double value = wide[i * shape.channels + d];
            squares += value * value;
        }
        norm[i] = std::max(std::sqrt(squares), 1e-12);
    }
    const double tolerance = (8.0 + 4.0 * std::sqrt(shape.channels)) / (1 << 23);
    Report report;
    for (int item = 0; item < shape.items; ++item)
        for (int token = 0; token < shape.tokens; ++token) {
            const size_t row = static_cast<size_t>(item) * shape.tokens + token;
            const size_t at = shape.token(item, token);
            const int64_t chosen = pushed[row];
            double best = -2.0, of_chosen = -2.0;
            for (int other = 0; item > 0 && other < shape.tokens; ++other) {
                double product = 0.0;
                const double *r = &wide[shape.token(0, other)];
                for (int d = 0; d < shape.channels; ++d) product += wide[at + d] * r[d];
                double cosine = product / (norm[row] * norm[other]);
                best = std::max(best, cosine);
                if (other == chosen) of_chosen = cosine;
            }
            bool right;
            if (chosen < 0) {  // item 0, or below the threshold: bit-identical
                right = best <= threshold + tolerance &&
                    std::memcmp(&before[at], &after[at], shape.channels * sizeof(Element)) == 0;
            } else {
                ++report.pushed;
                right = item > 0 && chosen < shape.tokens && best - of_chosen <= tolerance &&
                    of_chosen > threshold - tolerance;
                for (int d = 0; right && d < shape.channels; ++d) {
                    double r = wide[shape.token(0, static_cast<int>(chosen)) + d];
                    double expected = wide[at + d] + alpha * (wide[at + d] - r);
                    // Half a unit of the dtype, and the rounding of three operations in fp32.
                    double size = std::fabs(expected) + std::fabs(wide[at + d]) + std::fabs(r);
                    double allowed = 0.501 * kEpsilon * std::fabs(expected) + 4.0 * size / (1 << 23);
                    if (NEGTOME_ELEMENT_BYTES == 2) allowed += 6.2e-5;  // smallest normal of fp16
                    right = std::fabs(to_double(after[at + d]) - expected) <= allowed;
                }
            }
            report.wrong += !right;
        }
    return report;
}

// ---------------------------------------------------------------------------------------------
// On the GPU
// ---------------------------------------------------------------------------------------------
void require(CUresult result, const char *what) {
    if (result == CUDA_SUCCESS) return;
    const char *text = nullptr;
    cuGetErrorString(result, &text);
    std::fprintf(stderr, "%s: %s\n", what, text ? text : "unknown error");
    std::exit(2);
}

CUdeviceptr allocate(size_t bytes) {
    CUdeviceptr pointer = 0;
    require(cuMemAlloc(&pointer, bytes), "cuMemAlloc");
    return pointer;
}

CUdeviceptr upload(const void *host, size_t bytes) {
    CUdeviceptr pointer = allocate(bytes);
    require(cuMemcpyHtoD(pointer, host, bytes), "cuMemcpyHtoD");
    return pointer;
}

}  // namespace

int main(int count, char **arguments) {
    if (count != 2 && count != 5) {
        std::fprintf(stderr, "usage: %s FOLDER [ITEMS TOKENS CHANNELS]\n", arguments[0]);
        return 2;
    }
    Shape shape;
    if (count == 5) {
        shape.items = std::atoi(arguments[2]);
        shape.tokens = std::atoi(arguments[3]);
        shape.channels = std::atoi(arguments[4]);
    }

    // A context, and the kernels in it
    CUdevice device;
    CUcontext context;
    require(cuInit(0), "cuInit");
    require(cuDeviceGet(&device, 0), "cuDeviceGet");
    require(cuDevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain");
    require(cuCtxSetCurrent(context), "cuCtxSetCurrent");
    negtome_operator op;
    require(negtome_load(&op, arguments[1]), "negtome_load");

    // A problem
    const float alpha = 0.9f, threshold = 0.65f;
    const std::vector<Element> before =
        shape.items > 0 && shape.tokens > 0 && shape.channels > 0 ? random_tokens(shape)
                                                                  : std::vector<Element>(1);
    const size_t bytes = before.size() * sizeof(Element);
    const size_t rows = static_cast<size_t>(std::max(shape.items, 1)) * std::max(shape.tokens, 1);
    std::vector<int64_t> pushed(rows);
    negtome_problem problem = {};
    problem.items = shape.items;
    problem.tokens = shape.tokens;
    problem.channels = shape.channels;
    problem.x = upload(before.data(), bytes);
    problem.out = NEGTOME_INPLACE ? problem.x : allocate(bytes);
    problem.alpha = upload(&alpha, sizeof alpha);
    problem.threshold = upload(&threshold, sizeof threshold);
    problem.pushed = allocate(rows * sizeof pushed[0]);
    if (const char *wrong = negtome_check(&problem)) {
        std::fprintf(stderr, "%s\n", wrong);
        return 2;
    }

    // Launch, wait, compare
    const size_t scratch = negtome_workspace_bytes(&problem);
    const CUdeviceptr workspace = allocate(scratch);
    require(negtome_launch(&op, &problem, workspace, scratch, nullptr), "negtome_launch");
    require(cuCtxSynchronize(), "cuCtxSynchronize");
    std::vector<Element> after(before.size());
    require(cuMemcpyDtoH(after.data(), problem.out, bytes), "cuMemcpyDtoH");
    require(cuMemcpyDtoH(pushed.data(), problem.pushed, rows * sizeof pushed[0]), "cuMemcpyDtoH");
    require(negtome_unload(&op), "negtome_unload");
    const Report report = check(shape, before, after, pushed, alpha, threshold);
    std::printf("%s %s, %d x %d x %d: %ld tokens pushed, %ld wrong\n", NEGTOME_TARGET, NEGTOME_DTYPE,
        shape.items, shape.tokens, shape.channels, report.pushed, report.wrong);
    return report.wrong || !report.pushed ? 1 : 0;
}
