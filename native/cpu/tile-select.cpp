// SELECT of sparse prefill: the cells that a tile attends, from the scores of its TIP. Definition: tile_forced of
// fasa_gguf/reference_prefill.py and select of fasa_gguf/reference.py.

#include "core/select.h"
#include "cpu/nodes.h"
#include "cpu/rows.h"
#include "ops/tile.h"

#include <algorithm>
#include <memory>
#include <vector>

struct fasa_tile_select_work { // one per thread
    fasa_keys keys;
    fasa_candidates candidates;
};

// the keys of the heads [head, head + n_group), whose scores are added up
static void fasa_tile_select_keys(
    const ggml_tensor * tip, const int8_t * view, int64_t head, int64_t n_group, int64_t tile, fasa_keys & keys) {
    const int64_t n_kv = tip->ne[0], stride = tip->nb[1] / sizeof(float);
    const float * row = (const float *) fasa_at(tip, head, tile, 0);
    keys.reset(n_kv);
    for (int64_t c = 0; c < (int64_t) keys.key.size(); ++c) {
        uint32_t key = FASA_KEY_HIDDEN;
        if (c < n_kv && view[c] != FASA_SEEN_BY_NONE) {
            float sum = 0.0f;
            for (int64_t g = 0; g < n_group; ++g) {
                sum += row[g * stride + c];
            }
            key = fasa_key(sum);
            keys.n_visible++;
        }
        keys.key[c]   = key;
        uint32_t & at = keys.most[c / FASA_BLOCK];
        at            = c % FASA_BLOCK == 0 ? key : std::max(at, key);
    }
}

void fasa_cpu_tile_select(ggml_tensor * dst, const fasa_op_params & p, int ith, int nth) {
    const ggml_tensor *tip = dst->src[0], *forced = dst->src[1], *tiles = dst->src[2], *view = dst->src[3];
    const int64_t n_kv = tip->ne[0], n_list = dst->ne[1], n_group = tip->ne[1] / n_list;

    thread_local const auto work = std::make_unique<fasa_tile_select_work>();
    uint64_t attended = 0, visible = 0;
    for (int64_t i = ith; i < n_list * dst->ne[2]; i += nth) {
        const int64_t h = i % n_list, tile = i / n_list;
        auto & keys = work->keys;
        fasa_tile_select_keys(tip, (const int8_t *) fasa_at(view, tile, 0, 0), h * n_group, n_group, tile, keys);
        const int32_t * cells = (const int32_t *) fasa_at(forced, tile, 0, 0);
        for (int64_t j = 0; j < forced->ne[0]; ++j) {
            if (cells[j] >= 0 && cells[j] < n_kv) {
                keys.force(cells[j]);
            }
        }
        int32_t * list  = (int32_t *) fasa_at(dst, h, tile, 0);
        const int n_row = n_group * fasa_tile_at(tiles, tile).count;
        list[0]         = fasa_select(keys, n_row, { p.budget, p.mass, p.floor, p.cap }, list + 1, work->candidates);
        attended += list[0];
        visible += keys.n_visible;
    }
    if (auto * stats = fasa_op_layer(dst).stats) {
        stats->prefill_attended += attended;
        stats->prefill_visible += visible;
    }
}
