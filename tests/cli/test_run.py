"""`run` on prompts as people have them: BOS, chat templates, folders, contexts beyond the training length."""

import pytest
from tiny_gguf import write_tiny

from fasa_gguf import FasaError
from fasa_gguf.cli import main as cli
from fasa_gguf.session import Session

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if messages[0].content == 'no' %}{{ raise_exception('no such system') }}{% endif %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def chatty(library, tmp_path_factory):
    """A model whose tokenizer adds a BOS, trained on 512 tokens."""
    path = tmp_path_factory.mktemp("run") / "chatty.gguf"
    write_tiny(path, n_ctx=512, chat_template=TEMPLATE)
    return str(path)


@pytest.fixture
def run(chatty, monkeypatch, capsys):
    """(exit status, tokens of the prompt, stderr) of `run` with these arguments."""
    from fasa_gguf import Llama

    prompts = []
    monkeypatch.setattr(Llama, "generate", lambda self, tokens, **kw: (prompts.append(list(tokens)), iter([2]))[1])

    def call(*argv, model=chatty):
        prompts.clear()
        code = cli.main(["run", model, "-t", "1", *argv])
        return code, prompts[0] if prompts else None, capsys.readouterr().err

    return call


def text_of(tokens):
    """The tiny vocabulary has a token a byte; a space is U+2581, and there is one before the text."""
    return bytes(t - 3 for t in tokens if t >= 3).decode().replace("\u2581", " ").strip()


def test_one_bos(run, chatty):
    _, plain, _ = run("-p", "hello")
    _, own, _ = run("-p", "<s>hello")
    assert plain.count(1) == own.count(1) == 1 and plain[0] == own[0] == 1
    _, two, _ = run("-p", "<s><s>hello")  # the user's own second one stays
    assert two[:2] == [1, 1] and two.count(1) == 2
    with Session(chatty, n_ctx=256, n_threads=1) as s:
        assert s.tokenize("<s>hello") == own and s.tokenize("<s>hello", bos=False) == own
        assert s.tokenize("hello", bos=False) == plain[1:]


def test_chat_uses_the_models_template(run):
    _, tokens, _ = run("--chat", "-p", "hi", "--system", "Be brief.")
    assert tokens[0] == 1 and tokens.count(1) == 1
    assert text_of(tokens) == "[system]Be brief.[user]hi[assistant]"
    _, tokens, _ = run("--chat", "-p", "hi")
    assert text_of(tokens) == "[user]hi[assistant]"


def test_chat_that_cannot_be(run, tiny):
    code, _, err = run("-p", "hi", "--system", "x")
    assert code == 1 and "error: --system is for --chat; add it" in err
    code, _, err = run("--chat", "-p", "hi", model=str(tiny))
    assert code == 1 and "tiny.gguf: this model has no chat template; omit --chat" in err
    code, _, err = run("--chat", "-p", "hi", "--system", "no")
    assert code == 1 and "chatty.gguf: its chat template does not take these messages: no such system" in err


def test_a_context_above_the_training_length(run):
    _, _, err = run("-p", "hi", "-c", "1024")
    assert "-c 1024: the model was trained on 512 tokens" in err
    for argv in (["-c", "512"], ["-c", "0"], []):
        assert "trained" not in run("-p", "hi", *argv)[2]
    code, _, err = run("-p", "x" * 600)  # the default is no longer than the training
    assert code == 1 and "and the context 512; use -c" in err


def test_a_folder_is_called_one(run, tiny, tmp_path):
    for more in ([], ["--no-fasa"], ["--fasa-budget", "9"]):
        code, _, err = run("-p", "hi", *more, model=str(tmp_path))
        assert code == 1
        assert f"{tmp_path}: not a GGUF file: expected a regular file, found a folder; give the path of a model" in err
    (tmp_path / "config.json").write_text("{}")
    assert (
        "found a folder of Hugging Face weights, for `fasa-gguf calibrate` alone"
        in run("-p", "hi", model=str(tmp_path))[2]
    )
    (tmp_path / "a.gguf").write_bytes(b"")
    assert "found a folder with a.gguf; give the path of one of them" in run("-p", "hi", model=str(tmp_path))[2]
    with pytest.raises(FasaError, match=r"found a folder with a\.gguf"):
        Session(tmp_path)
