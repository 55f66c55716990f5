"""Selecting ahead: the foreseen queries, the laws that lists keep, and which cells they hold."""

import ctypes
from dataclasses import replace

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from tiny_gguf import write_tiny

from fasa_gguf import FasaError, FasaParams
from fasa_gguf import reference as R
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.reasons import Reason
from fasa_gguf.speed.random_model import synthetic_profile

SOME = FasaParams(chunks=4, budget=40, min_context=0, k_dom="f16")
N_PROMPT, N_STEPS = 300, 24


def open_session(model, **kw):
    from fasa_gguf.session import Session

    s = Session(model, **{"n_ctx": 1024, "n_threads": 2, **kw})
    shapes = [s.fasa.layer_shape(il) for il in range(s.fasa.model_info()["n_layer"])]
    s.fasa.set_profile(synthetic_profile([h[1] for h in shapes], [h[2] // 2 if h[1] else 0 for h in shapes], seed=3))
    return s


def generate(s, params, n_steps=N_STEPS, n_vocab=259):
    """Logits of a prompt's end and n_steps steps, [1 + n_steps, n_vocab], and the counters."""
    s.fasa.set_params(params)
    s.fasa.reset_counters()
    s.clear()
    rng = np.random.default_rng(1)
    logits = [s.decode(list(rng.integers(3, n_vocab, N_PROMPT)), 0)]
    for i in range(n_steps):
        logits.append(s.decode([int(logits[-1].argmax())], N_PROMPT + i))
    return np.stack(logits), s.fasa.counters()


@pytest.fixture(scope="module")
def still(tmp_path_factory, library):
    """A model whose feed-forwards add nothing: foreseen queries are the true ones."""
    path = tmp_path_factory.mktemp("ahead") / "still.gguf"
    write_tiny(path, feed_forward=0)
    return path


@pytest.fixture(params=["CPU", "GPU"])
def n_gpu_layers(request):
    if request.param == "GPU":
        request.getfixturevalue("cuda")
    return 99 if request.param == "GPU" else 0


@pytest.mark.parametrize("how", [{"budget": 40}, {"budget": 100}, {"k_dom": "q8"}, {"k_dom": "q4"}])
def test_true_queries_give_the_same_steps(still, n_gpu_layers, how):
    """With lists of one query head: of several, the newest cell moves the heads' shares of a score."""
    params = SOME.replace(per_head=1, **how)
    with open_session(still, n_gpu_layers=n_gpu_layers) as s:
        own, counted = generate(s, params.replace(ahead="off"))
        ahead, of_ahead = generate(s, params.replace(ahead="on"))
        assert counted["layers_ahead"] == 0 and of_ahead["layers_ahead"] == 2 * N_STEPS
        assert s.fasa.layer_ahead_codes() == [Reason.AHEAD_FIRST, Reason.NONE, Reason.NONE]
    assert np.array_equal(own, ahead)
    names = ("tokens_attended", "tokens_visible", "lists", "layers_sparse", "cells_refreshed", "rebuilds")
    assert [counted[n] for n in names] == [of_ahead[n] for n in names]


def test_foreseen_queries_select_otherwise(tiny, n_gpu_layers):
    with open_session(tiny, n_gpu_layers=n_gpu_layers) as s:
        own, _ = generate(s, SOME.replace(ahead="off"))
        ahead, _ = generate(s, SOME.replace(ahead="on"))
    assert not np.array_equal(own, ahead)


# ---- the foreseen queries ----


def observed(model, tokens, **kw):
    """By layer what an observer sees of one prompt: (q, q_ahead or None, why)."""
    from fasa_gguf.session import Session

    with Session(model, n_ctx=256, n_threads=2, **kw) as s:
        seen = {}
        s.fasa.observe(lambda o: seen.update({o.il: (o.q, o.q_ahead, o.ahead_reason)}))
        s.decode(tokens, 0, logits="none")
        s.fasa.observe(None)
        s.fasa.raise_observed()
    return seen


def rope(x, base=10000.0):
    """x [n, n_head, d] at the positions from 0 on, neighbouring dimensions in pairs."""
    angle = np.arange(len(x))[:, None] * base ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])  # [n, d/2]
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    even, odd = x[..., ::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)


def numpy_queries(model, tokens, n_head=4, n_head_kv=2, d=16):
    """Of a tiny llama by layer (q, foreseen q or None), each [n, n_head, d]: W_q * norm(residual), rotated."""
    w = {t.name.removesuffix(".weight"): np.asarray(t.data, np.float64) for t in GGUFReader(model).tensors}
    bias = {name.removesuffix(".bias"): x for name, x in w.items() if name.endswith(".bias")}
    x, n, out = w["token_embd"][tokens], len(tokens), []
    mid = None

    def norm(y, weight):
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * weight

    for il in range(3):
        blk = f"blk.{il}."

        def project(y, part, heads, blk=blk):
            name = blk + part
            return (norm(y, w[blk + "attn_norm"]) @ w[name].T + bias.get(name, 0)).reshape(n, heads, d)

        q, k, v = rope(project(x, "attn_q", n_head)), rope(project(x, "attn_k", 2)), project(x, "attn_v", n_head_kv)
        out.append((q, None if mid is None else rope(project(mid, "attn_q", n_head))))
        k, v = (y.repeat(n_head // n_head_kv, 1) for y in (k, v))
        logits = np.einsum("qhd,khd->hqk", q, k) * d**-0.5
        share = R.softmax(np.where(np.tri(n, dtype=bool), logits, -np.inf))
        mid = x + np.einsum("hqk,khd->qhd", share, v).reshape(n, -1) @ w[blk + "attn_output"].T
        y = norm(mid, w[blk + "ffn_norm"])
        gate = y @ w[blk + "ffn_gate"].T
        x = mid + (gate / (1 + np.exp(-gate)) * (y @ w[blk + "ffn_up"].T)) @ w[blk + "ffn_down"].T
    return out


@pytest.mark.parametrize("biases", [None, {"attn_q": np.linspace(-2, 2, 64)}], ids=["plain", "bias"])
def test_foreseen_queries_are_those_of_the_residual(library, tmp_path, n_gpu_layers, biases):
    write_tiny(tmp_path / "m.gguf", biases=biases)
    tokens = np.random.default_rng(2).integers(3, 259, 40).tolist()
    seen = observed(tmp_path / "m.gguf", tokens, n_gpu_layers=n_gpu_layers)
    wanted = numpy_queries(tmp_path / "m.gguf", tokens)
    assert [seen[il][2] for il in range(3)] == [Reason.AHEAD_FIRST, Reason.NONE, Reason.NONE]
    assert seen[0][1] is None
    for il, (q, q_ahead) in enumerate(wanted):
        size = np.abs(q).max()
        assert np.abs(seen[il][0] - q).max() < 2e-2 * size  # attention reads K and V in f16
        if il:
            assert np.abs(seen[il][1] - q_ahead).max() < 2e-2 * size
            assert np.abs(q_ahead - q).max() > 0.2 * size  # the feed-forward moves them


def without_feed_forward(model, out, il):
    """A copy of `model` whose layer il has a feed-forward that adds nothing."""
    data, header = bytearray(model.read_bytes()), GGUFFile(model)
    tensor = next(t for t in header.tensors if t.name == f"blk.{il}.ffn_down.weight")
    at = header.data_offset + tensor.offset
    data[at : at + tensor.n_bytes] = bytes(tensor.n_bytes)
    out.write_bytes(data)
    return out


@pytest.mark.parametrize("arch", ["llama", "qwen2", "hybrid"])
def test_foreseen_queries_are_those_of_a_model_without_the_feed_forward(library, request, tmp_path, arch):
    """Bit for bit, the same ops on the same residual; of convolutions, whose bits a compiler moves, nearly so."""
    if arch == "hybrid":
        model, layers = request.getfixturevalue("hybrid"), (1, 3)
    else:
        model, layers = tmp_path / "m.gguf", (1, 2)
        write_tiny(model, arch=arch, biases={f"attn_{x}": np.full(64 if x == "q" else 32, 0.5) for x in "qkv"})
    tokens = np.random.default_rng(3).integers(3, 60, 30).tolist()
    seen = observed(model, tokens)
    for il in layers:
        other = observed(without_feed_forward(model, tmp_path / "other.gguf", il - 1), tokens)
        assert seen[il][2] == Reason.NONE
        assert np.abs(seen[il][1] - other[il][0]).max() <= (1e-5 if arch == "hybrid" else 0)
        assert not np.array_equal(seen[il][0], other[il][0])


def test_parallel_blocks_are_not_foreseen(library, sliding):
    """cohere2 adds attention and feed-forward to the layer's input at once."""
    seen = observed(sliding, np.arange(3, 40).tolist())
    assert all(q_ahead is None and why != Reason.NONE for _, q_ahead, why in seen.values()) and len(seen) == 4


# ---- never stale ----


class Script:
    """Steps in which cells come, go and move; the logits and the tokens attended of each."""

    def __init__(self, s, invalidate, on_cpu):
        self.s, self.invalidate, self.on_cpu, self.seen = s, invalidate, on_cpu, []

    def step(self, tokens, pos, seq=0):
        self.batch([(t, pos + i, seq, True) for i, t in enumerate(tokens)])

    def batch(self, items):
        if self.invalidate:
            self.s.fasa.invalidate()
        before = self.s.fasa.counters()
        with self.s.fasa.step_kind("decode"):
            self.s.decode_batch(items)
        after = self.s.fasa.counters()
        attended = after["tokens_attended"] - before["tokens_attended"]
        ahead = after["layers_ahead"] - before["layers_ahead"]
        self.seen.append((attended, ahead, [self.s.logits(i) for i in range(len(items))]))

    def run(self, params):
        """Sequences 0 and 1; drafts, some of them rejected; a dense step, a prompt, a failed one, other settings."""
        s = self.s
        s.clear()
        s.fasa.set_params(params)
        s.decode([i * 7 % 250 + 3 for i in range(300)], 0, logits="none")
        for i in range(3):
            self.step([40 + i], 300 + i)
        self.step([50, 51, 52, 53, 54], 303)
        s.remove(0, 305)  # three of five are rejected
        self.step([60], 305)
        self.step([61, 62], 306)
        s.remove(0, 307)
        self.step([63, 64, 65], 307)  # a cell that the last ubatch wrote is written again
        with s.fasa.step_kind("prompt"):
            s.decode([70], 310)
        self.step([71], 311)
        s.decode(range(80, 140), 312, logits="none")  # a prompt behind a decode
        self.step([72], 372)
        saved = s.state()
        s.remove(0, 20, 90)  # a context shift
        s.llama.llama_memory_seq_add(s.memory, 0, 90, -1, -70)
        self.step([73], 303)
        self.step([74], 304)
        s.copy(0, 1)
        self.batch([(75, 305, 0, True), (76, 305, 1, True)])
        self.batch([(77, 306, 0, True), (78, 306, 1, True)])
        self.step([79], 307, 1)
        self.batch([(80, 307, 0, True), (81, 308, 1, True)])
        s.remove(1, 0)
        self.step([82], 308)
        s.set_state(saved)
        self.step([83], 373)
        self.abort(374)
        self.step([84], 374)
        s.fasa.set_params(params.replace(ahead="off"))
        self.step([85], 375)
        s.fasa.set_params(params)
        self.step([86], 376)
        s.fasa.borrow_list(2, 1)
        self.step([87], 377)
        s.fasa.borrow_list(2, None)
        self.step([88], 378)
        return self.seen

    def abort(self, pos):
        """A step of which some nodes were computed; a GPU does not ask between nodes."""
        if not self.on_cpu:
            return
        asked = []
        self.s.abort = lambda: asked.append(1) or len(asked) > 9
        with pytest.raises(FasaError), self.s.fasa.step_kind("decode"):
            self.s.decode([90], pos)
        self.s.abort = None
        self.s.remove(0, pos)


@pytest.mark.parametrize("how", [{}, {"mass": 0.7, "floor": 20, "cap": 200, "k_dom": "q4"}, {"per_head": 1}])
@pytest.mark.parametrize("unified", [False, True])
def test_lists_made_ahead_are_never_stale(tiny, n_gpu_layers, unified, how):
    params, got = SOME.replace(recent=2, ahead="on", **how), []
    for invalidate in (False, True):
        with open_session(tiny, n_gpu_layers=n_gpu_layers, n_seq_max=2, kv_unified=unified, n_ctx=2048) as s:
            got.append(Script(s, invalidate, n_gpu_layers == 0).run(params))
    layers = [n for _, n, _ in got[0]]
    assert layers[-4:] == [0, 2, 1, 2] and set(layers[:-4]) == {2} and len(layers) == 22
    for i, (mine, fresh) in enumerate(zip(*got, strict=True)):
        assert mine[:2] == fresh[:2], i
        assert np.array_equal(mine[2], fresh[2]) and np.isfinite(mine[2]).all(), i


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter on the queries of layers 1 and 2. With two of them a layer's queries are not foreseen."""
    path, rng = tmp_path_factory.mktemp("lora") / "lora.gguf", np.random.default_rng(1)
    w = GGUFWriter(path, "llama")
    w.add_type("adapter")
    w.add_string("adapter.type", "lora")
    w.add_float32("adapter.lora.alpha", 8.0)
    for il in (1, 2):
        for part, shape in (("a", (4, 64)), ("b", (64, 4))):
            w.add_tensor(f"blk.{il}.attn_q.weight.lora_{part}", (rng.standard_normal(shape) * 0.1).astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


class Adapted:
    """Two adapters of a session, which are on or off."""

    def __init__(self, s, path):
        self.s = s
        found = [s.llama.llama_adapter_lora_init(s.model, str(path).encode()) for _ in range(2)]
        self.adapters = (s.llama.llama_adapter_lora_p_ctypes * 2)(*found)

    def __call__(self, on):
        scales = (ctypes.c_float * 2)(1.0, 1.0)
        assert self.s.llama.llama_set_adapters_lora(self.s.ctx, self.adapters, 2 if on else 0, scales) == 0


@pytest.mark.parametrize("keys", [False, True], ids=["one ranking", "two rankings"])
def test_layers_that_are_no_longer_foreseen_are_never_stale(tiny, adapter, n_gpu_layers, keys):
    """Between two steps of a sequence that of another one may be the first in which they are not."""
    order = [(0, 0), (0, 0), (1, 1), (0, 1), (1, 1), (0, 0), (1, 0), (0, 0), (1, 1), (1, 1), (0, 0), (1, 0)]
    got = []
    for invalidate in (False, True):
        with open_session(tiny, n_gpu_layers=n_gpu_layers, n_seq_max=2, n_ctx=2048) as s:
            if keys:
                p, other = (synthetic_profile([2] * 3, [8] * 3, seed=seed) for seed in (3, 4))
                s.fasa.set_profile(replace(p, ahead_ranking=other.ranking))
            adapt, n, rows = Adapted(s, adapter), [200, 200], []
            s.fasa.set_params(SOME.replace(budget=100, sink=1, recent=1, ahead="on"))
            for seq in (0, 1):
                s.decode([i * (7 + seq) % 250 + 3 for i in range(200)], 0, seq, logits="none")
            for seq, on in order:
                adapt(on)
                if invalidate:
                    s.fasa.invalidate()
                before = s.fasa.counters()["layers_ahead"]
                rows.append(s.decode([9 + n[seq] % 200], n[seq], seq))
                assert s.fasa.counters()["layers_ahead"] - before == (0 if on else 2)
                n[seq] += 1
            got.append(np.stack(rows))
    assert np.array_equal(*got)


# ---- which cells a list holds ----


@pytest.mark.parametrize("unified", [False, True])
def test_a_draft_longer_than_recent_is_attended_whole(tiny, n_gpu_layers, unified):
    """Eight tokens of each of two sequences, of which only one is recent."""
    params = SOME.replace(budget=1, sink=1, recent=1, ahead="on")
    with open_session(tiny, n_gpu_layers=n_gpu_layers, n_seq_max=2, kv_unified=unified, n_ctx=2048) as s:
        s.fasa.set_params(params)
        for seq in (0, 1):
            s.decode(range(3, 103), 0, seq, logits="none")
        s.fasa.reset_counters()
        with s.fasa.step_kind("decode"):
            s.decode_batch([(9 + i, 100 + i, seq, True) for seq in (0, 1) for i in range(8)])
        c = s.fasa.counters()
    assert c["steps_sparse"] == 1 and c["layers_ahead"] == 2 and c["lists"] == 3 * 2 * 2 * 8
    own, ahead = 3, [max(3, 1 + i + 1) for i in range(8)]  # sink, recent and one more; sink and what was drafted so far
    assert c["tokens_attended"] == 2 * 2 * (8 * own + 2 * sum(ahead))


def reference_count(o, h, pos, profile, params, fresh):
    """Tokens that KV head h attends in the layer of an observation of one token, by reference.py."""
    n_group = o.q.shape[1] // o.k.shape[1]
    heads, k = slice(h * n_group, (h + 1) * n_group), o.k[: pos + 1, h].astype(np.float32)
    step = {"k": k, "v": k, "positions": np.arange(pos + 1), "visible": np.ones(pos + 1, bool), "scale": o.scale}
    step |= {"ranking": profile.ranking[o.il][h], "dims": R.chunk_dims(16, 16, "norm"), "p": params}
    if fresh:
        step |= {"q_ahead": o.q_ahead[0, heads], "fresh": np.arange(pos + 1) == pos}
    return len(R.decode_step(q=o.q[0, heads], **step)[1])


@pytest.mark.parametrize("model", ["still", "tiny"])
def test_masses_are_those_of_the_reference(request, model, n_gpu_layers):
    """Of the own queries in the first layer, of the foreseen ones and without the newest cell in the others."""
    params = SOME.replace(mass=0.6, floor=1, cap=300, sink=2, recent=3, ahead="on")
    with open_session(request.getfixturevalue(model), n_gpu_layers=n_gpu_layers) as s:
        profile = synthetic_profile([2] * 3, [8] * 3, seed=3)
        s.fasa.set_params(params)
        s.decode([i * 7 % 250 + 3 for i in range(N_PROMPT)], 0, logits="none")
        seen = []
        s.fasa.observe(lambda o: seen.append(replace(o, k=o.k.copy())))
        n_off = 0
        for i in range(8):
            seen.clear()
            before = s.fasa.counters()["tokens_attended"]
            s.decode([40 + i], N_PROMPT + i)
            counted = s.fasa.counters()["tokens_attended"] - before
            pos = N_PROMPT + i
            wanted = sum(reference_count(o, h, pos, profile, params, o.il > 0) for o in seen for h in range(2))
            assert abs(counted - wanted) <= 2  # a sum at the edge of the mass
            n_off += counted != wanted
        s.fasa.observe(None)
        s.fasa.raise_observed()
    assert n_off <= 2
    assert all(np.array_equal(o.q, o.q_ahead) for o in seen if o.il > 0) == (model == "still")


@pytest.mark.parametrize("unified", [False, True])
def test_true_queries_give_the_same_steps_of_several_sequences(still, n_gpu_layers, unified):
    got = []
    for ahead in ("off", "on"):
        with open_session(still, n_gpu_layers=n_gpu_layers, n_seq_max=3, kv_unified=unified, n_ctx=3072) as s:
            s.fasa.set_params(SOME.replace(per_head=1, recent=8, ahead=ahead))
            for seq in range(3):
                s.decode([i * (7 + seq) % 250 + 3 for i in range(200 + 50 * seq)], 0, seq, logits="none")
            rows = []
            with s.fasa.step_kind("decode"):
                for i in range(6):
                    s.decode_batch([(9 + i + j, 200 + 50 * q + 4 * i + j, q, True) for q in range(3) for j in range(4)])
                    rows += [s.logits(j) for j in range(12)]
            got.append((np.stack(rows), s.fasa.counters()["tokens_attended"]))
    assert np.array_equal(got[0][0], got[1][0]) and got[0][1] == got[1][1]


# ---- graphs and profiles ----


def test_a_graph_is_used_again(tiny, n_gpu_layers):
    def reused(ahead):
        with open_session(tiny, n_gpu_layers=n_gpu_layers) as s:
            generate(s, SOME.replace(ahead=ahead))
            return s.llama.llama_perf_context(s.ctx).n_reused

    assert reused("on") == reused("off") > N_STEPS // 2


def test_a_profile_keeps_a_layer_on_its_own_queries(tiny, n_gpu_layers):
    with open_session(tiny, n_gpu_layers=n_gpu_layers) as s:
        p = synthetic_profile([2] * 3, [8] * 3, seed=3)
        own, _ = generate(s, SOME.replace(ahead="off"))
        s.fasa.set_profile(replace(p, ahead=np.array([1, 0, 1], np.uint8)))
        _, counted = generate(s, SOME.replace(ahead="on"))
        assert s.fasa.layer_ahead_codes() == [Reason.AHEAD_FIRST, Reason.AHEAD_PROFILE, Reason.NONE]
        assert counted["layers_ahead"] == N_STEPS
        s.fasa.set_profile(replace(p, ahead=np.zeros(3, np.uint8)))
        none, counted = generate(s, SOME.replace(ahead="on"))
        assert counted["layers_ahead"] == 0 and np.array_equal(none, own)


def test_foreseen_queries_have_a_ranking_and_weights_of_their_own(still):
    """They are used where a layer selects ahead; with true queries that is the step with this ranking."""
    first, second = (synthetic_profile([2] * 3, [8] * 3, seed=seed) for seed in (3, 4))
    weight = [[np.full((2, 3), x + il, np.float32) for il in range(3)] for x in (0.5, 0.25)]
    params = SOME.replace(per_head=1)
    may = np.array([0, 1, 1], np.uint8)
    with open_session(still) as s:
        both = replace(
            first, weight_k=3, weight=weight[0], ahead=may, ahead_ranking=second.ranking, ahead_weight=weight[1]
        )
        mixed = replace(
            first,
            ranking=[first.ranking[0], *second.ranking[1:]],
            weight_k=3,
            weight=[weight[0][0], *weight[1][1:]],
        )
        s.fasa.set_profile(both)
        ahead, _ = generate(s, params.replace(ahead="on"))
        off, _ = generate(s, params.replace(ahead="off"))
        s.fasa.set_profile(mixed)
        assert np.array_equal(ahead, generate(s, params.replace(ahead="off"))[0])
        s.fasa.set_profile(replace(both, ahead=None, ahead_ranking=None, ahead_weight=None))
        assert np.array_equal(off, generate(s, params.replace(ahead="on"))[0])  # as older profiles: the same one
    assert not np.array_equal(ahead, off)


@pytest.mark.parametrize("arch", ["still", "sliding"])
def test_queries_that_cannot_be_foreseen_have_the_ranking_of_own_ones(request, n_gpu_layers, arch):
    """Whatever the profile allows: of the first layer, and of every layer with attention beside the feed-forward."""
    model = request.getfixturevalue(arch)
    n_own = 1 if arch == "still" else 4
    params = SOME.replace(per_head=1)
    with open_session(model, n_gpu_layers=n_gpu_layers) as s:
        shapes = [s.fasa.layer_shape(il) for il in range(s.fasa.model_info()["n_layer"])]
        first, second = (
            synthetic_profile([h[1] for h in shapes], [h[2] // 2 for h in shapes], seed=seed) for seed in (3, 4)
        )
        s.fasa.set_profile(replace(first, ahead_ranking=second.ranking))
        ahead, counted = generate(s, params.replace(ahead="on"), n_vocab=60)
        assert counted["layers_ahead"] == (len(shapes) - n_own) * N_STEPS
        s.fasa.set_profile(replace(first, ranking=[*first.ranking[:n_own], *second.ranking[n_own:]]))
        own, _ = generate(s, params.replace(ahead="off"), n_vocab=60)
        s.fasa.set_profile(second)
        other, _ = generate(s, params.replace(ahead="off"), n_vocab=60)
    assert np.array_equal(ahead, own) and not np.array_equal(own, other)


def test_switching_in_a_live_context_is_as_if_it_had_been_so(tiny, n_gpu_layers):
    with open_session(tiny, n_gpu_layers=n_gpu_layers) as s:
        alone = {
            ahead: generate(s, SOME.replace(ahead=ahead, mass=0.6, floor=10, cap=99), 1) for ahead in ("off", "on")
        }
        tokens, pos = [int(alone["off"][0][0].argmax())], N_PROMPT
        for ahead in ("on", "off", "on", "on", "off"):
            s.fasa.set_params(SOME.replace(ahead=ahead, mass=0.6, floor=10, cap=99))
            s.remove(0, pos)
            assert np.array_equal(s.decode(tokens, pos), alone[ahead][0][1])
