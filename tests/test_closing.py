"""A model is closed while other threads use it: they get a sentence, and nobody reads what was freed.

Each test has a process of its own, since what it guards against ends the process.
"""

import pytest
from reported import python

from fasa_gguf.gguf.file import GGUFFile
from fasa_gguf.gguf.shape import model_shape
from fasa_gguf.profile import embed
from fasa_gguf.speed.random_model import synthetic_profile

START = (
    "import sys, threading, time; sys.path.insert(0, 'tests/helpers')\nfrom reported import ON, text_of\n"
    "from fasa_gguf import FasaError, Llama\n"
    "def make(**kw): return Llama(sys.argv[1], verbose=False, **{'n_ctx': 512, 'n_threads': 1, 'fasa': ON, **kw})\n"
)
# every public method of a context, with arguments that it takes; new ones must be added here
CALLS = """
from fasa_gguf.profile.profile import Profile
calls = {
    'borrow_list': (1, 0), 'counters': (), 'fill_random': (8,), 'host_rates': (8, 8, 8), 'invalidate': (),
    'layer_ahead_codes': (), 'layer_params': (0,), 'layer_reason_codes': (), 'layer_reasons': (), 'layer_shape': (0,),
    'model_info': (), 'observe': (None,), 'params': (), 'read_rate': (8,), 'reset_counters': (), 'set_params': (ON,),
    'set_profile': (Profile.load(sys.argv[1]),), 'gpu_limit': (), 'measured': (ON,), 'without_attention': (),
    'step_kind': ('auto',), 'step_reason': (), 'step_reason_code': (),
}
def call(context, name):
    out = getattr(context, name)(*calls[name])
    if name in ('step_kind', 'without_attention'):
        with out: pass
def refused(context):
    for name in calls:
        try: call(context, name)
        except FasaError as e: yield str(e)
        else: yield f'{name} did not raise'
public = {n for n in dir(type(context)) if n[0] != '_' and callable(getattr(context, n))}
print(public - {'close', 'check_process', 'raise_observed'} == set(calls))
"""


@pytest.fixture(scope="module")
def profiled(library, tiny, tmp_path_factory):
    profile = synthetic_profile(*model_shape(GGUFFile(tiny)))
    return str(embed.rewrite(tiny, profile, tmp_path_factory.mktemp("closing") / "tiny.gguf"))


def test_a_context_outlives_its_model(profiled):
    code = START + (
        f"llm = make()\ncontext = llm._live()\n{CALLS}\nllm.close()\nprint(set(refused(context)))\n"
        "from fasa_gguf.session import Session\ns = Session(sys.argv[1], n_ctx=256)\ncontext = s.fasa\ns.reopen()\n"
        "print(set(refused(context)) == {sys.argv[1] + ': this context is closed'}, s.fasa.counters()['steps_sparse'])"
    )
    run = python(code, profiled)
    assert run.stdout.splitlines() == ["True", "{'this model is closed'}", "True 0"], run.stdout + run.stderr[-1500:]


@pytest.mark.parametrize(
    "use",
    [
        "llm.fasa_stats()",
        "llm.fasa",
        "llm.set_fasa(ON)",
        "llm.tokenize(b'a b c ' * 200)",
        "llm.detokenize([70] * 900)",
        "llm.save_state()",
        "llm.token_bos()",
        "text_of(llm, 'a' * 50, 3)",
    ],
)
def test_another_thread_uses_a_model_that_is_closed(profiled, use):
    code = START + (
        "for i in range(5):\n    llm, errors, used = make(), [], threading.Event()\n"
        "    def work():\n        try:\n            while True:\n"
        f"                {use}\n                used.set()\n"
        "        except FasaError as e: errors.append(str(e))\n"
        "    threads = [threading.Thread(target=work) for _ in range(2)]\n    for t in threads: t.start()\n"
        "    used.wait()\n    time.sleep(i / 1000)\n    llm.close()\n    for t in threads: t.join()\n"
        "    assert errors == ['this model is closed'] * 2, errors\nprint('good')"
    )
    run = python(code, profiled)
    assert run.stdout == "good\n", run.stdout + run.stderr[-1500:]


@pytest.mark.parametrize("use", ["s.tokenize('a b c ' * 200)", "s.detokenize([70] * 900)", "s.fasa.counters()"])
def test_another_thread_uses_a_session_that_is_closed(profiled, use):
    code = START + (
        "from fasa_gguf.session import Session\n"
        "for i in range(5):\n    s, errors, used = Session(sys.argv[1], n_ctx=256), [], threading.Event()\n"
        "    def work():\n        try:\n            while True:\n"
        f"                {use}\n                used.set()\n"
        "        except FasaError as e: errors.append(str(e))\n"
        "    threads = [threading.Thread(target=work) for _ in range(2)]\n    for t in threads: t.start()\n"
        "    used.wait()\n    time.sleep(i / 1000)\n    s.close()\n    for t in threads: t.join()\n"
        "    assert all(e.endswith(' is closed') for e in errors) and len(errors) == 2, errors\nprint('good')"
    )
    run = python(code, profiled)
    assert run.stdout == "good\n", run.stdout + run.stderr[-1500:]
