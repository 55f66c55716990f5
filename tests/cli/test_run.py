"""`run` on prompts as people have them: BOS, chats, folders, contexts beyond the training length."""

import io
import os
import signal
import subprocess
import sys

import pytest
from paths import ROOT
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
    assert code == 1 and "error: --system is for --chat and -cnv; add one of them" in err
    code, _, err = run("--chat", "-p", "hi", model=str(tiny))
    assert code == 1 and "tiny.gguf: this model has no chat template; give one with --chat-template NAME or" in err
    code, _, err = run("--chat", "-p", "hi", "--system", "no")
    assert code == 1 and "chatty.gguf: its chat template does not take these messages: no such system" in err


def test_chat_templates_by_name_and_from_a_file(run, tiny, tmp_path):
    _, tokens, _ = run("--chat", "-p", "hi", "-sys", "Be brief.", "--chat-template", "chatml", model=str(tiny))
    want = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text_of(tokens) == want.strip()
    (tmp_path / "own.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    _, tokens, _ = run("--chat", "-p", "hi", "--chat-template-file", str(tmp_path / "own.jinja"))
    assert text_of(tokens) == "<hi>"
    code, _, err = run("--chat", "-p", "hi", "--chat-template", "nothing")
    assert code == 1 and "error: --chat-template nothing: expected one of " in err and ", chatml, " in err
    code, _, err = run("-p", "hi", "--chat-template", "chatml")
    assert code == 1 and "error: --chat-template is for --chat and -cnv; add one of them" in err
    both = ["--chat-template", "chatml", "--chat-template-file", str(tmp_path / "own.jinja")]
    assert "expected one of them, found both" in run("--chat", "-p", "hi", *both)[2]
    (tmp_path / "bad.jinja").write_text("{% for %}")
    code, _, err = run("--chat", "-p", "hi", "--chat-template-file", str(tmp_path / "bad.jinja"))
    assert code == 1 and "bad.jinja: this chat template cannot be read: " in err and "(line 1)" in err


@pytest.fixture
def chat(chatty, monkeypatch, capsys):
    """(exit status, tokens of each turn's prompt, stdout, stderr) of `run -cnv` with these lines on stdin."""
    from fasa_gguf import Llama

    def call(lines, *argv, answer=None, model=chatty):
        prompts, generate = [], Llama.generate

        def seen(self, tokens, **kw):
            prompts.append(list(tokens))
            return iter(answer) if answer is not None else generate(self, tokens, **kw)

        monkeypatch.setattr(Llama, "generate", seen)
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        code = cli.main(["run", model, "-t", "1", "-cnv", *argv])
        monkeypatch.setattr(Llama, "generate", generate)
        found = capsys.readouterr()
        return code, prompts, found.out, found.err

    return call


def test_a_conversation(chat, tiny):
    yes = [3 + ord(c) for c in "yes"]
    code, prompts, out, _ = chat("one\n\ntwo\n/exit\nthree\n", "-sys", "Be brief.", answer=[*yes, 2])
    assert code == 0 and out == "yes\nyes\n"
    assert text_of(prompts[0]) == "[system]Be brief.[user]one[assistant]"
    assert text_of(prompts[1]) == "[system]Be brief.[user]one[assistant]yes[user]two[assistant]" and len(prompts) == 2
    _, prompts, _, _ = chat("two\n", "-p", "one", answer=yes)
    assert [text_of(p) for p in prompts] == ["[user]one[assistant]", "[user]one[assistant]yes[user]two[assistant]"]
    assert chat("", answer=yes)[:3] == (0, [], "")
    code, prompts, _, err = chat("x" * 600 + "\n", answer=yes)
    assert code == 1 and "the conversation has " in err and "and the context 512; use -c" in err
    code, _, _, err = chat("hi\n", model=str(tiny))
    assert code == 1 and "this model has no chat template" in err


def test_a_turn_reuses_those_before(chat):
    code, prompts, _, err = chat("one " * 30 + "\ntwo\n", "-n", "4", "-c", "512")
    n_reused = int(err.split(" reused")[0].split()[-1])
    assert code == 0 and len(prompts) == 2 and n_reused >= len(prompts[0]) - 1
    assert f"prompt {len(prompts[0]) + len(prompts[1]) - n_reused} tokens in " in err and "; 8 tokens at " in err


def test_ctrl_c_ends_an_answer_and_then_the_chat(chatty):
    code = (
        "import sys, time\nfrom fasa_gguf import Llama\nfrom fasa_gguf.cli.main import main\n"
        "def never_ends(self, tokens, **kw):\n    while True:\n        time.sleep(0.01)\n        yield 68\n"
        "Llama.generate = never_ends\nsys.exit(main(['run', sys.argv[1], '-t', '1', '-cnv', '-n', '-1']))"
    )
    command = [sys.executable, "-c", code, chatty]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    assert os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    while b"the answer was ended" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and b"prompt " in err and b"Traceback" not in err, err


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
