#include "core/error.h"

#include "fasa.h"

#include <cstdarg>
#include <cstdio>
#include <string>

static thread_local std::string fasa_error_text;

int fasa_set_error(const char * fmt, ...) {
    char text[1024];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    fasa_error_text = text;
    return -1;
}

const char * fasa_error(void) {
    return fasa_error_text.c_str();
}
