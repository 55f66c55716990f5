#include "llama/ahead.h"

#include "ggml-impl.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <set>

static constexpr int FASA_MOST_MATMUL = 4; // in a copy: W_q, a LoRA's two, a rotation

static bool fasa_is_view_op(const ggml_tensor * t) {
    return t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_PERMUTE || t->op == GGML_OP_TRANSPOSE;
}

// a weight, an input of the graph, or a view of one: nothing that the graph computes
static bool fasa_is_leaf(const ggml_tensor * t) {
    while (t->op != GGML_OP_NONE) {
        if (!fasa_is_view_op(t)) {
            return false;
        }
        t = t->src[0];
    }
    return true;
}

// ---- finding the residual ----

// What a walk from a tensor back to its sources has still to visit. Tensors of one context lie in the order in which
// they were made, so the last one depends on none of the others.
struct fasa_walk {
    std::set<ggml_tensor *> open;

    explicit fasa_walk(ggml_tensor * from) { open.insert(from); }

    // all that is left depends on this one tensor; nullptr: several
    ggml_tensor * only() const { return open.size() == 1 ? *open.begin() : nullptr; }

    ggml_tensor * pop() {
        ggml_tensor * last = *open.rbegin();
        open.erase(last);
        for (ggml_tensor * src : last->src) {
            if (src && !fasa_is_leaf(src)) {
                open.insert(src);
            }
        }
        return last;
    }
};

static int fasa_n_computed(const ggml_tensor * t) {
    return (int) std::count_if(
        std::begin(t->src), std::end(t->src), [](const ggml_tensor * src) { return src && !fasa_is_leaf(src); });
}

// An op that works on every token for itself, as a feed-forward does. What mixes tokens is in a block of its own:
// attention, convolutions, state spaces.
static bool fasa_is_tokenwise(const ggml_tensor * t) {
    switch (t->op) {
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID: return fasa_is_leaf(t->src[0]);
        case GGML_OP_SOFT_MAX: return t->src[1] == nullptr;
        case GGML_OP_DUP:
        case GGML_OP_ADD:
        case GGML_OP_ADD_ID:
        case GGML_OP_ADD1:
        case GGML_OP_SUB:
        case GGML_OP_MUL:
        case GGML_OP_DIV:
        case GGML_OP_SQR:
        case GGML_OP_SQRT:
        case GGML_OP_LOG:
        case GGML_OP_SUM_ROWS:
        case GGML_OP_REPEAT:
        case GGML_OP_CONCAT:
        case GGML_OP_NORM:
        case GGML_OP_RMS_NORM:
        case GGML_OP_L2_NORM:
        case GGML_OP_SCALE:
        case GGML_OP_CLAMP:
        case GGML_OP_CONT:
        case GGML_OP_CPY:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
        case GGML_OP_GET_ROWS:
        case GGML_OP_SET_ROWS:
        case GGML_OP_FILL:
        case GGML_OP_ARGSORT:
        case GGML_OP_TOP_K:
        case GGML_OP_UNARY:
        case GGML_OP_GLU: return true;
        default: return false;
    }
}

static bool fasa_is_query_op(const ggml_tensor * t) {
    return t->op == GGML_OP_ROPE || (t->op != GGML_OP_MUL_MAT_ID && fasa_is_tokenwise(t));
}

// whether the weights that t reads lie where `dev` computes
static bool fasa_is_near(const ggml_tensor * t, ggml_backend_dev_t dev) {
    for (const ggml_tensor * src : t->src) {
        if (src == nullptr || !fasa_is_leaf(src)) {
            continue;
        }
        const ggml_tensor * root = src->view_src ? src->view_src : src;
        if (root->buffer == nullptr ||
            ggml_backend_buffer_get_usage(root->buffer) != GGML_BACKEND_BUFFER_USAGE_WEIGHTS) {
            continue;
        }
        auto * at       = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(root->buffer));
        const auto type = at ? ggml_backend_dev_type(at) : GGML_BACKEND_DEVICE_TYPE_CPU;
        if ((type == GGML_BACKEND_DEVICE_TYPE_CPU || type == GGML_BACKEND_DEVICE_TYPE_ACCEL ? nullptr : at) != dev) {
            return false;
        }
    }
    return true;
}

// Whether `block` is a feed-forward of `residual`: all that lies in between works token by token, with a matrix
// product. FASA_REASON_NONE: it is.
static fasa_reason fasa_is_feed_forward(ggml_tensor * block, const ggml_tensor * residual, ggml_backend_dev_t dev) {
    fasa_walk walk(block);
    bool product = false, near = true;
    while (walk.only() != residual) {
        if (walk.open.empty() || *walk.open.rbegin() < residual) {
            return FASA_REASON_AHEAD_UNKNOWN;
        }
        const ggml_tensor * t = walk.pop();
        if (!fasa_is_tokenwise(t)) {
            return FASA_REASON_AHEAD_NO_FEED_FORWARD;
        }
        product = product || t->op == GGML_OP_MUL_MAT || t->op == GGML_OP_MUL_MAT_ID;
        near    = near && fasa_is_near(t, dev);
    }
    return !product ? FASA_REASON_AHEAD_UNKNOWN : !near ? FASA_REASON_AHEAD_DEVICE : FASA_REASON_NONE;
}

static void fasa_add_inputs(const ggml_tensor * t, std::vector<ggml_tensor *> & inputs) {
    for (ggml_tensor * src : t->src) {
        if (src && fasa_is_leaf(src)) {
            ggml_tensor * root = src->view_src ? src->view_src : src;
            if (root->buffer == nullptr && std::find(inputs.begin(), inputs.end(), root) == inputs.end()) {
                inputs.push_back(root);
            }
        }
    }
}

fasa_foreseen fasa_foresee(ggml_tensor * q, ggml_backend_dev_t dev) {
    fasa_foreseen out;
    fasa_walk walk(q);
    int n_matmul = 0;
    for (bool near = true; !walk.open.empty();) {
        ggml_tensor * at = walk.only();
        if (at && at->op == GGML_OP_ADD && fasa_n_computed(at) == 2) {
            ggml_tensor *residual = std::min(at->src[0], at->src[1]), *block = std::max(at->src[0], at->src[1]);
            const fasa_reason reason = fasa_is_feed_forward(block, residual, dev);
            if (reason != FASA_REASON_AHEAD_UNKNOWN) {
                out.reason   = reason != FASA_REASON_NONE ? reason : near ? reason : FASA_REASON_AHEAD_DEVICE;
                out.residual = residual;
                out.sum      = at;
                std::reverse(out.nodes.begin(), out.nodes.end());
                return out;
            }
        }
        ggml_tensor * t = walk.pop();
        if (!fasa_is_view_op(t) && !ggml_is_contiguous(t)) { // in place: a copy would lie otherwise
            return out;
        }
        if (!fasa_is_query_op(t)) {
            out.reason = t->op == GGML_OP_MUL_MAT_ID ? FASA_REASON_AHEAD_UNKNOWN : FASA_REASON_AHEAD_NO_FEED_FORWARD;
            return out;
        }
        n_matmul += t->op == GGML_OP_MUL_MAT;
        if (n_matmul > FASA_MOST_MATMUL) {
            return out;
        }
        near = near && fasa_is_near(t, dev);
        out.nodes.push_back(t);
        fasa_add_inputs(t, out.inputs);
    }
    out.reason = FASA_REASON_AHEAD_FIRST;
    return out;
}

// ---- copying the queries ----

// t: a view of `of`, which begins `offset` bytes behind it
static void fasa_make_view(ggml_tensor * t, ggml_tensor * of, size_t offset) {
    t->view_src  = of->view_src ? of->view_src : of;
    t->view_offs = (of->view_src ? of->view_offs : 0) + offset;
}

std::vector<ggml_tensor *> fasa_foreseen::copy(
    ggml_context * ctx, const std::function<void(ggml_tensor *)> & on_backend, const ggml_tensor * last) const {
    std::map<const ggml_tensor *, ggml_tensor *> copies = { { sum, residual } };
    const auto copy_of                                  = [&](ggml_tensor * t) {
        const auto found = copies.find(t);
        return found == copies.end() ? t : found->second;
    };
    std::vector<ggml_tensor *> out;
    for (const ggml_tensor * t : nodes) {
        ggml_tensor * c = ggml_new_tensor(ctx, t->type, GGML_MAX_DIMS, t->ne);
        if (fasa_is_view_op(t)) { // of what was copied: a view of a leaf is no node here
            std::copy(std::begin(t->nb), std::end(t->nb), c->nb);
            const ggml_tensor * src = t->src[0];
            fasa_make_view(c, copy_of(t->src[0]), t->view_offs - (src->view_src ? src->view_offs : 0));
        } // an op in place gets memory of its own: the residual is not to be overwritten
        c->op = t->op;
        std::copy(std::begin(t->op_params), std::end(t->op_params), c->op_params);
        std::transform(std::begin(t->src), std::end(t->src), c->src, copy_of);
        ggml_format_name(c, "%.48s (ahead)", t->name);
        on_backend(c);
        copies[t] = c;
        out.push_back(c);
        if (t == last) {
            break;
        }
    }
    return out;
}

// ---- the dominant rows of the product alone ----

static bool fasa_is_plain_rope(const ggml_tensor * t) {
    const int32_t mode = t->op_params[2], n_offs = t->op_params[15];
    return t->op == GGML_OP_ROPE && (mode == GGML_ROPE_TYPE_NORMAL || mode == GGML_ROPE_TYPE_NEOX) && n_offs == 0 &&
        t->type == GGML_TYPE_F32 && t->src[0]->type == GGML_TYPE_F32;
}

fasa_query_rows fasa_foreseen::rows() const {
    fasa_query_rows out = {};
    const auto at       = std::find_if(nodes.begin(), nodes.end(), [](auto * t) { return t->op == GGML_OP_MUL_MAT; });
    ggml_tensor * rope  = nodes.empty() ? nullptr : nodes.back();
    if (at == nodes.end() || !fasa_is_plain_rope(rope) || (*at)->src[0]->view_src) {
        return out;
    }
    ggml_tensor * values = *at; // the product, with its bias
    for (auto next = at + 1; next + 1 != nodes.end(); ++next) {
        ggml_tensor * t = *next;
        if (t->op == GGML_OP_ADD && t->src[0] == values && out.bias == nullptr && t->src[1]->op == GGML_OP_NONE &&
            t->src[1]->type == GGML_TYPE_F32 && ggml_nelements(t->src[1]) == values->ne[0]) {
            out.bias = t->src[1];
            values   = t;
        } else if (!fasa_is_view_op(t) || t->view_src != values) {
            return out;
        }
    }
    const ggml_tensor * q = rope->src[0];
    if (q->view_src != values || q->nb[2] != values->nb[1] || values->ne[2] != 1) {
        return out;
    }
    out.product = *at;
    out.rope    = rope;
    out.first   = q->view_offs / sizeof(float);
    out.head    = q->nb[1] / sizeof(float);
    out.dim     = q->nb[0] / sizeof(float);
    return out;
}

static fasa_rope fasa_rope_of(const ggml_tensor * rope) {
    float f[6]; // freq_base, freq_scale, ext_factor, attn_factor, beta_fast, beta_slow
    memcpy(f, rope->op_params + 5, sizeof(f));
    fasa_rope r   = {};
    r.n_rot       = rope->op_params[1];
    r.neox        = rope->op_params[2] == GGML_ROPE_TYPE_NEOX;
    r.theta_scale = powf(f[0], -2.0f / r.n_rot);
    r.freq_scale = f[1], r.ext_factor = f[2], r.attn_factor = f[3];
    float corr[2];
    ggml_rope_yarn_corr_dims(r.n_rot, rope->op_params[4], f[0], f[4], f[5], corr);
    r.corr[0] = corr[0], r.corr[1] = corr[1];
    return r;
}

std::vector<ggml_tensor *> fasa_foreseen::copy_dominant(ggml_context * ctx,
    const std::function<void(ggml_tensor *)> & on_backend, const fasa_query_rows & rows,
    const fasa_dominant_rows & dominant, const fasa_layer_const * layer) const {
    auto out              = copy(ctx, on_backend, rows.product);
    ggml_tensor * product = out.back(); // with the whole weight: with its input another one is made
    out.back()            = ggml_mul_mat(ctx, dominant.weight, product->src[1]);
    memcpy(out.back()->op_params, product->op_params, sizeof(product->op_params)); // the precision that is asked for
    if (dominant.bias) {
        out.push_back(ggml_add(ctx, out.back(), dominant.bias));
    }
    const ggml_tensor * rope = rows.rope;
    out.push_back(fasa_build_spread(ctx, out.back(), dominant.dims, rope->src[1], rope->src[2], rope->ne[0],
        rope->ne[1], fasa_rope_of(rope), layer));
    std::for_each(out.begin(), out.end(), on_backend);
    return out;
}

std::vector<ggml_tensor *> fasa_to_hold(const std::vector<ggml_tensor *> & copies) {
    const auto is_replaced = [&](const ggml_tensor * t) {
        const auto user =
            std::find_if(copies.begin(), copies.end(), [&](const ggml_tensor * c) { return c->src[0] == t; });
        const int n_users = (int) std::count_if(copies.begin(), copies.end(), [&](const ggml_tensor * c) {
            return std::find(std::begin(c->src), std::end(c->src), t) != std::end(c->src);
        });
        return (t->op == GGML_OP_RMS_NORM || t->op == GGML_OP_NORM) && n_users == 1 && user != copies.end() &&
            (*user)->op == GGML_OP_MUL && ggml_are_same_shape(*user, t);
    };
    std::vector<ggml_tensor *> out;
    std::copy_if(copies.begin(), copies.end(), std::back_inserter(out),
        [&](const ggml_tensor * t) { return t->view_src == nullptr && !is_replaced(t); });
    return out;
}

// ---- order ----

void fasa_move_behind(ggml_cgraph * graph, const ggml_tensor * node, int first) {
    ggml_tensor ** begin = graph->nodes;
    ggml_tensor ** at    = begin + first;
    while (at > begin && at[-1] != node) {
        --at;
    }
    if (at > begin) {
        std::rotate(at, begin + first, begin + graph->n_nodes);
    }
}
