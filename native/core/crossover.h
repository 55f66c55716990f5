#pragma once

// From how many cells on FASA is faster than dense attention, by times at a few depths.

#include <cstdint>
#include <functional>
#include <vector>

// seconds at a depth; `fasa` includes all that FASA adds in place of dense attention
struct fasa_depth_times {
    uint32_t n_cells;
    double dense, fasa;
};

static constexpr uint32_t FASA_GPU_LIMIT = 16384;     // where nothing can be measured: cards with HBM
static constexpr uint32_t FASA_NEVER     = INT32_MAX; // no depth: FASA is not gaining on dense

// Measures depths in turn, ascending, until FASA was faster at two in a row or `time` says no (out of memory or of
// time). What was measured
std::vector<fasa_depth_times> fasa_measure_depths(
    const std::vector<uint32_t> & depths, const std::function<bool(fasa_depth_times &)> & time);

// The depth, a multiple of 256, from which FASA is faster at all that were measured: between two of them, or behind the
// last one, by a straight line. The first one when FASA was faster there already; 0: fewer than two were measured.
uint32_t fasa_crossover_of(const std::vector<fasa_depth_times> & measured);
