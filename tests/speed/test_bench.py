"""Speed: arms that take turns in every context, bytes and figures of a result, what is refused."""

import itertools
import json
from dataclasses import replace

import pytest
from benching import ON, QUICK, planted, run
from tiny_gguf import gguf_bytes

from fasa_gguf import FasaError, FasaParams, runtime
from fasa_gguf.cli import main as cli
from fasa_gguf.cli.bench import _types
from fasa_gguf.gguf.file import STR, U16, U32, GGUFFile, pack_kv
from fasa_gguf.profile.profile import Profile
from fasa_gguf.reasons import Reason
from fasa_gguf.runtime.devices import Device
from fasa_gguf.session import Session
from fasa_gguf.speed import bench as b
from fasa_gguf.speed import crossover, timing
from fasa_gguf.speed import random_model as synthetic
from fasa_gguf.speed.results import dense_layers
from fasa_gguf.speed.timing import Timer
from fasa_gguf.speed.traffic import one_device, weight_bytes

CELL = 3 * 2 * 2 * 16 * 2  # layers, K and V, KV heads, head_dim, bytes
CELL_F32 = 2 * CELL


# ---- the cache gets its depth ----


def test_prefill_goes_on_from_what_is_there(library, tiny):
    with Session(tiny, n_ctx=512, n_batch=64, n_ubatch=64, n_threads=1) as s:
        seen = []
        timer = Timer(s, 1, "prefill", lambda what, n, total: seen.append(n))
        assert timer.fill(128) == "prefill" == timer.fill(192)
        parts, seconds = s.decode([5], 192), timer.prefill_s
        assert seen == [64, 128, 192] and seconds > 0
        timer.in_cache = 0
        timer.fill(192)
        assert (s.decode([5], 192) == parts).all()


def test_sequences_are_copies_of_a_prefill_or_random(library, tiny):
    with Session(tiny, n_ctx=3 * 512, n_seq_max=3, n_threads=1) as s:

        def ends():
            return [s.llama.llama_memory_seq_pos_max(s.memory, seq) for seq in range(3)]

        timer = Timer(s, 3, "prefill", lambda *x: None)
        for depth in (100, 150):
            timer.fill(depth)
            logits = [s.decode([5], depth, seq=seq) for seq in range(3)]
            assert all(abs(x - logits[0]).max() < 1e-3 for x in logits)
            timer.rewind(depth)
            assert ends() == [depth - 1] * 3
        timer.how = "random"
        assert timer.fill(300) == "random" and ends() == [299] * 3 and timer.in_cache == 0


def test_auto_fills_at_random_from_a_depth_on(library, tiny, profile, monkeypatch):
    monkeypatch.setattr(timing, "RANDOM_FILL_FROM", 64)

    def filled(fill):
        results = run(tiny, replace(QUICK, depths=[32, 128], repetitions=1, fill=fill), profile)
        return [(r.fill, r.ttft_ms is not None) for r in results]

    assert filled("auto") == [("prefill", True)] * 2 + [("random", False)] * 2
    assert filled("random") == [("random", False)] * 4 and filled("prefill") == [("prefill", True)] * 4


def test_a_hybrid_model_is_filled_again(library, hybrid):
    profile = synthetic.synthetic_profile([0, 2, 0, 2], [0, 8, 0, 8])
    for fill in ("random", "prefill"):
        dense, fasa = run(hybrid, replace(QUICK, depths=[300], fill=fill), profile)
        assert (fasa.sparse_share, fasa.tokens_attended, fasa.note) == (
            1,
            64,
            "",
        ) and dense.kv_bytes == 2 * 2 * 2 * 16 * 2 * (300 + 3 + 2.5)


def test_a_model_with_a_window(library, sliding):
    dense, fasa = run(sliding, replace(QUICK, fill="random"), synthetic.synthetic_profile([2] * 4, [8] * 4))
    assert fasa.sparse_share == 1 and fasa.kv_bytes < dense.kv_bytes


# ---- the measurement ----


def test_bytes_and_tokens_of_a_result(library, tiny, profile):
    dense, fasa = run(tiny, QUICK, profile)
    assert dense.kv_bytes == CELL * (300 + 3 + 2.5) and dense.tokens_attended is None and dense.sparse_share == 0
    fac, tip = CELL * 64, 3 * 2 * 320 * (8 // 2 + 2)  # 10 tiles of 32 cells; 8 dims in 4 bits and a scale
    assert fac + tip <= fasa.kv_bytes <= fac + tip * 512 / 320  # the view is padded to 512 cells at most
    assert fasa.tokens_attended == 64 and fasa.sparse_share == 1 and fasa.note == ""
    assert fasa.ratio == pytest.approx(fasa.avg_ts / dense.avg_ts) == fasa.ratio_best and (dense.fill, fasa.fill) == (
        "prefill",
        "prefill",
    )
    assert (
        len(fasa.samples_ts) == 2
        and min(fasa.samples_ts) > 0
        and fasa.config["type_k"] == "f16"
        and fasa.config["no_kv_offload"] is False
    )
    weights = sum(t.n_bytes for t in GGUFFile(tiny).tensors) - 259 * 64 * 4
    assert (dense.weight_bytes, dense.token_bytes) == (weights, weights + dense.kv_bytes)
    assert (
        dense.bytes_per_second == dense.token_bytes * dense.avg_ts
        and dense.of_copy_rate == dense.bytes_per_second / dense.copy_rate
    )
    assert 0 < dense.of_copy_rate < 1e3


def test_what_attention_adds_to_a_step(library, tiny, profile):
    """Steps without attention are of the same depth, and leave nothing behind."""
    plain = run(tiny, QUICK, profile)
    results = run(tiny, replace(QUICK, attention=True), profile)
    assert [r.attention_ms for r in plain] == [None, None]
    for before, r in zip(plain, results, strict=True):
        assert r.bare_s > 0 and r.attention_ms == pytest.approx(1000 * (1 / r.avg_ts - r.bare_s))
        assert (r.kv_bytes, r.tokens_attended) == (before.kv_bytes, before.tokens_attended)


def test_dense_beside_a_plain_read(library, tiny, profile, monkeypatch):
    asked = []
    monkeypatch.setattr(b, "PLAIN_READ_FROM", 200)
    monkeypatch.setattr(runtime.context.Context, "read_rate", lambda self, n: asked.append(n) or 1e15)
    results = run(tiny, replace(QUICK, depths=[100, 300]), profile)
    assert asked == [1, 300] and [r.read_rate for r in results] == [None, None, 1e15, None]
    assert results[2].base_s > 0 and results[2].plain_ts == pytest.approx(1 / results[2].base_s, rel=1e-3)
    monkeypatch.setattr(b.Result, "kv_rate", 3e9)
    dense = run(tiny, QUICK, profile)[0]
    assert dense.note == "dense reads the cache at 3 GB/s, a plain read at 1e+06"
    assert dense.kv_bytes == CELL * (300 + 3 + 2.5)  # the steps with an empty cache left nothing behind

    def on_a_device(self, n):
        raise FasaError("read rate: cache_k_l0 is not in host memory")

    monkeypatch.setattr(runtime.context.Context, "read_rate", on_a_device)
    assert [(r.base_s, r.read_rate, r.note) for r in run(tiny, QUICK, profile)] == [(None, None, "")] * 2


def test_arms_take_turns(library, tiny, profile, monkeypatch):
    seen, generate = [], Timer.generate

    def spy(self, p, depth, n):
        seen.append((p and p.k_dom, depth, n))
        assert self.s.llama.llama_memory_seq_pos_max(self.s.memory, 0) == depth - 1  # the tail is gone
        return generate(self, p, depth, n)

    monkeypatch.setattr(Timer, "generate", spy)
    told, groups = [], []
    arms = {"q4": ON, "q8": ON.replace(k_dom="q8")}
    results = b.bench(
        tiny, replace(QUICK, depths=[40, 20, 20], n_gen=6), arms, profile, lambda *x: told.append(x), groups.append
    )
    warm, real = [(None, 4), ("q4", 4), ("q8", 4)], [(None, 6), ("q4", 6), ("q8", 6)]
    assert [(arm, n) for arm, depth, n in seen if depth == 20] == warm + real + real
    assert [depth for _, depth, _ in seen] == [20] * 9 + [40] * 9
    assert told[-1] == ("benchmarking", 2, 2) and ("prefilling 40", 40, 40) in told
    assert [[(r.arm, r.n_depth) for r in g] for g in groups] == [
        [(arm, d) for arm in ("dense", "q4", "q8")] for d in (20, 40)
    ] and list(itertools.chain(*groups)) == results


def test_prefill_and_the_time_to_the_first_token(library, tiny, profile):
    results = run(tiny, replace(QUICK, depths=[0, 300], n_prompt=[32, 0, 64]), profile)
    assert [r.test for r in results] == [
        f"{t} @ d{d}" for d in (0, 300) for t in ("pp32", "pp32", "pp64", "pp64", "tg4", "tg4")
    ]
    prompt = results[7]
    assert (prompt.arm, prompt.n_prompt, prompt.n_gen, prompt.kv_bytes, prompt.of_copy_rate) == (
        "fasa",
        32,
        0,
        None,
        None,
    ) and prompt.ratio > 0
    assert all(r.ttft_ms >= r.first_step_ms > 0 for r in results)
    whole = results[0]  # at depth 0 the prompt is all there is
    mean_s = sum(32 / x for x in whole.samples_ts) / 2
    assert whole.ttft_ms == pytest.approx(whole.first_step_ms + 1000 * mean_s, rel=0.05)
    assert (
        prompt.ttft_ms > prompt.first_step_ms + 1000 * sum(32 / x for x in prompt.samples_ts) / 2
    )  # and the prefill of the depth


def test_sequences_in_parallel(library, tiny, profile):
    results = run(tiny, replace(QUICK, n_parallel=[1, 3], n_prompt=[16], fill="random"), profile)
    assert [(r.n_parallel, r.test) for r in results] == [(1, "pp16 @ d300")] * 2 + [(1, "tg4 @ d300")] * 2 + [
        (3, "tg4 @ d300")
    ] * 2
    one, three = results[3], results[5]
    assert (three.sparse_share, three.tokens_attended) == (1, 64) and three.kv_bytes == pytest.approx(
        one.kv_bytes
    )  # per token
    assert (
        results[4].kv_bytes == results[2].kv_bytes
        and results[4].token_bytes == results[4].kv_bytes + results[4].weight_bytes / 3
    )


def test_every_type_and_place_of_the_cache_has_its_context(library, tiny, profile, monkeypatch):
    live, made, reopen = [0], [], Session.reopen

    def spy(self, **kw):
        live[0] -= self._ctx is not None
        reopen(self, **kw)
        live[0] += 1
        made.append((kw.get("type_k"), kw.get("no_kv_offload"), live[0]))

    monkeypatch.setattr(Session, "reopen", spy)
    results = run(tiny, replace(QUICK, types=[("f16", "f16"), ("f32", "f32")], no_kv_offload=(0, 1)), profile)
    assert [(r.arm, r.config["type_k"], r.config["no_kv_offload"]) for r in results] == [
        (arm, k, nkvo) for k in ("f16", "f32") for arm, nkvo in (("dense", False), ("fasa", False), ("dense", True))
    ]
    assert made[1:] == [
        (k, nkvo, 1) for k in ("f16", "f32") for nkvo in (False, True)
    ]  # one at a time; the first is a small one
    assert results[3].kv_bytes == CELL_F32 * (300 + 3 + 2.5)
    best = max(r.avg_ts for r in results if r.arm == "dense")
    assert all(r.ratio_best == pytest.approx(r.avg_ts / best) for r in results)
    assert results[1].ratio == pytest.approx(results[1].avg_ts / results[0].avg_ts)  # its own context's


def test_layers_on_the_gpu_have_results_of_their_own(library, tiny, profile, monkeypatch):
    opened = []
    monkeypatch.setattr(b, "Session", lambda *a, **kw: opened.append(kw["n_gpu_layers"]) or Session(*a, **kw))
    results = run(tiny, replace(QUICK, n_gpu_layers=[0, 2], repetitions=1, n_gen=1), profile)
    assert opened == [0, 2] and [r.config["n_gpu_layers"] for r in results] == [0, 0, 2, 2]
    assert results[3].ratio_best == results[3].ratio  # beside dense of as many layers


def test_what_stays_dense_says_so(library, tiny, profile):
    # the view of the cache grows from 256 to 512 cells in the middle of the run at depth 250
    results = run(
        tiny, replace(QUICK, depths=[0, 250, 300], n_gen=10, repetitions=1), profile, ON.replace(min_context=300)
    )
    notes = {r.n_depth: r.note for r in results if r.arm == "fasa"}
    assert notes == {0: "dense (n < 300)", 250: "3 of 10 steps dense (n < 300)", 300: ""}
    assert results[0].kv_bytes == results[1].kv_bytes and results[1].sparse_share == 0
    half = Profile(
        profile.n_head_kv, [8, 0, 8], [profile.ranking[0], profile.ranking[1][:0, :0], profile.ranking[2]], "synthetic"
    )
    dense, fasa = run(tiny, QUICK, half)
    assert fasa.note == "1 of 3 layers dense (1: the profile has no ranking for it)" and fasa.sparse_share == 1
    assert dense.kv_bytes / 3 < fasa.kv_bytes < dense.kv_bytes  # the dense layer reads all of its third


def test_dense_layers_are_counted_by_reason():
    R = Reason
    some = [R.NONE, R.TRAINING, R.NO_CACHE, R.ALIBI, R.TRAINING]
    assert dense_layers(some) == "3 of 4 layers dense (1: ALiBi moves the scores; 2: training)"
    assert dense_layers([R.NONE, R.NO_CACHE]) == ""
    assert dense_layers([R.TRAINING], ": ") == ": 1 of 1 layers dense (1: training)"


def test_layers_on_a_gpu_may_wait(library, tiny, profile, monkeypatch):
    p = FasaParams(min_context=30, min_context_gpu=900)
    other, waits = Reason.PREFILL, Reason.MIN_CONTEXT_GPU
    assert [p.least_above(20, other), p.least_above(40, other), p.least_above(40, waits)] == [30, 0, 900]
    measure = Timer.generate

    def waiting(self, *a):  # as if all layers were on a GPU
        sample = measure(self, *a)
        return replace(sample, counters=sample.counters | {"steps_sparse": 0, "layers_sparse": 0}, reason=waits)

    monkeypatch.setattr(Timer, "generate", waiting)
    groups = []
    with pytest.raises(
        FasaError,
        match=r"no step used it: dense \(n < 900\); with all layers on a GPU use -d with 900 or more, or a smaller "
        "--fasa-min-context-gpu",
    ):
        run(tiny, QUICK, profile, ON.replace(min_context=30, min_context_gpu=900), emit=groups.append)
    assert [r.note for r in groups[0]] == ["", "dense (n < 900)"]


def test_dense_at_a_depth_that_should_be_sparse_ends_the_run(library, tiny, profile):
    none = Profile(profile.n_head_kv, [0] * 3, [profile.ranking[0][:0, :0]] * 3, "synthetic")
    groups = []
    with pytest.raises(
        FasaError,
        match=r"no step at depth 40 used it: no layer can run sparse: 3 of 3 layers dense "
        r"\(3: the profile has no ranking for it\)",
    ):
        run(tiny, replace(QUICK, depths=[0, 40]), none, ON.replace(min_context=30), emit=groups.append)
    assert [r.n_depth for r in groups[0]] == [0, 0] and len(groups) == 1  # what was measured is there


def test_a_context_that_cannot_be_made_has_results_that_say_so(library, tiny, profile):
    results = run(
        tiny, replace(QUICK, types=[("q8_0", "q8_0"), ("f16", "f16")]), profile
    )  # heads of 16 are no block of q8_0
    assert [r.note.startswith("not measured: llama.cpp cannot make a context of 512 tokens") for r in results] == [
        True,
        True,
        False,
        False,
    ]
    assert (
        results[0].avg_ts is None
        and results[0].of_copy_rate is None
        and results[0].ratio_best is None
        and results[3].ratio_best > 0
    )
    with pytest.raises(FasaError, match=r"no step used it: not measured: llama\.cpp cannot make a context"):
        run(tiny, replace(QUICK, types=[("q8_0", "q8_0")]), profile)


def test_bench_refuses(library, tiny, profile):
    for message, settings, params in [
        (
            "fasa: every depth of -d is below min_context, and every step would be dense; use -d with 4096 or more",
            replace(QUICK, depths=[0, 10]),
            ON.replace(min_context=4096),
        ),
        ("-d, -n and -r: expected depths and tokens from 0", replace(QUICK, depths=[-1]), ON),
        ("-np and -p: expected at least 1 sequence", replace(QUICK, n_parallel=[0]), ON),
        ("--fill 'air': expected auto, prefill or random", replace(QUICK, fill="air"), ON),
        ("cache type 'q9': expected one of f32, f16", replace(QUICK, types=[("f16", "q9")]), ON),
        (
            "-nkvo 1 is measured dense only, and FASA has nothing to run in; give -nkvo 0,1",
            replace(QUICK, no_kv_offload=[1]),
            ON,
        ),
    ]:
        with pytest.raises(FasaError, match=message):
            run(tiny, settings, profile, params)
    with pytest.raises(FasaError, match="there is no FASA profile in this model; run `fasa-gguf embed-profile"):
        run(tiny, QUICK, None)


# ---- bytes ----


@pytest.mark.parametrize(
    "names, keys, expected",
    [
        (["token_embd.weight", "output.weight", "x"], [], (32 * (2 + 3), "")),
        (["token_embd.weight", "x"], [], (32 * (1 + 2), "")),  # tied: the embedding is the output matrix
        (["token_embd.weight", "output.weight", "per_layer_token_embd.weight"], [], (32 * 2, "")),
        (["x"], [pack_kv("llama.expert_count", U32, 8)], (None, "mixture of experts: bytes of weights not counted")),
        (
            ["x"],
            [pack_kv("llama.expert_count", U32, 0), pack_kv("split.count", U16, 2)],
            (None, "model in several files: bytes of weights not counted"),
        ),
    ],
)
def test_bytes_of_weights_that_a_step_reads(tmp_path, names, keys, expected):
    infos = [
        (name, (8, i + 1), 0, 32 * (i * (i + 1) // 2), bytes(32 * (i + 1))) for i, name in enumerate(names)
    ]  # 32 bytes, 64, 96
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes([pack_kv("general.architecture", STR, "llama"), *keys], infos))
    assert weight_bytes(GGUFFile(path)) == expected


def test_unknown_weights_leave_the_columns_empty(library, tiny, profile, monkeypatch):
    monkeypatch.setattr(b, "weight_bytes", lambda model: (None, "mixture of experts"))
    dense, fasa = run(tiny, QUICK, profile)
    assert (dense.note, fasa.note) == ("mixture of experts", "") and fasa.kv_bytes > 0
    assert fasa.token_bytes is None and fasa.bytes_per_second is None and fasa.of_copy_rate is None


CPU, GPU, GPU1 = Device("CPU", "a CPU", False), Device("CUDA0", "a GPU", True), Device("CUDA1", "a GPU", True)


@pytest.mark.parametrize(
    "ngl, nkvo, devices, where",
    [
        (99, 0, [CPU], "CPU"),
        (0, 0, [GPU, CPU], "CPU"),
        (0, 1, [GPU, CPU], "CPU"),
        (-1, 0, [GPU, CPU], "CUDA0"),
        (33, 0, [GPU, CPU], "CUDA0"),
        (32, 0, [GPU, CPU], None),
        (99, 1, [GPU, CPU], None),
        (99, 0, [GPU, GPU1, CPU], None),
    ],
)
def test_the_device_that_holds_everything(ngl, nkvo, devices, where):
    assert one_device(32, ngl, nkvo, devices) == where


# ---- the crossover ----


@pytest.mark.parametrize(
    "ratios, depth",
    [
        ((0.8, 0.9, 1.1, 2.0), 200),
        ((1.2, 0.9, 0.985, 2.0), 200),
        ((1.1, 1.2), 0),
        ((0.9, 0.8), None),
        ((1.5, 0.9), None),
        ((None, None, 1.2), 200),
    ],
)
def test_crossover(ratios, depth):
    results = planted(*ratios)
    assert crossover.crossover(results) == depth
    text = crossover.crossover_text(depth, results)
    assert "no crossover among the depths measured" in text if depth is None else f"from depth {depth} on" in text
    results[0].config = {"n_gpu_layers": 99, "gpu_info": "a GPU"}
    assert depth is None or f"--fasa-min-context-gpu {depth}" in crossover.crossover_text(depth, results)


def test_find_crossover_measures_every_depth(library, tiny, profile):
    depth, results = crossover.find_crossover(
        tiny, replace(QUICK, depths=[16, 300], n_gen=3, repetitions=1), ON.replace(min_context=4096), profile=profile
    )
    assert [(r.n_depth, r.sparse_share) for r in results if r.arm == "fasa"] == [(16, 1.0), (300, 1.0)]
    assert depth == crossover.crossover(results)
    with pytest.raises(FasaError, match="--find-crossover looks for one depth; give -np and -nkvo one value"):
        crossover.find_crossover(tiny, replace(QUICK, n_parallel=[1, 2], no_kv_offload=[0, 1]), ON, profile=profile)


# ---- the command line ----


def test_types_go_in_pairs():
    assert _types("f16", None) == [("f16", "f16")] and _types("f16,q8_0", None) == [("f16", "f16"), ("q8_0", "q8_0")]
    assert _types("f16,q8_0", "f16") == [("f16", "f16"), ("q8_0", "f16")] and _types("f16", "f16,q4_0") == [
        ("f16", "f16"),
        ("f16", "q4_0"),
    ]
    with pytest.raises(
        FasaError, match="-ctk and -ctv: expected lists of one length, or one type for all, found 2 and 3"
    ):
        _types("f16,q8_0", "f16,f16,f16")


def test_the_command(library, profiled, capsys, tmp_path):
    def call(*flags, code=0):
        assert (
            cli.main(["bench", str(profiled), "-n", "2", "-r", "1", "-t", "1", "--fasa-min-context", "0", *flags])
            == code
        )
        return capsys.readouterr()

    png = tmp_path / "p.png"
    out, err = call(
        "-d",
        "0,300",
        "-p",
        "8",
        "-np",
        "1,2",
        "-nkvo",
        "0,1",
        "--fasa-k-dom",
        "q4,f16",
        "--fasa-budget",
        "64",
        "--plot",
        str(png),
    )
    lines = out.strip().splitlines()
    assert (
        len(lines) == 2 + 2 * (2 * 3 + 3) + 2 * (2 * 1 + 1)
        and err.endswith(f"picture: {png}\n")
        and png.read_bytes()[:4] == b"\x89PNG"
    )
    assert "| fasa k_dom=f16 |" in out and lines[0].split()[1:11:2] == ["model", "arm", "nkvo", "np", "test"]
    results = [
        json.loads(line)
        for line in call("-d", "300", "-p", "0", "-ctk", "f16,f32", "-o", "jsonl", "-ngl", "0")[0].splitlines()
    ]
    assert [(r["arm"], r["type_k"], r["type_v"], r["no_kv_offload"]) for r in results] == [
        (arm, t, t, False) for t in ("f16", "f32") for arm in ("dense", "fasa")
    ]
    assert results[1]["fasa"]["budget"] == 512 and results[1]["n_ubatch"] == 512 and results[1]["flash_attn"] == 1
    out, err = call("-d", "300", "-ctk", "q8_0", "--plot", str(png), code=1)  # what there is, then the error
    assert (
        out.count("not measured: llama.cpp cannot make a context") == 2
        and "FASA was asked for and no step used it: not measured" in err
    )
    assert "give every --fasa setting one value" in call("--find-crossover", "--fasa-budget", "64,128", code=1).err
    assert "FASA is " in call("--find-crossover", "-d", "32").err
    with pytest.raises(SystemExit):
        cli.main(["bench", str(profiled), "-nkvo", "yes"])
    assert "expected a comma list of 0 and 1, found 'yes'" in capsys.readouterr().err


def test_random_weights_have_no_mass(monkeypatch, capsys, profiled):
    monkeypatch.setattr(synthetic, "cached_model", lambda shape, say: profiled)
    assert cli.main(["bench", "--shape", "8b", "--fasa-mass", "0.9"]) == 1
    err = capsys.readouterr().err
    assert (
        err.count("\n") == 1
        and "--fasa-mass and --fasa-quality with --shape: the attention of random weights is spread evenly, so a "
        "target mass means nothing"
        in err
    )
