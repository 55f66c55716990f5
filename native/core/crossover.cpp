#include "core/crossover.h"

#include <algorithm>
#include <cmath>

static constexpr double FASA_FARTHEST = 8; // times the last depth: farther a line says nothing

std::vector<fasa_depth_times> fasa_measure_depths(
    const std::vector<uint32_t> & depths, const std::function<bool(fasa_depth_times &)> & time) {
    std::vector<fasa_depth_times> out;
    int faster = 0;
    for (const uint32_t n : depths) {
        fasa_depth_times t = { n, 0.0, 0.0 };
        if (!time(t)) {
            break;
        }
        out.push_back(t);
        faster = t.fasa < t.dense ? faster + 1 : 0;
        if (faster == 2) {
            break;
        }
    }
    return out;
}

uint32_t fasa_crossover_of(const std::vector<fasa_depth_times> & measured) {
    if (measured.size() < 2) {
        return 0;
    }
    const auto gain = [](const fasa_depth_times & t) {
        return t.dense - t.fasa;
    };
    size_t first = measured.size(); // from which it is faster
    while (first > 0 && gain(measured[first - 1]) > 0) {
        first--;
    }
    if (first == 0) {
        return measured[0].n_cells;
    }
    const auto & b = first < measured.size() ? measured[first] : measured.back();
    const auto & a = first < measured.size() ? measured[first - 1] : measured[measured.size() - 2];
    if (gain(b) <= gain(a)) {
        return FASA_NEVER;
    }
    const double per_cell = (gain(b) - gain(a)) / (b.n_cells - a.n_cells);
    const double at       = b.n_cells - gain(b) / per_cell;
    if (at > FASA_FARTHEST * measured.back().n_cells) {
        return FASA_NEVER;
    }
    return (uint32_t) std::ceil(at / 256) * 256; // what a graph sees of a cache is a multiple of 256
}
