#pragma once

#include "llama/state.h"

// Look up the mass that p.mean_budget means and put it into p.mass; nothing to do without a mean budget. -1: the
// profile's table does not have it, and fasa_error() says so.
int fasa_find_mass(const fasa_known & known, fasa_params & p);
