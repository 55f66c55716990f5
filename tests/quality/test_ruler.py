"""RULER's tasks: what is planted is there, once, where it must be; lengths; the metric; records that are read."""

import json
import re
from collections import Counter

import pytest

from fasa_gguf import FasaError
from fasa_gguf.calibrate.gguf import default_corpus
from fasa_gguf.quality import ruler
from fasa_gguf.quality.ruler import (
    TASKS,
    make_record,
    string_match_all,
    string_match_part,
)

WORDS = ruler.essay_words(default_corpus()[1][:60000])
NIAH = [name for name, t in TASKS.items() if t.kind == "niah"]


def count(text, prefix):
    """A tokenizer for tests: words and marks."""
    return len(re.findall(r"\w+|[^\w\s]", text + prefix))


def needles(record):
    """(key, value) of every needle, in the text's order."""
    return re.findall(r"One of the special magic (?:numbers|uuids) for (\S+) is: (\S+?)\.(?= |\n|$)", record["input"])


# ---- every task ----


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [1200, 5000])
def test_lengths_are_fitted_from_below(name, length):
    r = make_record(name, 0, length, count, words=WORDS)
    step = {"noise": 30, "needle": 25, "essay": 20}.get(
        TASKS[name].haystack, 80
    )  # tokens that one more of the haystack takes
    assert (
        length - step <= r["length"] <= length
        and r["length"] == count(r["input"], r["answer_prefix"]) + TASKS[name].n_predict
    )
    assert make_record(name, 0, length, count, words=WORDS) == r  # seeded
    assert (
        make_record(name, 1, length, count, words=WORDS)["outputs"]
        != r["outputs"]
        != make_record(name, 0, length, count, 7, WORDS)["outputs"]
    )
    assert {"task", "index", "input", "answer_prefix", "outputs", "length"} <= set(r)


def test_a_length_that_is_too_short_and_an_unknown_task():
    for name in TASKS:
        with pytest.raises(
            FasaError,
            match=rf"task {name}.*: the smallest prompt has \d+ tokens and there is room for -?\d+; "
            "use larger --lengths",
        ):
            make_record(name, 0, 140, count)
    with pytest.raises(FasaError, match=r"task 'niah': expected one of niah_single_1, .*, fwe"):
        make_record("niah", 0, 4096, count)
    with pytest.raises(FasaError, match="the haystack's text has 3 words; use one of at least 50"):
        ruler.essay_words("a b c")


# ---- needles ----


@pytest.mark.parametrize("name", NIAH)
def test_every_reference_is_planted_once(name):
    task = TASKS[name]
    for index in range(3):
        r = make_record(name, index, 3000, count, words=WORDS)
        planted = needles(r)
        query = r["input"][r["input"].rindex("\n") :]
        asked = set(re.findall(r"for (.+) mentioned", query)[0].replace(", and ", ", ").split(", "))
        assert len(r["outputs"]) == task.n_query * task.n_value and len(asked) == task.n_query
        assert Counter(v for k, v in planted if k in asked) == Counter(r["outputs"])
        assert all(r["input"].count(v) == 1 for v in r["outputs"]) and not any(
            v in r["answer_prefix"] for v in r["outputs"]
        )
        assert len({v for _, v in planted}) == len(planted)  # no value twice, no other key of the same name
        assert sum(k in asked for k, _ in planted) == task.n_query * task.n_value
        if task.haystack != "needle":
            assert len(planted) == max(task.n_key, task.n_query) * task.n_value
        else:
            assert len(planted) > 50


def test_the_prompt_is_rulers():
    r = make_record("niah_single_1", 0, 1000, count)
    ((key, value),) = needles(r)
    assert r["input"].startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the "
        "number afterwards.\nThe grass is green."
    )
    assert r["input"].endswith(f"\nWhat is the special magic number for {key} mentioned in the provided text?")
    assert r["answer_prefix"] == f" The special magic number for {key} mentioned in the provided text is"
    assert re.fullmatch(r"[1-9]\d{6}", value) and re.fullmatch(r"[a-z]{6}-[a-z]{6}", key)
    r = make_record("niah_multiquery", 0, 1000, count)
    assert (
        r["input"].startswith("Some special magic numbers are hidden")
        and ", and " in r["answer_prefix"]
        and r["answer_prefix"].endswith("text are")
    )
    r = make_record("niah_multikey_3", 0, 2000, count)
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", r["outputs"][0])


def test_depth_is_where_the_needle_lies():
    for haystack in ("niah_single_1", "niah_single_2"):
        for depth in (0.0, 0.25, 0.5, 1.0):
            r = make_record(haystack, 0, 4000, count, words=WORDS, depth=depth)
            context = r["input"][r["input"].index("\n") + 1 : r["input"].rindex("\n")]
            at = context.index("One of the special magic") / (
                len(context) - len("One of the special magic numbers for abcdef-abcdef is: 1234567.")
            )
            assert abs(at - depth) < 0.07 and r["depth"] == depth
            if depth in (0, 1):
                assert at == pytest.approx(depth, abs=1e-9)


def test_the_haystack_is_the_text_or_noise():
    r = make_record("niah_single_2", 0, 2000, count, words=WORDS, depth=1.0)
    context = r["input"][r["input"].index("\n") + 1 : r["input"].rindex(" One of the special")]
    assert context in " ".join(WORDS + WORDS) and r["haystack"] == "essay"
    short = ruler.essay_words("One two three. " * 20)  # it begins anew where it ends
    assert make_record("niah_single_2", 0, 2000, count, words=short)["input"].count("two") > 300
    r = make_record("niah_single_2", 0, 2000, count)
    assert r["haystack"] == "noise" and r["input"].count("The grass is green.") > 50


# ---- variables and words ----


def test_variables_form_one_chain():
    r = make_record("vt", 0, 3000, count)
    shot, text = r["input"].split("\n\n\n\n")
    value = re.search(r"assigned the value (\d+) in the text above\.$", text)[1]
    chain = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", text)
    assert [v for v, _ in chain] == r["outputs"] and len(
        set(r["outputs"])
    ) == 5  # in order, so that one reading suffices
    assert [x for _, x in chain] == [value, *r["outputs"][:4]]
    assert r["answer_prefix"] == (
        f" Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assgined the "
        "value "
        f"{value}, they are: "
    )
    answered = shot[shot.rindex("they are: ") :].split()[2:]
    assert (
        [v for v, _ in re.findall(r"VAR ([A-Z]{3}) = (?:VAR )?(\w+)", shot)] == answered
        and len(answered) == 5
        and count(shot, "") <= 500
    )


def test_other_numbers_of_needles():
    numbers = ruler.Numbers(num_needle_k=2, num_needle_v=3, num_needle_q=2)
    for name, planted, asked, answers in (
        ("niah_multikey_1", 2, 1, 1),
        ("niah_multivalue", 3, 1, 3),
        ("niah_multiquery", 2, 2, 2),
        ("niah_single_2", 1, 1, 1),  # a task with one of everything keeps it
    ):
        r = make_record(name, 0, 3000, count, words=WORDS, numbers=numbers)
        assert len(needles(r)) == planted and len(r["outputs"]) == answers
        assert len(re.findall(r"[a-z]{6}-[a-z]{6}", r["answer_prefix"])) == asked
        assert make_record(name, 0, 3000, count, words=WORDS, numbers=ruler.Numbers()) == make_record(
            name, 0, 3000, count, words=WORDS
        )
    assert numbers.changed("niah_multivalue") == {"num_needle_v": 3} and numbers.changed("niah_single_2") == {}
    assert numbers.changed("qa_1") == {} and numbers.given() == {
        "num_needle_k": 2,
        "num_needle_v": 3,
        "num_needle_q": 2,
    }


def test_other_numbers_of_chains():
    numbers = ruler.Numbers(num_chains=3, num_hops=2)
    r = make_record("vt", 0, 3000, count, numbers=numbers)
    _, text = r["input"].split("\n\n\n\n")
    lines = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", text)
    value = re.search(r"assigned the value (\d+) in the text above\.$", text)[1]
    chains: dict[str, list[str]] = {}
    for name, source in lines:  # in order, so that one reading suffices
        if source.isdigit():
            chains[source] = [name]
        else:
            next(c for c in chains.values() if c[-1] == source).append(name)
    assert [len(c) for c in chains.values()] == [3, 3, 3] and chains[value] == r["outputs"]
    assert "text above, 3 variables are assgined" in r["answer_prefix"]
    assert numbers.changed("vt") == {"num_chains": 3, "num_hops": 2} and numbers.changed("cwe") == {}


@pytest.mark.parametrize("length, common, other, form", [(2000, 6, 1, "6/1"), (5000, 30, 3, "30/3")])
def test_common_words(length, common, other, form):
    r = make_record("cwe", 0, length, count)
    lists = re.findall(r"appear most often\.\n(.*)\nQuestion", r["input"])
    words = [re.findall(r"\d+\. (\w+)", text) for text in lists]
    assert len(words) == 2 and r["form"] == form
    counts = Counter(words[1])
    assert sorted(w for w, n in counts.items() if n == common) == sorted(r["outputs"]) and len(r["outputs"]) == 10
    assert set(counts.values()) == {common, other} and not set(words[0]) & set(words[1])
    assert re.findall(r"^(\d+)\.", lists[1])[0] == "1" and f" {len(words[1])}. " in lists[1]
    shown = re.search(r"in the list are: (1\. .*)\n", r["input"])[1]
    assert set(re.findall(r"[a-z]{6}", shown)) == {
        w for w, n in Counter(words[0]).items() if n == max(Counter(words[0]).values())
    }


def test_common_words_fall_back_to_the_short_form():
    assert make_record("cwe", 0, 4096, lambda *x: 3 * count(*x))["form"] == "6/1"


def test_frequent_words():
    r = make_record("fwe", 0, 4000, count)
    listed = r["input"].split("coded words. ")[1].split("\nQuestion")[0].split()
    (dots, n0), *ranked = Counter(listed).most_common(5)
    assert dots == "..." and [w for w, _ in ranked[:3]] == r["outputs"] and ranked[2][1] > ranked[3][1]
    assert abs(n0 / ranked[0][1] - 4) < 0.05 and abs(n0 / ranked[1][1] - 9) < 0.2  # zeta with exponent 2
    assert all(len(w) == 6 for w in set(listed) - {"..."})


# ---- metric ----


def test_string_match():
    assert string_match_all("They are 12 and ABC.", ["12", "abc", "x", "q"]) == 0.5
    assert string_match_all("1234567", ["1234567"]) == 1 and string_match_all("123456 7", ["1234567"]) == 0
    assert string_match_part("It is Paris", ["London", "paris"]) == 1 and string_match_part("", ["London"]) == 0
    assert ruler.score("qa_1", "b", ["a", "b"]) == 1 and ruler.score("vt", "b", ["a", "b"]) == 0.5


# ---- records ----


def test_records_are_written_and_read(tmp_path):
    records = [make_record("fwe", i, 1500, count) for i in range(2)]
    ruler.write_records(tmp_path / "fwe.jsonl", records)
    assert (
        ruler.read_records(tmp_path / "fwe.jsonl") == records
        and len((tmp_path / "fwe.jsonl").read_text().splitlines()) == 2
    )
    (tmp_path / "validation.jsonl").write_text(
        json.dumps({"index": 3, "input": "x", "outputs": ["y"], "length": 9}) + "\n"
    )
    assert ruler.read_records(tmp_path / "validation.jsonl") == [
        {"task": "validation", "index": 3, "answer_prefix": "", "input": "x", "outputs": ["y"], "length": 9}
    ]
    for bad in ("[1]", "{", '{"input": "x"}', '{"input": "x", "outputs": []}', '{"input": "x", "outputs": [1]}'):
        (tmp_path / "bad.jsonl").write_text('{"input": "x", "outputs": ["y"]}\n' + bad)
        with pytest.raises(FasaError, match=r"bad\.jsonl: line 2: expected a JSON object with input"):
            ruler.read_records(tmp_path / "bad.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(FasaError, match="no records in it"):
        ruler.read_records(tmp_path / "empty.jsonl")
    with pytest.raises(FasaError, match=r"none\.jsonl: cannot be read: No such file"):
        ruler.read_records(tmp_path / "none.jsonl")
