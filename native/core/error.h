#pragma once

#include <cstddef>

// Set the message that fasa_error() returns on this thread; always returns -1, so that callers can return it.
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
int fasa_set_error(const char * fmt, ...);

// a struct of the caller's, or -1 with the reason
template <typename T>
int fasa_check_size(const T * s, const char * name) {
    if (s == nullptr) {
        return fasa_set_error("%s: expected a struct, found NULL", name);
    }
    if (s->size != sizeof(T)) {
        return fasa_set_error("%s: expected a struct of %zu bytes, found %zu: the header and the library differ", name,
            sizeof(T), (size_t) s->size);
    }
    return 0;
}
