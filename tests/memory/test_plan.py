"""The plan: K, V and K_dom against what the library counts, scratch against llama.cpp's dry run, contexts that fit."""

import contextlib
import json
import os
import re

import pytest
from tiny_gguf import gguf_bytes, write_tiny

from fasa_gguf import FasaError, FasaParams, runtime, session
from fasa_gguf.cli import main as cli
from fasa_gguf.gguf.file import STR, GGUFFile, TensorInfo, pack_kv
from fasa_gguf.gguf.shape import model_shape
from fasa_gguf.memory import plan
from fasa_gguf.memory.host import GIB, MIB, Available
from fasa_gguf.memory.model import device_bytes, read_model
from fasa_gguf.memory.plan import (
    ContextShape,
    compute_bytes,
    device_layers,
    estimate,
    largest_context,
    pool_bytes,
    too_small,
    ways,
)
from fasa_gguf.runtime.settings import ContextSettings
from fasa_gguf.session import Session
from fasa_gguf.speed import plan_check
from fasa_gguf.speed import random_model as synthetic

ON = FasaParams(min_context=0)


def gpu_settings(**changes):
    """All layers on the GPU, and the batch of `fasa-gguf plan`; n_ctx 0: what the model was trained on."""
    return ContextSettings(**{"n_ctx": 0, "n_batch": 2048, "n_gpu_layers": -1, **changes})


# ---- exact ----


def counted(path, profile, params, settings):
    """(planned, counted) bytes of K and V, and of the dominant keys, on the CPU."""
    settings = settings.replace(n_gpu_layers=0, n_threads=1)
    with Session(path, settings) as s:
        s.fasa.set_profile(profile)
        s.fasa.set_params(params)
        c = s.fasa.counters()
    x = estimate(read_model(path, profile), settings, params)
    assert x.device == x.kv_pinned == 0
    return (x.kv_ram, x.k_dom_ram), (c["bytes_kv"], c["bytes_k_dom"])


@pytest.mark.parametrize(
    "settings",
    [
        gpu_settings(n_ctx=1000),
        gpu_settings(n_ctx=3 * 400, n_seq_max=3),
        gpu_settings(n_ctx=700, n_seq_max=4, kv_unified=True),
        gpu_settings(n_ctx=100, type_k="f32", type_v="q8_0"),
        gpu_settings(n_ctx=256, type_k="bf16", type_v="q4_0"),
        gpu_settings(),
    ],
)
@pytest.mark.parametrize(
    "params", [ON, ON.replace(k_dom="q8", chunks=3), ON.replace(k_dom="f16", chunks=8), ON.replace(chunks=99)]
)
def test_a_small_model(library, tmp_path_factory, profile, tiny, settings, params):
    if settings.type_v[0] == "q":  # blocks of 32 need a wider head
        tiny = tmp_path_factory.mktemp("wide") / "wide.gguf"
        write_tiny(tiny, head_dim=32)
        profile = synthetic.synthetic_profile(*model_shape(GGUFFile(tiny)))
    planned, found = counted(tiny, profile, params, settings)
    assert planned == found and min(found) > 0


@pytest.mark.parametrize(
    "settings",
    [
        gpu_settings(n_ctx=1500),
        gpu_settings(n_ctx=1500, swa_full=False, n_ubatch=32),
        gpu_settings(n_ctx=3000, swa_full=False, n_seq_max=2),
        gpu_settings(n_ctx=3000, swa_full=False, n_seq_max=3, kv_unified=True, n_batch=100),
    ],
)
def test_a_model_with_windows_has_two_caches(library, sliding, settings):
    planned, found = counted(sliding, synthetic.synthetic_profile([2] * 4, [8] * 4), ON, settings)
    assert planned == found


@pytest.mark.parametrize("swa_full", [True, False])
def test_dominant_keys_where_a_window_reaches_farther(library, sliding, swa_full):
    """A layer whose window of 64 is not longer than the list stays dense, and is planned without dominant keys."""
    profile, sizes = synthetic.synthetic_profile([2] * 4, [8] * 4), []
    for params in (ON.replace(budget=63), ON.replace(budget=64), ON.replace(mass=0.9, floor=8, cap=63)):
        planned, found = counted(sliding, profile, params, gpu_settings(n_ctx=1500, swa_full=swa_full))
        assert planned == found
        sizes.append(found[1])
    assert sizes[0] == sizes[2] > sizes[1]


def test_plan_knows_windows(sliding, capsys):
    def plan(*flags):
        assert cli.main(["plan", str(sliding), "-c", "4096", "--json", *flags]) == 0
        out, err = capsys.readouterr()
        return json.loads(out), err

    cell, (full, err) = 2 * 2 * 16 * 2, plan()
    assert full["windows"] == [64, 64, 64, 0] and full["swa_full"] is True
    assert full["ways"][0]["kv"] == 4 * 4096 * cell
    assert "layers 0-2 have a sliding window of 64 tokens; their cache holds 4,096 cells of a sequence" in err
    short, err = plan("--no-swa-full")
    assert short["swa_full"] is False and short["ways"][0]["kv"] == (4096 + 3 * 768) * cell
    assert "their cache holds 768 cells of a sequence" in err  # 64 and a ubatch of 512, padded to 256


def test_layers_without_a_cache_or_a_ranking(library, hybrid):
    for chunks in ([0, 8, 0, 8], [0, 8, 0, 0]):
        planned, found = counted(hybrid, synthetic.synthetic_profile([0, 2, 0, 2], chunks), ON, gpu_settings(n_ctx=512))
        assert planned == found and found[0] == 2 * 2 * 2 * 16 * 2 * 512


def test_smollm2(library, smollm2):
    profile = synthetic.synthetic_profile(*model_shape(GGUFFile(smollm2)))
    for settings in (gpu_settings(n_ctx=2000), gpu_settings(n_ctx=2000, n_seq_max=2, type_k="q8_0", type_v="q8_0")):
        planned, found = counted(smollm2, profile, ON, settings)
        assert planned == found


def test_weights_by_layer(tiny):
    m = read_model(tiny)

    def on_device(ngl):
        return estimate(m, gpu_settings(n_ctx=256, n_gpu_layers=ngl)).weights

    total = sum(t.n_bytes + -t.n_bytes % 128 for t in GGUFFile(tiny).tensors if t.name != "token_embd.weight")
    assert on_device(-1) == on_device(4) == on_device(99) == total and on_device(0) == 0
    assert (
        on_device(1) == m.output_bytes and on_device(2) == m.output_bytes + m.layers[2].n_bytes
    )  # the last layers first
    half = estimate(m, gpu_settings(n_ctx=256, n_gpu_layers=2), ON)
    assert half.kv_ram == 2 * half.kv and half.k_dom_ram == 2 * half.k_dom > 0


def test_a_tied_embedding_is_on_the_device_too(smollm2, tiny):
    assert read_model(tiny).output_bytes == 259 * 64 * 4 + 64 * 4  # the output matrix and its norm
    of = {t.name: t for t in GGUFFile(smollm2).tensors}
    assert "output.weight" not in of
    assert read_model(smollm2).output_bytes == device_bytes(of["token_embd.weight"]) + device_bytes(
        of["output_norm.weight"]
    )


def test_quantised_rows_end_in_a_block_of_512_values():
    def tensor(kind, columns, n_bytes):
        return TensorInfo("x", (columns, 4), kind, 0, n_bytes)

    assert device_bytes(tensor(2, 512, 1152)) == 1152
    assert device_bytes(tensor(2, 64, 144)) == 512 >= 144 + 14 * 18 > 384  # 14 blocks more, at 128 bytes
    assert device_bytes(tensor(0, 3, 48)) == 128


# ---- the scratch ----


def dry_run(path, contexts, n_seq=1, swa_full=True):
    """MiB of the compute buffers that llama.cpp would take for (n_ctx, n_ubatch), with nothing allocated."""
    llama, log, out = session.runtime.library.load(), [], []
    keep = llama.llama_log_callback(lambda level, text, user: log.append(text.decode("utf-8", "replace")))
    llama.llama_log_set(keep, None)
    try:
        p = llama.llama_model_default_params()
        p.no_alloc, p.load_mode, p.n_gpu_layers = True, 0, 0
        model = llama.llama_model_load_from_file(os.fsencode(path), p)
        for n_ctx, n_ubatch in contexts:
            c = llama.llama_context_default_params()
            c.n_ctx, c.n_batch, c.n_ubatch, c.flash_attn_type, c.n_seq_max, c.swa_full = (
                n_ctx,
                2048,
                n_ubatch,
                1,
                n_seq,
                swa_full,
            )
            log.clear()
            llama.llama_free(llama.llama_init_from_model(model, c))
            out.append(sum(float(x) for x in re.findall(r"compute buffer size = +([\d.]+) MiB", "".join(log))))
        llama.llama_model_free(model)
    finally:
        session.quiet()
        llama.llama_log_set(session._log_callback, None)
    return out


@pytest.mark.parametrize("which", ["shape_8b", "smollm2", "sliding"])
def test_scratch_is_llama_cpps_own(library, request, which):
    path = request.getfixturevalue(which)
    m, contexts = read_model(path), [(c, t) for c in (4096, 131072, 1 << 20) for t in (128, 512, 2048)]
    for (n_ctx, t), found in zip(contexts, dry_run(path, contexts), strict=True):
        s = gpu_settings(n_ctx=n_ctx, n_ubatch=t)
        assert compute_bytes(ContextShape(m, s), m.layers) / MIB == pytest.approx(found, rel=0.01, abs=0.3)
        dense, pool = estimate(m, s), pool_bytes(max(m.n_ff, m.n_embd), t)  # which is ggml-cuda's, beside the buffer
        assert dense.scratch == compute_bytes(ContextShape(m, s), m.layers) + pool


def test_the_pool_is_what_the_library_checks_before_a_ubatch(library):
    """4 bytes for each value of a token that goes into a matrix product, and 16 MiB."""
    assert pool_bytes(14336, 512) == 4 * 14336 * 512 + 16 * MIB
    if not hasattr(runtime.library, "api"):
        pytest.skip("this library has no fasa_pool_bytes")
    _, lib = runtime.library.api()
    for n_act, n_tokens in ((14336, 512), (1, 1), (1 << 20, 1 << 16)):
        assert lib.fasa_pool_bytes(n_act, n_tokens) == pool_bytes(n_act, n_tokens)


def test_what_staging_and_quantised_caches_add(shape_8b):
    m, s = read_model(shape_8b), gpu_settings(n_ctx=1 << 20)
    f16, q8_0 = (2 * plan.row_bytes(kind, 1024) * (1 << 20) for kind in ("f16", "q8_0"))  # of one layer

    def scratch(mode, **kw):
        return estimate(m, s.replace(mode=mode, **kw), ON).scratch

    q8 = {"type_k": "q8_0", "type_v": "q8_0"}
    flat = scratch("host") - scratch("device")
    assert 0.97 * f16 < flat < 1.01 * f16  # the feed-forward's own peak is a little above attention's
    assert scratch("host", **q8) - scratch("device", **q8) == pytest.approx(q8_0, rel=0.01)
    assert scratch("device", **q8) - scratch("device") == pytest.approx(f16, rel=0.03)


# ---- what fits ----


@pytest.mark.parametrize("mode", ["device", "host"])
def test_the_largest_context_fits_and_the_next_does_not(shape_8b, mode):
    m, s = read_model(shape_8b), gpu_settings(n_seq_max=2, mode=mode)
    n = largest_context(m, s, ON, Available(12 * GIB))

    def need(n):
        return estimate(m, s.replace(n_ctx=n), ON).device

    assert n % 512 == 0 and need(n) <= 12 * GIB < need(n + 512)
    assert largest_context(m, s, ON, Available(GIB)) == 0


@pytest.mark.parametrize(
    "n_layer, ngl, shares, wanted",
    [
        (3, -1, [1, 1], [[0, 1], [2, 3]]),  # 3 is the output
        (3, -1, [3, 1], [[0, 1, 2], [3]]),
        (3, -1, [1, 0], [[0, 1, 2, 3], []]),
        (3, -1, [0, 1], [[], [0, 1, 2, 3]]),
        (3, 2, [1, 1], [[2], [3]]),
        (3, 1, [1, 1], [[3], []]),
        (3, 0, [1, 1], [[], []]),
        (32, -1, [1, 1], [list(range(17)), list(range(17, 33))]),
        (32, -1, [1, 1, 2], [list(range(9)), list(range(9, 17)), list(range(17, 33))]),
        (32, 99, [0, 0], [list(range(17)), list(range(17, 33))]),
    ],
)
def test_layers_of_several_devices(n_layer, ngl, shares, wanted):
    """As llama.cpp assigns them: the first device whose share ends behind the layer's place."""
    assert [list(part) for part in device_layers(n_layer, ngl, shares)] == wanted


@pytest.mark.parametrize("mode", ["device", "host"])
@pytest.mark.parametrize("ngl", [-1, 20])
def test_the_parts_of_a_plan_are_the_whole(shape_8b, mode, ngl):
    """All but the scratch, which each device has for itself."""
    model = read_model(shape_8b)
    settings = gpu_settings(n_ctx=32768, mode=mode, n_gpu_layers=ngl)
    params = FasaParams(min_context=0, budget=1024)
    whole = estimate(model, settings, params)
    parts = [estimate(model, settings, params, x) for x in device_layers(len(model.layers), ngl, [2, 1, 1])]
    for name in ("weights", "kv", "k_dom", "kv_pinned", "row_cache"):
        assert sum(getattr(x, name) for x in parts) == getattr(whole, name), name
    assert all(0 < x.scratch <= whole.scratch for x in parts)
    assert parts[0].scratch < parts[2].scratch  # the logits are computed where the output is


def test_the_largest_context_fits_every_device(shape_8b):
    """Of two GPUs with as much memory together, the uneven pair is split by its memory, as llama.cpp does."""
    model, settings, params = read_model(shape_8b), gpu_settings(), FasaParams(min_context=0)
    one = largest_context(model, settings, params, Available(24 * GIB))
    even = Available(24 * GIB, devices=(12 * GIB, 12 * GIB))
    two = largest_context(model, settings, params, even)
    assert 0 < two < one  # a scratch on each, and layers are whole
    parts = device_layers(len(model.layers), -1, even.devices)

    def needs(n_ctx):
        return [estimate(model, settings.replace(n_ctx=n_ctx), params, part).device for part in parts]

    assert max(needs(two)) <= 12 * GIB < max(needs(two + 256))
    assert too_small(model, settings.replace(n_ctx=two), params, even.devices, [1, 0])[0] == 0


def test_host_memory_bounds_fasa_m(shape_8b):
    m = read_model(shape_8b)
    found = {w.name: w for w in ways(m, gpu_settings(n_ctx=32768), ON, Available(12 * GIB, 8 * GIB))}
    assert list(found) == ["dense f16", "dense q8_0", "FASA-C", "FASA-M"]
    assert (found["FASA-M"].largest, found["FASA-M"].bound) == (65536, "host") and found["FASA-C"].bound == "device"
    assert found["dense q8_0"].largest > found["dense f16"].largest > found["FASA-C"].largest
    assert found["FASA-M"].memory.kv_pinned == found["FASA-C"].memory.kv == 4 * GIB and found["FASA-M"].memory.kv == 0
    assert ways(m, gpu_settings(n_ctx=32768), ON)[0].largest is None


def test_layers_on_a_gpu_that_wait_have_no_dominant_keys(shape_8b):
    m, s, p = read_model(shape_8b), gpu_settings(n_ctx=8192), FasaParams(min_context_gpu=16384)
    host = s.replace(mode="host")
    assert (
        estimate(m, s, p).k_dom == 0 < estimate(m, s.replace(n_ctx=65536), p).k_dom
    )  # below and above min_context_gpu
    assert (
        estimate(m, host, p).k_dom == estimate(m, s, ON).k_dom > 0
    )  # dense would be slow in mode host, so nothing waits


def test_the_share_that_the_method_promises(shape_8b):
    m, s = read_model(shape_8b), gpu_settings(n_ctx=32768)
    dense, host = estimate(m, s).kv, s.replace(mode="host")
    assert estimate(m, host, ON).k_dom <= dense / 10
    assert estimate(m, host, ON.replace(k_dom="f16", chunks=16)).k_dom <= 0.13 * dense


def test_the_row_cache(shape_8b):
    m, s = read_model(shape_8b), gpu_settings(n_ctx=32768)

    def cache(mib, **kw):
        return estimate(m, s.replace(mode="host", **kw), ON.replace(row_cache=mib)).row_cache

    assert cache(0) == 0 and 0.98 * 256 * MIB < cache(256) <= 256 * MIB and cache(256, no_kv_offload=True) == 0
    assert cache(1 << 20) == 32 * 8 * 32768 * (512 + 8)  # no more slots than cells
    assert cache(-1) == 32 * 8 * 2 * ON.budget * (512 + 8)
    assert estimate(m, s, ON.replace(row_cache=256)).row_cache == 0


def test_models_that_have_no_plan(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes([pack_kv("general.architecture", STR, "mamba")]))
    with pytest.raises(FasaError, match="architecture mamba has no RoPE"):
        read_model(path)
    with pytest.raises(FasaError, match="cache type q8_0: expected rows of a multiple of 32 values, found 48"):
        plan.row_bytes("q8_0", 48)


# ---- the command ----


def test_the_command(library, shape_8b, tiny, capsys):
    assert (
        cli.main(["plan", str(shape_8b), "-c", "32768", "--vram", "12G", "--ram", "64G", "--fasa-row-cache", "100"])
        == 0
    )
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["MiB at 32,768 tokens", "dense f16", "dense q8_0", "FASA-C", "FASA-M"]
    rows = {line[0]: line[1:] for line in lines[2:]}
    assert rows["K and V"] == ["4,096", "2,176", "4,096", "0"] and rows["host memory, pinned"] == [
        "0",
        "0",
        "0",
        "4,096",
    ]
    assert (
        rows["fits 12,288 MiB, host 65,536"] == ["yes"] * 4
        and "largest context, tokens" in rows
        and rows["row cache"][3] == "100"
    )
    assert (
        cli.main(["plan", str(shape_8b), "-c", "200000", "--vram", "12G"]) == 0
        and "trained on 131,072 tokens" in capsys.readouterr().err
    )
    assert cli.main(["plan", str(tiny), "--json", "-ub", "64"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "min_context_gpu: layers on a GPU use FASA from " in err and "FASA-C: below min_context_gpu, " in err
    assert "planned as if it ranked every attention layer" in err and "give --vram, such as 12G" in err
    assert (found["n_ctx"], found["n_ubatch"], found["device_bytes"]) == (4096, 64, None)
    assert [w["name"] for w in found["ways"]] == ["dense f16", "dense q8_0", "FASA-C", "FASA-M"] and found["ways"][3][
        "kv_pinned"
    ] == 3 * 2 * 2 * 16 * 2 * 4096
    assert (
        cli.main(["plan", str(tiny), "--check"]) == 1
        and "there is none, or no CUDA in this build" in capsys.readouterr().err
    )
    assert cli.main(["plan", str(tiny), "--vram", "12"]) == 1 and "such as 12G or 900M" in capsys.readouterr().err


def test_the_table_of_planned_against_measured():
    row = {
        "mode": "host",
        "weights_planned": 90 * MIB,
        "weights_measured": 100 * MIB,
        "context_planned": 10 * MIB,
        "context_measured": 10 * MIB,
        "device_planned": 100 * MIB,
        "device_measured": 110 * MIB,
        "kv_planned": MIB,
        "kv_counted": MIB,
        "k_dom_planned": MIB,
        "k_dom_counted": MIB,
        "pinned_planned": MIB,
        "pinned_counted": MIB,
        "row_cache_planned": 0,
        "row_cache_counted": 0,
        "scratch_planned": MIB,
        "cuda_before": 500 * MIB,
    }
    text = plan_check.format_check([row])
    assert (
        "| host | weights | 90.0 | 100.0 | -10.0% |" in text
        and "row_cache" not in text
        and "| host | used before the model | | 500.0 | |" in text
    )


def test_check_runs_both_modes(library, tiny, profile, monkeypatch):
    """As if there was a GPU whose memory in use grows by 1 MiB with every look.

    Weights are two looks apart from the start, and so on.
    """
    looks = iter(range(1, 100))
    monkeypatch.setattr(runtime.devices, "cuda_devices", lambda: ["CUDA0"])
    monkeypatch.setattr(runtime.devices, "device_memory", lambda name: (GIB - next(looks) * MIB, GIB))
    monkeypatch.setattr(runtime.context, "kv_mode", lambda mode: contextlib.nullcontext())
    monkeypatch.setattr(runtime.context, "not_pinned", lambda context: "")
    settings = gpu_settings(n_ctx=1024, n_ubatch=64, n_batch=64)
    c, m = plan_check.check(
        tiny, read_model(tiny, profile), settings, FasaParams(budget=64), profile, ("device", "host")
    )
    assert (c["mode"], m["mode"], c["n_ctx"], c["cuda_before"], c["weights_measured"]) == (
        "device",
        "host",
        1024,
        MIB,
        MIB,
    )
    assert c["kv_planned"] == c["kv_counted"] == m["pinned_planned"] and c["k_dom_planned"] == c["k_dom_counted"] > 0
    assert (
        c["opened_measured"] < c["context_measured"] < m["context_measured"]
        and c["error"] == c["device_planned"] / c["device_measured"] - 1
    )
    with pytest.raises(FasaError, match="give -ngl, -1 for all layers"):
        plan_check.check(tiny, read_model(tiny, profile), settings.replace(n_gpu_layers=0), ON, profile, ("device",))


def test_a_plan_has_the_limit_of_the_gpu(shape_8b, monkeypatch):
    """What a context would find: asked with the shape of a layer that selects ahead; without a GPU a constant."""
    from fasa_gguf.memory import gpu_limit
    from fasa_gguf.runtime.gpu_limit import GpuLimit

    m, s, asked = read_model(shape_8b), gpu_settings(n_ctx=8192), []

    def find(backend, **case):
        asked.append((backend, case))
        return GpuLimit(10240, "probe")

    monkeypatch.setattr(gpu_limit, "find_gpu_limit", find)
    monkeypatch.setattr(gpu_limit.runtime.devices, "cuda_devices", list)
    p, found = gpu_limit.planned(m, s, FasaParams())
    assert (p.min_context_gpu, found.source, asked) == (16384, "default", [])
    monkeypatch.setattr(gpu_limit.runtime.devices, "cuda_devices", lambda: ["CUDA0"])
    p, found = gpu_limit.planned(m, s, FasaParams())
    assert (p.min_context_gpu, found.source) == (10240, "probe") and estimate(m, s, p).k_dom == 0
    [(backend, case)] = asked
    assert backend == "CUDA0" and case["attended"] == 512 and case["n_forced"] == 36 and case["n_dom"] == 48
    assert case["beside"] == m.layers[1].feed_forward_bytes > 90e6
    gpu_limit.planned(m, s, FasaParams(ahead="off"))
    assert asked[1][1]["beside"] == 0
    assert gpu_limit.planned(m, s.replace(n_ctx=2048), FasaParams())[1] == GpuLimit(2048, "short")
    for other, params in (
        (s.replace(mode="host"), FasaParams()),
        (s.replace(n_gpu_layers=0), FasaParams()),
        (s.replace(no_kv_offload=True), FasaParams()),
        (s, FasaParams(min_context=0)),
        (s, FasaParams(min_context_gpu=5000)),
    ):
        assert gpu_limit.planned(m, other, params) == (params, None)
    assert len(asked) == 2
