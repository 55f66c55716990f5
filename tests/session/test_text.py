"""The text of tokens: nothing is lost, however long a piece is."""

import pytest
from tiny_gguf import write_tiny

from fasa_gguf import FasaError
from fasa_gguf.cli import main as cli
from fasa_gguf.session import Session

WORDS = ["-" * n for n in (31, 32, 33, 64, 65, 300, 3000)] + ["क्षेत्र" * 9]
TOKENS = list(range(259, 259 + len(WORDS)))


@pytest.fixture(scope="module")
def wordy(library, tmp_path_factory):
    path = tmp_path_factory.mktemp("wordy") / "wordy.gguf"
    write_tiny(path, words=WORDS)
    return path


def test_a_session_gives_every_piece_whole(wordy):
    with Session(wordy, n_ctx=256, n_threads=1) as s:
        assert [s.detokenize([t]) for t in TOKENS] == WORDS
        assert s.detokenize(TOKENS) == "".join(WORDS)
        assert s.detokenize([1, *TOKENS[:2], 2]) == "<s>" + WORDS[0] + WORDS[1] + "</s>"


def test_the_drop_in_gives_every_piece_whole(wordy):
    from fasa_gguf import Llama

    llm = Llama(str(wordy), n_ctx=256, n_threads=1, verbose=False, fasa="off")
    assert [llm.detokenize([t]).decode() for t in TOKENS] == WORDS
    assert llm.tokenizer().decode(TOKENS) == "".join(WORDS)
    assert llm._model.token_to_piece(TOKENS[5]) == WORDS[5].encode()
    assert llm.detokenize([1, 2]) == b"" and llm.detokenize([1, 2], special=True) == b"<s></s>"
    assert llm.detokenize([]) == b"" and llm.detokenize([3 + 0xE0]) == b"\xe0"  # part of a character
    llm.close()


def test_run_prints_every_piece_whole(wordy, capsys, monkeypatch):
    from fasa_gguf import Llama

    monkeypatch.setattr(Llama, "generate", lambda self, tokens, **kwargs: iter(TOKENS))
    assert cli.main(["run", str(wordy), "-p", "x", "-c", "256", "-n", str(len(TOKENS)), "--no-fasa"]) == 0
    assert capsys.readouterr().out == "".join(WORDS) + "\n"


def test_a_model_without_a_vocabulary_reads_no_text(library, sliding, capsys):
    """llama.cpp would end the process."""
    with (
        Session(sliding, n_ctx=256, n_threads=1) as s,
        pytest.raises(FasaError, match=r"gguf: this model has no vocab"),
    ):
        s.tokenize("a")
    assert cli.main(["calibrate", str(sliding), "-c", "256"]) == 1
    assert "this model has no vocabulary, so it reads no text" in capsys.readouterr().err
    from fasa_gguf import Llama

    llm = Llama(str(sliding), n_ctx=256, n_threads=1, verbose=False, fasa="off")
    with pytest.raises(FasaError, match=r"gguf: this model has no vocabulary"):
        llm.create_completion("a", max_tokens=1)
    llm.close()
