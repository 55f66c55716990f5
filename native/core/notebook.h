#pragma once

// Numbers that were measured once, in the user's cache: $XDG_CACHE_HOME/fasa_gguf, or ~/.cache/fasa_gguf.

#include <cstdint>
#include <string>

// One number under a key, a file of its own. A file that cannot be read, or holds something else, counts as none.
struct fasa_notebook {
    fasa_notebook(const char * kind, const std::string & key); // key: any text in one line

    bool read(uint32_t & value) const;
    // written to another file and renamed, so nobody reads half of it; false: `why` says so
    bool write(uint32_t value, std::string & why) const;

    // Held while the number is measured, so that no other process measures it at the same time. It waits a few seconds
    // at most.
    struct turn {
        explicit turn(const fasa_notebook & book);
        ~turn();
        turn(const turn &)             = delete;
        turn & operator=(const turn &) = delete;

    private:
        int file = -1;
    };

private:
    std::string folder, path, text; // path "": there is no such folder
};
