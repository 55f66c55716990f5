"""Reported situations: output, threads and processes around a model. As test_context.py."""

import time

import pytest
from reported import python, sparse_steps, text_of

from fasa_gguf import FasaError
from fasa_gguf.session import Session

PROMPT = "a" * 200
START = (
    "import sys; sys.path.insert(0, 'tests/helpers')\nfrom reported import ON, text_of\n"
    "from fasa_gguf import FasaError, Llama\n"
    "def make(**kw): return Llama(sys.argv[1], verbose=False, **{'n_ctx': 1024, 'n_threads': 1, 'fasa': ON, **kw})\n"
)


@pytest.mark.parametrize(
    "code",
    [
        "llm = make()\ntext_of(llm, 'a')",
        "llm = make()\ntokens = llm.generate([5] * 50)\nnext(tokens)",
        "llm = make()\nllm.itself = llm\nchunks = llm.create_completion('a', stream=True)\nnext(chunks)",
        "from fasa_gguf.session import Session\ns = Session(sys.argv[1], n_ctx=256)\ns.decode([1, 2], 0)",
        "import threading, time\nllm = make()\n"
        "def work():\n    while True: text_of(llm, 'a' * 100, 50)\n"
        "threading.Thread(target=work, daemon=True).start()\ntime.sleep(0.2)",
    ],
    ids=["idle", "generating", "streaming in a circle", "session", "thread"],
)
def test_the_interpreter_ends_with_a_model_open(profiled, code):
    """abetlen/llama-cpp-python#2002: "TypeError: 'NoneType' object is not callable" in __del__ as Python exits. It ends
    without a word, whatever the model was doing."""
    run = python(START + code, profiled)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_a_load_fails_and_the_error_is_the_only_one(profiled, tmp_path):
    """abetlen/llama-cpp-python#2104: when loading fails the destructor raises too and hides the reason. There is one
    exception, for each place where it can fail."""
    (tmp_path / "no.gguf").write_bytes(b"GGUF" + bytes(100))
    code = START + (
        "from fasa_gguf import FasaParams\n"
        "for path, kw in ((sys.argv[2], {}), (sys.argv[1] + '.no', {}), (sys.argv[1], {'type_k': 8}),\n"
        "                 (sys.argv[1], {'flash_attn': False, 'fasa': ON}), (sys.argv[1], {'fasa': 'what'})):\n"
        "    try: Llama(path, verbose=False, **kw)\n"
        "    except (ValueError, FasaError) as e: print(type(e).__name__)"
    )
    run = python(code, profiled, tmp_path / "no.gguf")
    assert run.stdout.split() == ["ValueError"] * 3 + ["FasaError"] * 2, run.stderr
    assert "Exception ignored" not in run.stderr and "Traceback" not in run.stderr


def test_verbose_false_prints_nothing(profiled):
    """abetlen/llama-cpp-python#478: verbose=False still prints. It prints nothing, to stdout or stderr: not when it
    loads, completes, embeds, saves or goes beyond the training length."""
    code = START + (
        "for kw in ({}, {'fasa': 'off'}, {'n_ctx': 8192}, {'embedding': True, 'pooling_type': 1}):\n"
        "    llm = make(**kw)\n    text_of(llm, 'a' * 100)\n    llm.load_state(llm.save_state())\n"
        "    if kw.get('embedding'): llm.embed(['a', 'b'])\n    llm.close()"
    )
    run = python(code, profiled)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_a_notebook_whose_stdout_is_no_file(profiled):
    """abetlen/llama-cpp-python#796: with verbose=False a model fails to load in a notebook, where sys.stdout has no
    fileno(). It loads, and what is printed arrives, also where there is no sys.stdout at all."""
    code = START + (
        "import io\nfor out in (io.StringIO(), None):\n    sys.stdout = sys.stderr = out\n"
        "    llm = make()\n    text_of(llm, 'a')\n    print('here')\n"
        "    sys.__stdout__.write(out.getvalue() if out else 'none')"
    )
    run = python(code, profiled)
    assert run.stdout == "here\nnone", run.stderr


def test_other_threads_print_while_models_load(profiled):
    """abetlen/llama-cpp-python#1874: with verbose=False the output of other threads is lost while models load, and
    sometimes for good. Every line arrives."""
    code = START + (
        "import threading, time\nlines, stop = [], []\n"
        "def talk():\n    while not stop:\n        print(len(lines), flush=True)\n        lines.append(1)\n"
        "        time.sleep(0.0005)\n"
        "def load():\n    for _ in range(8): make().close()\n"
        "talker = threading.Thread(target=talk)\nloaders = [threading.Thread(target=load) for _ in range(3)]\n"
        "for t in (talker, *loaders): t.start()\nfor t in loaders: t.join()\nstop.append(1)\ntalker.join()\n"
        "print('lines', len(lines))"
    )
    run = python(code, profiled)
    *lines, last = run.stdout.splitlines()
    assert last == f"lines {len(lines)}" and len(lines) > 20, run.stderr[-500:]


def test_two_threads_ask_one_model(profiled):
    """abetlen/llama-cpp-python#471: `executor.map(llm, prompts)` ends the process. The answers come one after the
    other, each as if it had been asked alone."""
    code = START + (
        "from concurrent.futures import ThreadPoolExecutor\nllm, prompts = make(), ['a' * 150, 'b' * 150, 'c' * 150]\n"
        "want = [text_of(make(), p, 12) for p in prompts]\nwith ThreadPoolExecutor(3) as pool:\n"
        "    for _ in range(4): print([*pool.map(lambda p: text_of(llm, p, 12), prompts)] == want)\n"
        "print(llm.fasa_stats()['steps_sparse'] > 50)"
    )
    run = python(code, profiled)
    assert run.stdout.split() == ["True"] * 5, run.stderr[-500:]


def test_a_model_is_closed_while_it_answers(profiled):
    """abetlen/llama-cpp-python#1367: two requests at once end the process, here one that unloads the model. The answer
    ends with a sentence, and closing waits for the step that runs."""
    code = START + (
        "import threading, time\nfor _ in range(5):\n    llm, errors = make(), []\n"
        "    def work():\n        try:\n            while True: text_of(llm, 'a' * 300, 400)\n"
        "        except FasaError as e: errors.append(str(e))\n"
        "    t = threading.Thread(target=work)\n    t.start()\n    time.sleep(0.05)\n    llm.close()\n    t.join()\n"
        "    print(errors == ['this model is closed'])"
    )
    run = python(code, profiled)
    assert run.stdout.split() == ["True"] * 5, run.stderr[-500:]


def test_streams_of_an_asyncio_app(profiled):
    """abetlen/llama-cpp-python#1529: two streams of a FastAPI app at once end the process. Locked, each is right,
    though every piece may come from another thread; not locked, the older one ends with a sentence."""
    code = START + (
        "import asyncio\nllm, prompts = make(), ['a' * 150, 'b' * 150]\n"
        "want = [text_of(make(), p, 12) for p in prompts]\n"
        "async def pieces(prompt):\n"
        "    chunks, out = llm.create_completion(prompt, max_tokens=12, temperature=0, stream=True), []\n"
        "    while chunk := await asyncio.to_thread(next, chunks, None): out.append(chunk['choices'][0]['text'])\n"
        "    return ''.join(out)\n"
        "async def locked(prompt, lock):\n    async with lock: return await pieces(prompt)\n"
        "async def main():\n    lock = asyncio.Lock()\n"
        "    print(await asyncio.gather(*(locked(p, lock) for p in prompts)) == want)\n"
        "    found = await asyncio.gather(*map(pieces, prompts), return_exceptions=True)\n"
        "    print(all(x == w or 'cannot go on' in str(x) for x, w in zip(found, want)))\n"
        "    print(text_of(llm, prompts[0], 12) == want[0])\n"
        "asyncio.run(main())"
    )
    run = python(code, profiled)
    assert run.stdout.split() == ["True"] * 3, run.stderr[-500:]


@pytest.mark.parametrize("n_threads", [1, 2])
def test_workers_that_are_forked(profiled, n_threads):
    """run-llama/llama_index#10104: a pool of forked workers hangs. A model that was loaded before the fork says so in
    the child, where its threads are missing; with one thread it works there."""
    code = START + (
        "import multiprocessing as mp\n"
        "fork, n = mp.get_context('fork'), int(sys.argv[2])\n"
        "queue, llm = fork.Queue(), make(n_threads=n, n_threads_batch=n)\n"
        "want = text_of(llm, 'a' * 200)\n"
        "def work():\n    try: queue.put(text_of(llm, 'a' * 200) == want)\n"
        "    except FasaError as e: queue.put(str(e)[:49])\n"
        "p = fork.Process(target=work)\np.start()\nprint(queue.get(timeout=30))\np.join()\n"
        "print(p.exitcode, text_of(llm, 'a' * 200) == want)"
    )
    run = python(code, profiled, n_threads)
    found = "True" if n_threads == 1 else "the model was loaded before this process was fork"
    assert run.stdout.splitlines() == [found, "0 True"], run.stderr[-500:]


def test_more_threads_than_cores(make, profiled):
    """abetlen/llama-cpp-python#110: it locks up with n_threads above the number of cores. It is as quick as may be, and
    the text is the same."""
    begin = time.monotonic()
    llm = make(profiled, n_threads=16, n_threads_batch=16)
    assert text_of(llm, PROMPT, 20) == text_of(make(profiled), PROMPT, 20) and sparse_steps(llm) > 10
    assert time.monotonic() - begin < 30


def test_a_context_that_cannot_be_made(profiled):
    """abetlen/llama-cpp-python#2004: "Failed to create llama_context", and no reason. The reason is on stderr also with
    verbose=False, and in a session's sentence."""
    err = python(START + "make(type_k=8)", profiled).stderr
    why = r"K cache type q8_0 with block size 32 does not divide n_embd_head_k=16"
    assert why in err and "Failed to create llama_context" in err
    with pytest.raises(FasaError, match=rf"cannot make a context of 256 tokens: .*{why}"):
        Session(profiled, n_ctx=256, type_k="q8_0")


def test_a_batch_of_no_tokens(make, profiled):
    """ggml-org/llama.cpp#28525: --batch-size 0 ends the process in an assertion. It is refused with a sentence in the
    drop-in, a session and the command."""
    from fasa_gguf.cli import main as cli

    for use in (lambda: make(profiled, n_batch=0), lambda: Session(profiled, n_batch=0)):
        with pytest.raises(FasaError, match="n_batch: expected a whole number from 1 to 2147483647, found 0"):
            use()
    with pytest.raises(SystemExit):
        cli.main(["run", profiled, "-p", "a", "-b", "0"])
    with pytest.raises(ValueError, match="Failed to create llama_context"):
        make(profiled, n_batch=0, fasa="off")
