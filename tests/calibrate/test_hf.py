# ruff: noqa: E402 - the modules are imported after importorskip
"""Calibration from Hugging Face weights beside that from the GGUF which the pinned converter makes of them."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed; run `pip install '.[hf]'`")
transformers = pytest.importorskip(
    "transformers", minversion="5.0", reason="transformers 5 is not installed; run `pip install '.[hf]'`"
)

import tiny_hf

from fasa_gguf import FasaError, reference
from fasa_gguf.calibrate import hf_attention
from fasa_gguf.calibrate.calibrator import Calibrator
from fasa_gguf.calibrate.gguf import Calibration, calibrate
from fasa_gguf.calibrate.hf import HFCalibration, calibrate_hf
from fasa_gguf.calibrate.hf_model import weights_hash
from fasa_gguf.calibrate.hf_probe import Probe
from fasa_gguf.calibrate.ranking import CalibrationParams
from fasa_gguf.cli import main as cli
from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.profile import embed
from fasa_gguf.profile.agreement import compare_profiles
from fasa_gguf.profile.profile import Profile
from fasa_gguf.session import Session

SMALL = CalibrationParams(context=512, queries=16, budget=40)
IDS = ("ids", np.random.default_rng(1).integers(3, tiny_hf.N_VOCAB, 1024).tolist())
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def models(library, tmp_path_factory):
    """{name: (PreTrainedModel, planted chunks, folder; its GGUF is FOLDER.gguf)}."""
    root = tmp_path_factory.mktemp("hf")
    tree = tiny_hf.source_tree(root / "tree")
    out = {}
    for name in tiny_hf.MODELS:
        model, planted = tiny_hf.build(name)
        model.save_pretrained(root / name)
        out[name] = (model, planted, root / name)
    tiny_hf.convert(tree, [folder for _, _, folder in out.values()])
    return out


@pytest.fixture(scope="module")
def llama():
    return tiny_hf.build("llama")[0]


def gguf(folder):
    return folder.with_name(folder.name + ".gguf")


@pytest.mark.parametrize("name", tiny_hf.MODELS)
def test_both_ways_agree(models, name):
    """Rankings, weights and what is embedded: the planted chunks come first, and either profile fits the GGUF.

    Layers with a short window are ranked, too; by default they have no ranking.
    """
    model, planted, folder = models[name]
    every = replace(SMALL, window_layers=True)
    from_hf, from_gguf = calibrate_hf(model, IDS, every, n_threads=1), calibrate(gguf(folder), IDS, every, n_threads=1)
    assert from_hf.window == from_gguf.window and from_hf.rope.keys() == from_gguf.rope.keys()
    assert from_hf.rope.get("base_window") == pytest.approx(from_gguf.rope.get("base_window"))
    for il, rows in enumerate(planted):
        for h, chunks in enumerate(rows):
            for p in (from_hf, from_gguf):
                assert set(p.ranking[il][h][: tiny_hf.PLANTED].tolist()) == set(chunks.tolist())
    found = compare_profiles(from_hf, from_gguf, k=tiny_hf.PLANTED)
    assert found.mean()[1] == 1 and found.mean()[0] > 0.97 and not found.only
    for a, b in zip(from_hf.recall, from_gguf.recall, strict=True):
        assert np.allclose(a[:, tiny_hf.PLANTED - 1], b[:, tiny_hf.PLANTED - 1], atol=0.005)
    _, _, n_rot, layout = tiny_hf.MODELS[name]
    assert from_hf.rope["layout"] == layout and from_hf.rope["dims"] == from_gguf.rope["dims"] == n_rot
    assert from_hf.rope["base"] == pytest.approx(from_gguf.rope["base"]) and from_hf.rope["scale"] == pytest.approx(
        from_gguf.rope["scale"]
    )
    assert (
        from_hf.calibration["source"] == "hf"
        and from_hf.calibration["corpus_sha256"] == from_gguf.calibration["corpus_sha256"]
    )
    assert embed.doubts(GGUFFile(gguf(folder)), from_hf) == []
    out = embed.rewrite(gguf(folder), from_hf, folder.with_name("embedded.gguf"), force=True)
    assert Profile.load(out).ranking[1].tolist() == from_hf.ranking[1].tolist()
    with Session(out, n_ctx=512, n_threads=1) as s:
        s.fasa.set_profile(Profile.load(out))


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_both_ways_leave_the_same_window_layers_out(models, name):
    """By default; the layers that attend all tokens are ranked as with the others."""
    model, planted, folder = models[name]
    windows = HFCalibration(model, IDS, SMALL).windows
    assert 0 in windows and 128 in windows
    for p in (calibrate_hf(model, IDS, SMALL, n_threads=1), calibrate(gguf(folder), IDS, SMALL, n_threads=1)):
        assert [n == 0 for n in p.n_chunk] == [r.size == 0 for r in p.ranking] == [w > 0 for w in windows]
        for il in (il for il, w in enumerate(windows) if not w):
            for row, chunks in zip(p.ranking[il], planted[il], strict=True):
                assert set(row[: tiny_hf.PLANTED].tolist()) == set(chunks.tolist())
        assert embed.doubts(GGUFFile(gguf(folder)), p) == []


@pytest.mark.parametrize("name", tiny_hf.MODELS)
def test_queries_and_keys_are_those_of_llama_cpp(models, name):
    """Post-RoPE, after q/k-norm, chunk by chunk; a query times its scale, which some architectures apply before."""
    model, _, folder = models[name]
    ours = HFCalibration(model, IDS, SMALL)
    with Session(gguf(folder), n_ctx=512, n_threads=1) as session:
        theirs = Calibration(session, IDS, SMALL)
        assert [s[:3] for s in ours.shapes] == [s[:3] for s in theirs.shapes] and ours.windows == theirs.windows
        samples = [c._pass(list(range(len(c.shapes))), lambda n: None) for c in (ours, theirs)]
    for il in range(len(ours.shapes)):
        a, b = (s[il] for s in samples)
        assert a.window == b.window and a.soft_cap == b.soft_cap and a.n == b.n == 512
        for x, y in (
            (a.q[:, :, a.dims] * a.scale, b.q[:, :, b.dims] * b.scale),
            (a.k[:, :, a.dims], b.k[:, :, b.dims]),
        ):
            x, y = x.astype(np.float32), y.astype(np.float32)
            assert np.abs(x - y).max() < (0.004 if il == 0 else 0.03) * np.abs(y).max()
        assert np.allclose(a.k_sum, b.k_sum, rtol=3e-3)
        parallel = name in ("gptneox", "cohere")  # attention and feed-forward read the same
        assert (a.q_ahead is None) == (b.q_ahead is None) == (il == 0 or parallel)
        if a.q_ahead is not None:
            x, y = (s.q_ahead[:, :, s.dims] * s.scale for s in (a, b))
            assert np.abs(x - y).max() < 0.03 * np.abs(y).max()
            assert np.abs(x - a.q[:, :, a.dims] * a.scale).max() > 0.1 * np.abs(y).max()


EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
CONVOLUTIONS = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}
STREAMS = {
    "num_hidden_layers": 4,
    "vocab_size_per_layer_input": tiny_hf.N_VOCAB,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 0,
    "laurel_rank": 8,
    "layer_types": ["full_attention"] * 4,
    "activation_sparsity_pattern": [0.0] * 4,
}


@pytest.mark.parametrize(
    "kind, settings, layers",
    [
        ("GraniteConfig", {"residual_multiplier": 0.5}, {1}),
        ("GraniteMoeConfig", {**EXPERTS, "residual_multiplier": 0.5}, {1}),
        ("MixtralConfig", EXPERTS, {1}),
        ("GptOssConfig", {**EXPERTS, "sliding_window": 128}, {1}),
        ("Olmo2Config", {}, {1}),  # norms behind attention and feed-forward
        ("Lfm2Config", CONVOLUTIONS, {1, 3}),  # a convolution and its feed-forward before each
        ("PhiConfig", {}, set()),  # attention and feed-forward side by side
        ("Cohere2Config", {}, set()),
        ("Gemma3nTextConfig", STREAMS, set()),  # several residual streams
    ],
)
def test_whose_queries_can_be_foreseen_is_measured(kind, settings, layers):
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**tiny_hf.COMMON, **tiny_hf.GQA, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for w in model.parameters():
            if w.ndim < 2:
                w.add_(torch.randn_like(w), alpha=0.1)
    c = HFCalibration(model, IDS, SMALL)
    assert c.foresight.good == layers
    seen = c._pass([il for il, shape in enumerate(c.shapes) if shape[1]], lambda n: None)
    assert {il for il, s in seen.items() if s.q_ahead is not None} == layers
    assert not c.foresight.q and not c.foresight._calls and not any(m._forward_pre_hooks for m in model.modules())


def test_foreseen_queries_do_not_know_the_feed_forward(llama):
    """Those of a model whose first layer has none, bit for bit."""
    other = tiny_hf.build("llama")[0]
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.zero_()
    ours, theirs = (HFCalibration(m, IDS, SMALL)._pass([1], lambda n: None)[1] for m in (llama, other))
    assert np.array_equal(ours.q_ahead, theirs.q) and np.array_equal(theirs.q_ahead, theirs.q)
    assert not np.allclose(ours.q, theirs.q, atol=0.1)


def test_the_rows_of_a_llama_gguf_are_permuted(models):
    """The same weights in another order: dimension numbers, or the other layout, would name other chunks."""
    model, planted, folder = models["llama"]
    g = GGUFFile(gguf(folder))
    t = next(t for t in g.tensors if t.name == "blk.0.attn_k.weight")
    stored = np.fromfile(gguf(folder), "<f4", 64 * 64, offset=g.data_offset + t.offset).reshape(
        2, 32, 64
    )  # [n_head_kv, head_dim, n_embd]
    ours = model.model.layers[0].self_attn.k_proj.weight.detach().numpy().reshape(2, 32, 64)
    assert not np.array_equal(stored, ours)
    pairs = [reference.chunk_dims(32, 32, layout) for layout in ("norm", "neox")]
    assert np.array_equal(stored[:, pairs[0]], ours[:, pairs[1]])
    c = HFCalibration(model, IDS, SMALL)
    c.layout = "norm"
    assert all(
        set(c.run().ranking[il][h][:3].tolist()) != set(planted[il][h].tolist()) for il in (0, 1) for h in (0, 1)
    )


@pytest.mark.parametrize("method", ["energy", "ca"])
def test_other_methods_over_several_windows(models, method):
    model, planted, folder = models["llama"]
    params = CalibrationParams(context=512, queries=16, budget=40, windows=2, method=method)
    a, b = calibrate_hf(model, IDS, params), calibrate(gguf(folder), IDS, params, n_threads=1)
    assert compare_profiles(a, b).mean()[0] > 0.99 and a.calibration["tokens"] == 1024 and a.ranking_method == method
    assert set(a.ranking[1][0][:3].tolist()) == set(planted[1][0].tolist())


def test_a_longer_text_keeps_no_more(llama):
    """Two windows: sums over both, the sample of the first, and no pass that is not one forward pass per window."""

    class Counted(HFCalibration):
        passes = 0

        def _forward(self, *args):
            self.passes += 1
            super()._forward(*args)

    one, two = (Counted(llama, IDS, CalibrationParams(context=512, queries=16, budget=40, windows=n)) for n in (1, 2))
    seen = [c._pass([0, 1], lambda n: None) for c in (one, two)]
    assert (one.passes, two.passes) == (4, 5)  # three probes each
    assert (
        [s[1].n for s in seen] == [512, 1024]
        and np.array_equal(seen[0][1].k, seen[1][1].k)
        and np.array_equal(seen[0][1].q, seen[1][1].q)
    )
    assert seen[1][0].q.shape == (16, 4, 32) and seen[1][0].k.shape == (512, 2, 32) and seen[1][0].k.dtype == np.float16
    assert seen[1][0]._tail == [] and seen[1][0]._keys is None
    assert (seen[1][0].k_sum > 1.5 * seen[0][0].k_sum).all()


def test_the_sample_under_a_sliding_window(models):
    c = HFCalibration(models["gemma3"][0], IDS, SMALL)
    assert c.windows == [128] * 5 + [0]
    s = c._pass([0, 5], lambda n: None)
    heads, keys, pos = s[0].case(1)
    assert heads.shape == (2, 16, 32) and len(keys) == 128 + 15 and pos.tolist() == list(range(127, 143))
    assert np.array_equal(keys, s[0].k[-143:, 1].astype(np.float32)) and len(s[5].case(1)[1]) == 512


def test_only_layers_that_reach_farther_are_ranked(models):
    model, _, folder = models["gemma3"]
    for p in (calibrate_hf(model, IDS, SMALL, n_threads=1), calibrate(gguf(folder), IDS, SMALL, n_threads=1)):
        assert p.n_chunk == [0] * 5 + [16] and p.window == [128] * 5 + [0]


def test_the_windows_of_the_gguf_count(models):
    """phi3's window is ignored by llama.cpp, and so by a profile for its GGUF."""
    model, _, folder = models["phi3"]
    windowed = transformers.AutoModelForCausalLM.from_config(
        transformers.Phi3Config(**{**model.config.to_dict(), "sliding_window": 100})
    )
    assert HFCalibration(windowed, IDS, SMALL).windows == [100, 100]
    assert HFCalibration(windowed, IDS, SMALL, gguf=gguf(folder)).windows == [0, 0]


def test_the_attention_is_transformers_own(monkeypatch):
    """Hidden states by our function and by `eager`: soft-capping, learned sinks, sliding windows, several blocks."""
    monkeypatch.setattr(hf_attention, "BLOCK", 50)
    sinks = transformers.GptOssConfig(
        **{**tiny_hf.COMMON, **tiny_hf.GQA}, sliding_window=40, num_local_experts=2, num_experts_per_tok=1
    )
    ids = torch.tensor(IDS[1][:170])[None]
    for model in (
        tiny_hf.build("llama")[0],
        tiny_hf.build("gemma2")[0],
        tiny_hf.build("gemma3")[0],
        transformers.AutoModelForCausalLM.from_config(sinks, dtype=torch.float32).eval(),
    ):
        hf_attention.import_torch()
        rows = []
        for name in ("eager", hf_attention.NAME):
            model.set_attn_implementation(name)
            with torch.inference_mode():
                rows.append(model.base_model(ids, use_cache=False).last_hidden_state)
        assert torch.allclose(*rows, atol=1e-4) and rows[0].std() > 0.1


def test_the_model_is_left_as_it_was(llama):
    llama.set_attn_implementation("eager")
    calibrate_hf(llama, IDS, SMALL)
    assert llama.config._attn_implementation == "eager" and hf_attention._watcher is None


def test_what_a_wrong_config_says_is_measured(llama, monkeypatch):
    c = HFCalibration(llama, IDS, SMALL)
    probe = Probe(c._forward, tiny_hf.N_VOCAB)
    assert probe.layout(lambda il: 32) == "neox" and probe.layout(lambda il: 16) is None
    monkeypatch.setattr(HFCalibration, "_n_rot", lambda self, il, width: 16)
    with pytest.raises(
        FasaError, match="architecture LlamaForCausalLM does not rotate its keys in the pairs that its config tells of"
    ):
        HFCalibration(llama, IDS, SMALL)


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        (
            "GPT2Config",
            {"n_embd": 64, "n_layer": 2, "n_head": 4},
            r"GPT2LMHeadModel has no RoPE \(no rope_parameters in its config\), so it has no frequency chunks",
        ),
        ("BloomConfig", {"n_layer": 2, "n_head": 4}, "BloomForCausalLM has no RoPE"),
        ("FalconConfig", {"alibi": True}, "FalconForCausalLM has no RoPE"),
        (
            "DeepseekV2Config",
            {"kv_lora_rank": 16, "q_lora_rank": None, "n_routed_experts": 2},
            "DeepseekV2ForCausalLM has multi-head latent attention, which has no keys per head to rank",
        ),
        ("T5GemmaConfig", None, "T5GemmaForConditionalGeneration .*; FASA does not apply"),
    ],
)
def test_models_out_of_scope_are_named_before_their_weights_are_read(tmp_path, kind, settings, message):
    config = getattr(transformers, kind)(**({**tiny_hf.COMMON, **settings} if settings is not None else {}))
    config.architectures = [message.split()[0]]
    config.save_pretrained(tmp_path)  # there are no weights
    with pytest.raises(FasaError, match=f"architecture {message}"):
        calibrate_hf(tmp_path, IDS, SMALL)


def test_keys_that_do_not_rotate_are_refused():
    """A config with RoPE parameters, and layers that use none."""
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.SmolLM3Config(**tiny_hf.COMMON, num_key_value_heads=2, no_rope_layers=[0, 0]), dtype=torch.float32
    ).eval()
    with pytest.raises(FasaError, match="architecture SmolLM3ForCausalLM has no RoPE, so"):
        HFCalibration(model, IDS, SMALL)


def test_attention_that_cannot_be_seen_is_refused():
    """Falcon attends by code of its own."""
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.FalconConfig(**tiny_hf.COMMON), dtype=torch.float32
    ).eval()
    with pytest.raises(
        FasaError,
        match=r"FalconForCausalLM shows no attention layer through .* AttentionInterface; calibrate its GGUF instead",
    ):
        HFCalibration(model, IDS, SMALL)


def test_refusals(llama, tiny, tmp_path, monkeypatch):
    with pytest.raises(FasaError, match=r"expected a Hugging Face model folder, found no config.json in it"):
        calibrate_hf(tmp_path, IDS, SMALL)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FasaError, match="transformers cannot load this model: "):
        calibrate_hf(tmp_path, IDS, SMALL)
    llama.config.save_pretrained(tmp_path)
    with pytest.raises(FasaError, match=r"transformers cannot load this model: .*no file named"):
        calibrate_hf(tmp_path, IDS, SMALL)
    with pytest.raises(FasaError, match="transformers cannot load the tokenizer"):
        calibrate_hf(tmp_path, ("t", "some text"), SMALL)
    with pytest.raises(FasaError, match="dtype 'f8': expected one of auto, f32, f16, bf16"):
        calibrate_hf(tmp_path, IDS, SMALL, dtype="f8")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(FasaError, match="device map 'auto' needs accelerate; run `pip install accelerate`"):
        calibrate_hf(tmp_path, IDS, SMALL, device_map="auto")
    with pytest.raises(FasaError, match="a text needs a tokenizer; give token ids"):
        calibrate_hf(llama, ("t", "some text"), SMALL)
    with pytest.raises(FasaError, match="ids: the text has 100 tokens; calibration needs at least 256"):
        calibrate_hf(llama, ("ids", IDS[1][:100]), SMALL)
    with pytest.raises(
        FasaError,
        match="for another model: it has 2 layers, 2 KV heads, 16 chunks, the model 3 layers, 2 KV heads, 8 chunks",
    ):
        HFCalibration(llama, IDS, SMALL, gguf=tiny)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        FasaError, match=r"need torch, transformers 5 and safetensors .*; run `pip install 'fasa_gguf\[hf\]'`"
    ):
        calibrate_hf(tmp_path, IDS, SMALL)


def test_an_interrupted_calibration_goes_on(models, tmp_path, monkeypatch):
    folder, out = models["llama"][2], tmp_path / "p.json"
    whole, rank, ranked = calibrate_hf(folder, IDS, SMALL), Calibrator._rank_layer, []

    def stop_after_one(self, il, s):
        ranked.append(il)
        if len(ranked) == 2:
            raise KeyboardInterrupt
        return rank(self, il, s)

    monkeypatch.setattr(Calibrator, "_rank_layer", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        calibrate_hf(folder, IDS, SMALL, out)
    ranked.append(-1)
    assert calibrate_hf(folder, IDS, SMALL, out).to_flat() == whole.to_flat() and ranked == [0, 1, -1, 1]
    assert Profile.load(out).calibration["weights_sha256"] == weights_hash(folder) and len(weights_hash(folder)) == 64


def test_the_hash_is_of_the_projections(models, tmp_path):
    hashes = {name: weights_hash(models[name][2]) for name in ("llama", "phi3", "gptneox", "qwen3")}
    assert len(set(hashes.values())) == 4 and None not in hashes.values() and weights_hash(tmp_path) is None


def test_half_precision(models):
    """The checkpoint in bf16 gives the same dominant chunks."""
    profiles = [calibrate_hf(models["llama"][2], IDS, SMALL, dtype=d) for d in ("f32", "bf16")]
    assert compare_profiles(*profiles, k=3).mean()[1] == 1


def test_a_device_map(models):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    a, b = (calibrate_hf(models["qwen3"][2], IDS, SMALL, dtype="f32", device_map=d) for d in ({"": "cpu"}, "cpu"))
    assert a.to_flat() == b.to_flat()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_gives_the_same(models):
    a, b = (calibrate_hf(models["llama"][2], IDS, SMALL, dtype="f32", device_map=d) for d in ("cuda", "cpu"))
    assert compare_profiles(a, b, k=3).mean()[1] == 1


def test_progress(llama):
    steps = []
    calibrate_hf(llama, IDS, SMALL, progress=lambda *step: steps.append(step))
    assert [s for s in steps if s[0] == "reading"][-1] == ("reading", 512, 512) and steps[0] == ("reading", 256, 512)
    assert steps[-1] == ("ranking", 2, 2)


def test_the_command_line(models, tmp_path, capsys):
    """A folder with a tokenizer: calibrate, embed-profile --hf, inspect --against."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds

    model, planted, folder = models["llama"]
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(kinds.BPE(vocab={c: i for i, c in enumerate(sorted(letters))}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    home = tmp_path / "tiny.model"
    model.save_pretrained(home)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(home)
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(np.random.default_rng(2).integers(32, 127, 3000).tolist()))

    assert (
        cli.main(["calibrate", str(home) + "/", "-f", str(text), "-c", "512", "--dtype", "f32", "--device", "cpu"]) == 0
    )
    out = capsys.readouterr().out.strip()
    assert out == str(tmp_path / "tiny.model.fasa.json") and Profile.load(out).calibration["corpus"] == "text.txt"
    embedded = tmp_path / "m.gguf"
    assert (
        cli.main(
            ["embed-profile", str(gguf(folder)), "--hf", str(home), "-f", str(text), "-c", "512", "-o", str(embedded)]
        )
        == 0
    )
    captured = capsys.readouterr()
    assert captured.out.strip() == str(embedded) and "fasa_gguf:" not in captured.err  # no doubts
    assert Profile.load(embedded).ranking[0].tolist() == Profile.load(out).ranking[0].tolist()
    assert set(Profile.load(embedded).ranking[0][1][:3].tolist()) == set(planted[0][1].tolist())
    assert cli.main(["inspect", out, "--against", str(embedded), "--top", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["spearman"] == found["overlap"] == 1 and [r["k"] for r in found["layers"]] == [3, 3]
    for argv, message in (
        (["calibrate", str(home), "-ngl", "1"], "-ngl is for a GGUF; Hugging Face weights take --device"),
        (
            ["calibrate", str(gguf(folder)), "--device", "cpu"],
            "--device is for Hugging Face weights; a GGUF takes -ngl",
        ),
        (["calibrate", str(gguf(folder)), "--dtype", "f32"], "--dtype is for Hugging Face weights; a GGUF takes -ngl"),
        (
            ["embed-profile", str(gguf(folder)), "--hf", str(home), "--profile", out],
            "--profile was given, and --hf needs none",
        ),
        (
            ["embed-profile", str(gguf(folder)), "--hf", str(home), "--remove"],
            "--hf was given, and --remove needs none",
        ),
        (
            ["embed-profile", str(gguf(models["qwen2"][2])), "--hf", str(home), "-f", str(text)],
            "the profile is for another model",
        ),
    ):
        assert cli.main(argv) == 1 and message in capsys.readouterr().err
