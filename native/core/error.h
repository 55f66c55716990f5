#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <new>

// Set the message that fasa_error() returns on this thread; always returns -1, so that callers can return it.
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
int fasa_set_error(const char * fmt, ...);

// a pointer of the caller's, or -1 with the reason
inline int fasa_check_given(const void * p, const char * name) {
    return p == nullptr ? fasa_set_error("%s: expected a pointer, found NULL", name) : 0;
}

// a number of the caller's, or -1 with the reason
inline int fasa_check_range(const char * name, int64_t value, int64_t low, int64_t high) {
    return value >= low && value <= high ? 0 :
                                           fasa_set_error("%s: expected a number from %lld to %lld, found %lld", name,
                                               (long long) low, (long long) high, (long long) value);
}

// f(), which may run out of memory or threads: an exception must not cross the C interface
template <typename F>
int fasa_guard(const char * name, F f) {
    try {
        return f();
    } catch (const std::bad_alloc &) {
        return fasa_set_error("%s: out of memory", name);
    } catch (const std::exception & e) {
        return fasa_set_error("%s: %s", name, e.what());
    }
}

static constexpr int64_t FASA_MOST_THREADS = 512; // GGML_MAX_N_THREADS

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
