#pragma once

// Set the message that fasa_error() returns on this thread; always returns -1, so that callers can return it.
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
int fasa_set_error(const char * fmt, ...);
