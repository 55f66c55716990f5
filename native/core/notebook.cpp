#include "core/notebook.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

#if defined(_WIN32)
#    include <process.h>
#    define getpid _getpid
#else
#    include <fcntl.h>
#    include <sys/file.h>
#    include <unistd.h>
#endif

namespace fs = std::filesystem;

static constexpr int FASA_TURN_MS = 5000;

static fs::path fasa_cache_folder() {
    const char * given = getenv("XDG_CACHE_HOME");
    if (given && *given) {
        return fs::path(given) / "fasa_gguf";
    }
    const char * home = getenv("HOME");
    home              = home && *home ? home : getenv("USERPROFILE");
    return home && *home ? fs::path(home) / ".cache" / "fasa_gguf" : fs::path();
}

// FNV-1a
static std::string fasa_name_of(const std::string & text) {
    uint64_t h = 14695981039346656037ull;
    for (const unsigned char c : text) {
        h = (h ^ c) * 1099511628211ull;
    }
    char name[20];
    snprintf(name, sizeof(name), "%016llx", (unsigned long long) h);
    return name;
}

fasa_notebook::fasa_notebook(const char * kind, const std::string & key) : text(key) {
    for (char & c : text) {
        c = c == '\n' || c == '\r' ? ' ' : c;
    }
    const auto at = fasa_cache_folder();
    if (!at.empty()) {
        folder = (at / kind).string();
        path   = (at / kind / fasa_name_of(text)).string();
    }
}

bool fasa_notebook::read(uint32_t & value) const {
    std::ifstream file(path);
    std::string key, line, more;
    if (path.empty() || !std::getline(file, key) || key != text || !std::getline(file, line) || file.peek() != EOF ||
        line.empty() || line.size() > 10 || line.find_first_not_of("0123456789") != std::string::npos) {
        return false;
    }
    const unsigned long long found = strtoull(line.c_str(), nullptr, 10);
    value                          = (uint32_t) found;
    return found > 0 && found <= INT32_MAX;
}

bool fasa_notebook::write(uint32_t value, std::string & why) const {
    if (path.empty()) {
        why = "there is no home directory to keep it in";
        return false;
    }
    std::error_code error;
    fs::create_directories(folder, error);
    const std::string mine = path + "." + std::to_string(getpid());
    bool done              = false;
    {
        std::ofstream file(mine, std::ios::trunc);
        file << text << "\n" << value << "\n";
        file.close();
        done = !file.fail();
    }
    if (done) {
        fs::rename(mine, path, error);
        done = !error;
    }
    if (!done) {
        std::error_code ignored;
        fs::remove(mine, ignored);
        why = folder + " cannot be written";
    }
    return done;
}

fasa_notebook::turn::turn(const fasa_notebook & book) {
#if !defined(_WIN32)
    if (book.path.empty()) {
        return;
    }
    std::error_code error;
    fs::create_directories(book.folder, error);
    file = open((book.folder + "/lock").c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
    for (int ms = 0; file >= 0 && flock(file, LOCK_EX | LOCK_NB) != 0 && ms < FASA_TURN_MS; ms += 20) {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
#else
    (void) book;
#endif
}

fasa_notebook::turn::~turn() {
#if !defined(_WIN32)
    if (file >= 0) {
        close(file); // which gives the lock back
    }
#endif
}
