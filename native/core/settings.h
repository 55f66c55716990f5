#pragma once

// The settings as a table: the rows of fasa_gguf/params.py. Whoever reads settings from somewhere loops over them.

#include "fasa.h"

#include <cstddef>

struct fasa_setting {
    enum kind { INT32, UINT32, FLOAT };

    const char * name;
    kind type;
    size_t offset; // in fasa_params
    double initial, low, high;

    double get(const fasa_params & p) const;
    void set(fasa_params & p, double value) const; // value: from low to high
};

extern const fasa_setting FASA_SETTING_ROWS[];
extern const size_t FASA_N_SETTINGS;

// -1 and fasa_error() when a value is out of its row's range, or two settings do not go together
int fasa_check_params(const fasa_params & p);
