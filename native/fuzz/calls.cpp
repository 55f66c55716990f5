// Calls of fasa.h in any order with any numbers, and the variables FASA_* with any text: `make fuzz`.
// A call succeeds, or fails with a sentence; decoding goes on in both cases.

#include "core/settings.h"
#include "fuzz.h"
#include "llama/file-profile.h"

#include <fuzzer/FuzzedDataProvider.h>

#include <cstring>
#include <string>

using bytes = FuzzedDataProvider;

static void check(int result) {
    FUZZ_EXPECT(result == 0 || *fasa_error());
}

template <typename T>
static std::vector<T> numbers(bytes & in, size_t n) {
    std::vector<T> out(n);
    const auto given = in.ConsumeBytes<uint8_t>(n * sizeof(T));
    if (!given.empty()) {
        memcpy(out.data(), given.data(), given.size());
    }
    return out;
}

// small numbers, and now and then any
static int32_t number(bytes & in, int32_t low, int32_t high) {
    return in.ConsumeIntegralInRange(0, 15) == 0 ? in.ConsumeIntegral<int32_t>() :
                                                   in.ConsumeIntegralInRange<int32_t>(low, high);
}

static const fasa_setting & row(bytes & in) {
    return FASA_SETTING_ROWS[in.ConsumeIntegralInRange<size_t>(0, FASA_N_SETTINGS - 1)];
}

// ---- settings ----

static void read_text(bytes & in, fasa_params & p) {
    const auto & setting = row(in);
    double value         = 0;
    if (fasa_read_setting(setting, in.ConsumeRandomLengthString(24).c_str(), value) == 0) {
        fasa_apply(p, { { setting.name, value } });
    } else {
        FUZZ_EXPECT(*fasa_error());
    }
}

static void change_number(bytes & in, fasa_params & p) {
    const auto & setting = row(in);
    if (in.ConsumeBool()) {
        setting.set(p, in.ConsumeFloatingPointInRange(setting.low, setting.high));
    } else {
        const uint32_t raw = in.ConsumeIntegral<uint32_t>();
        memcpy((char *) &p + setting.offset, &raw, sizeof(raw));
    }
}

static void set_params(bytes & in, llama_context * ctx, fasa_params & p) {
    p.enabled     = in.ConsumeIntegralInRange(0, 3) > 0;
    p.min_context = in.ConsumeIntegralInRange(0, 3) > 0 ? 0 : p.min_context;
    check(fasa_set_params(ctx, &p));
    p      = fasa_params_default();
    p.size = in.ConsumeIntegralInRange(0, 31) == 0 ? in.ConsumeIntegral<uint64_t>() : sizeof(p);
    check(fasa_get_params(ctx, &p));
    check(fasa_get_layer_params(ctx, number(in, -1, 3), &p));
    p.size = sizeof(p);
}

// ---- profiles ----

// arrays as long as they are said to be, of the model's shape or another; their content is anything
static void set_profile(bytes & in, llama_context * ctx) {
    const bool fits       = in.ConsumeIntegralInRange(0, 7) > 0;
    const uint32_t n      = fits ? 3 : in.ConsumeIntegralInRange(0, 6);
    auto heads            = fits ? std::vector<uint32_t>(n, 2) : numbers<uint32_t>(in, n);
    auto chunks           = fits ? std::vector<uint32_t>(n, 8) : numbers<uint32_t>(in, n);
    const size_t n_rank   = fits ? 48 : in.ConsumeIntegralInRange(0, 64);
    const uint32_t k      = in.ConsumeIntegralInRange(0, 9);
    const size_t n_w      = fits ? 6 * k : in.ConsumeIntegralInRange(0, 64);
    const uint32_t n_mean = in.ConsumeIntegralInRange(0, 3);
    auto ranking = numbers<uint16_t>(in, n_rank), ahead_ranking = ranking;
    for (size_t i = 0; i < n_rank; ++i) {
        ranking[i]       = in.ConsumeIntegralInRange(0, 7) > 0 ? i % 8 : ranking[i];
        ahead_ranking[i] = in.ConsumeIntegralInRange(0, 7) > 0 ? 7 - i % 8 : ranking[i];
    }
    auto weight = numbers<float>(in, n_w), ahead_weight = numbers<float>(in, n_w);
    auto miss      = numbers<float>(in, in.ConsumeBool() ? n : in.ConsumeIntegralInRange(0, 6));
    auto mean      = numbers<uint32_t>(in, n_mean);
    auto mass      = numbers<float>(in, n_mean);
    auto ahead     = numbers<uint8_t>(in, in.ConsumeBool() ? n : 0);
    fasa_profile p = {};
    p.size = sizeof(p), p.n_layer = n, p.n_head_kv = heads.data(), p.n_chunk = chunks.data();
    p.n_ranking = n_rank, p.ranking = ranking.data(), p.weight_k = k, p.n_weight = n_w;
    p.weight = in.ConsumeBool() ? weight.data() : nullptr, p.n_layer_miss = miss.size(), p.layer_miss = miss.data();
    p.n_mean_budget = n_mean, p.mean_budget = mean.data(), p.mean_budget_mass = mass.data();
    p.n_ahead = ahead.size(), p.ahead = ahead.data();
    p.ahead_ranking = in.ConsumeBool() ? ahead_ranking.data() : nullptr;
    p.ahead_weight  = in.ConsumeBool() ? ahead_weight.data() : nullptr;
    check(fasa_set_profile(ctx, &p));
}

// ---- the rest ----

static void seen(const fasa_observation * o, void * user) {
    *static_cast<float *>(user) += o->q[0] + (o->k_is_f16 ? ((const uint16_t *) o->k)[0] : ((const float *) o->k)[0]);
}

static void read_all(bytes & in, llama_context * ctx) {
    const int32_t il = number(in, -1, 4);
    int32_t shape[4];
    fasa_model_info info = {};
    info.size            = sizeof(info);
    check(fasa_get_layer_shape(ctx, il, shape));
    check(fasa_get_model_info(ctx, &info));
    fasa_layer_reason(ctx, il);
    FUZZ_EXPECT(fasa_reason_text(fasa_layer_ahead_code(ctx, il)) && fasa_step_reason(ctx));
    fasa_reason_text(number(in, -1, 50));
    fasa_default_chunks(in.ConsumeIntegral<uint32_t>());
    fasa_pool_bytes(in.ConsumeIntegral<uint32_t>(), in.ConsumeIntegral<uint32_t>());
    fuzz_counters(ctx);
}

static void rank(bytes & in) {
    const int32_t n_group = number(in, 1, 3), n_query = number(in, 1, 4), n_kv = number(in, 1, 20);
    const int32_t d = number(in, 2, 8), n_chunk = number(in, 1, 4);
    const auto has = [](int32_t n) {
        return size_t(n < 0 || n > 64 ? 0 : n);
    };
    if (has(n_group) * has(n_query) * has(n_kv) * has(d) * has(n_chunk) == 0) {
        return; // the arrays that it claims are not there
    }
    auto dims = numbers<int32_t>(in, 2 * n_chunk), pos = numbers<int32_t>(in, n_query);
    for (auto & x : dims) {
        x = in.ConsumeIntegralInRange(0, 7) > 0 ? ((x % d) + d) % d : x;
    }
    for (auto & x : pos) {
        x = in.ConsumeIntegralInRange(0, 7) > 0 ? ((x % n_kv) + n_kv) % n_kv : x;
    }
    auto q = numbers<float>(in, n_group * n_query * d), k = numbers<float>(in, n_kv * d);
    std::vector<int32_t> order(n_chunk);
    std::vector<float> recall(n_chunk);
    fasa_rank_case c = {};
    c.size = sizeof(c), c.n_group = n_group, c.n_query = n_query, c.n_kv = n_kv, c.n_embd_head = d;
    c.n_chunk = n_chunk, c.n_rank = in.ConsumeIntegralInRange(-1, n_chunk + 1), c.budget = number(in, 0, 9);
    c.sink = number(in, 0, 3), c.recent = number(in, 0, 3), c.n_threads = in.ConsumeIntegralInRange(-1, 2);
    c.scale = in.ConsumeFloatingPoint<float>(), c.soft_cap = in.ConsumeFloatingPoint<float>();
    c.chunk_dims = dims.data(), c.q = q.data(), c.k = k.data(), c.q_pos = pos.data();
    c.out_order = order.data(), c.out_recall = recall.data();
    check(fasa_rank_recall(&c));
}

// a context of a program that knows nothing of FASA, with these variables
static void environment(bytes & in) {
    std::vector<std::string> names = { "FASA_ENABLE", "FASA_MODE", "FASA_PROFILE", "FASA_STATS" };
    for (int i = in.ConsumeIntegralInRange(1, 3); i > 0; --i) {
        std::string name = std::string("FASA_") + row(in).name;
        for (auto & c : name) {
            c = (char) toupper((unsigned char) c);
        }
        const auto at    = in.ConsumeIntegralInRange<size_t>(0, 2 * names.size());
        const auto & set = at < names.size() ? names[at] : names.emplace_back(name);
        setenv(set.c_str(), in.ConsumeRandomLengthString(16).c_str(), 1);
    }
    if (in.ConsumeBool()) {
        setenv("FASA_MIN_CONTEXT", "0", 1);
        names.push_back("FASA_MIN_CONTEXT");
    }
    llama_context * ctx = fuzz_context(64); // mode host without a GPU: the layers are on the CPU
    fuzz_decode(ctx, 20);
    fuzz_decode(ctx, 1);
    llama_free(ctx);
    for (const auto & name : names) {
        unsetenv(name.c_str());
    }
}

static void call(bytes & in, llama_context * ctx, fasa_params & p, float & sum) {
    switch (in.ConsumeIntegralInRange(0, 13)) {
        case 0: return read_text(in, p);
        case 1: return change_number(in, p);
        case 2: return set_params(in, ctx, p);
        case 3: return set_profile(in, ctx);
        case 4: return check(fasa_borrow_list(ctx, number(in, -1, 3), number(in, -1, 3)));
        case 5: return check(fasa_set_step(ctx, number(in, -1, 3)));
        case 6: return check(fasa_invalidate(ctx));
        case 7: return check(fasa_reset_counters(ctx));
        case 8: return check(fasa_set_observer(ctx, in.ConsumeBool() ? seen : nullptr, &sum));
        case 9: return read_all(in, ctx);
        case 10: return rank(in);
        case 11: return environment(in);
        default: return fuzz_decode(ctx, in.ConsumeBool() ? 1 : in.ConsumeIntegralInRange(1, 64));
    }
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    static const bool used = [] {
        return fasa_use_environment(), true;
    }();
    bytes in(data, size);
    llama_context * ctx = fuzz_context();
    fasa_params p       = fasa_params_default();
    float sum           = 0;
    for (int i = 0; used && i < 40 && in.remaining_bytes() > 0; ++i) {
        call(in, ctx, p, sum);
    }
    fasa_set_observer(ctx, nullptr, nullptr);
    fuzz_decode(ctx, 1);
    llama_free(ctx);
    return 0;
}
