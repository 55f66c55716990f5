#pragma once

// What a ubatch is: a prompt, or a decode step, whose tokens continue sequences that are being generated (a sampled
// token, or drafts behind it). Counted here too, once a ubatch is computed.

#include "core/counters.h"
#include "core/tiles.h"
#include "fasa.h"

#include "llama.h"

#include <atomic>
#include <condition_variable>
#include <map>
#include <mutex>
#include <vector>

class llama_kv_cache;
struct llama_ubatch;

// One at a time: a llama_decode, or a change of settings. Not a mutex, which the thread that holds it may not try.
struct fasa_turn {
    void take() {
        std::unique_lock<std::mutex> lock(mutex);
        free.wait(lock, [&] { return !taken; });
        taken = true;
    }

    bool try_take() {
        std::lock_guard<std::mutex> lock(mutex);
        const bool got = !taken;
        taken          = true;
        return got;
    }

    void give() {
        {
            std::lock_guard<std::mutex> lock(mutex);
            taken = false;
        }
        free.notify_one();
    }

private:
    std::mutex mutex;
    std::condition_variable free;
    bool taken = false;
};

// Sequence by sequence: its tokens continue it when all ask for output, it has cells before them, they are at most
// max_tokens, and there is one of them or drafts are expected. Drafts are expected once a single token continued the
// sequence, or its prompt had tokens that asked for no output: who asks for the logits of a whole prompt shows nothing.
struct fasa_steps {
    std::atomic<int32_t> said{ FASA_STEP_AUTO }; // by fasa_set_step

    // whether a ubatch, whose cells are placed in kv, is a decode step; remembered for the next one
    bool decodes(const llama_ubatch & ubatch, const llama_kv_cache & kv, uint32_t max_tokens);

private:
    std::map<llama_seq_id, llama_pos> drafts; // sequences that expect drafts, and the first position behind their last
                                              // token: beyond it the sequence is not the one that was seen
};

// a ubatch while it is computed
struct fasa_pending {
    bool active              = false; // false: a graph that is built now only reserves memory
    bool decodes             = false;
    bool continues           = false;              // a ubatch of the same batch came before it
    bool waits               = false;              // layers on GPUs wait for a longer context
    fasa_reason dense_reason = FASA_REASON_NONE;   // of the step as a whole
    std::vector<fasa_tile> tiles;                  // of a prompt, while FASA is on
    uint32_t n_seen            = 0;                // of a prompt: most cells that a token sees, by its position
    fasa_reason prefill_reason = FASA_REASON_NONE; // of a prompt: why it, or a layer in it, is dense
    fasa_step_counts counts;
};
