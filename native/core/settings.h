#pragma once

// The settings as a table: the rows of fasa_gguf/params.py. Whoever reads settings from somewhere loops over them.

#include "fasa.h"

#include <cstddef>
#include <string>
#include <vector>

struct fasa_setting {
    enum kind { INT32, UINT32, FLOAT };

    const char * name;
    kind type;
    size_t offset; // in fasa_params
    double initial, low, high;
    const char * names; // "auto off on", by value; "": a number

    double get(const fasa_params & p) const;
    void set(fasa_params & p, double value) const; // value: from low to high
    bool is_named() const { return *names != '\0'; }
    std::string text(double value) const; // as it is written: a name, or a number
};

extern const fasa_setting FASA_SETTING_ROWS[];
extern const size_t FASA_N_SETTINGS;

// the words of `names`
std::vector<std::string> fasa_words(const char * names);

// -1 and fasa_error() when a value is out of its row's range, or two settings do not go together
int fasa_check_params(const fasa_params & p);
