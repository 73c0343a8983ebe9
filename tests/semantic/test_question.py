"""What may be compared by meaning: C100, C101, C102 and C104, the scope as a property, normal text."""

from __future__ import annotations

import base64
import copy
import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_middleware.caching import cache_key
from llm_middleware.caching.plan import Asked, read_request
from llm_middleware.caching.settings import CacheSettings
from llm_middleware.semantic.normal import content_words, normal_key, normalised
from llm_middleware.semantic.question import Question, Reason, question_of

ASK = "What is the capital of France?"
PNG = {
    "type": "image_url",
    "image_url": {"url": "data:image/png;base64," + base64.b64encode(b"one").decode()},
}
OTHER_PNG = {"type": "image_url", "image_url": {"url": "data:image/png;base64,b3RoZXI="}}


def form(kind: str, fields: dict, **changes: object) -> object:
    """The significant fields, as the cache reads them from a request's body."""
    request = read_request(CacheSettings(**changes), Asked(kind, json.dumps(fields).encode()))
    assert request.problem is None
    return request.form


def chat(*turns: object, **fields: object) -> dict:
    """A chat of turns: a text is the user's, a dict a message."""
    messages = [turn if isinstance(turn, dict) else {"role": "user", "content": turn} for turn in turns]
    return {"model": "m", "messages": messages, **fields}


def asked(kind: str, fields: dict, **options: object) -> Question:
    found = question_of(kind, form(kind, fields), **options)
    assert isinstance(found, Question), found
    return found


def refused(kind: str, fields: dict, **options: object) -> Reason:
    found = question_of(kind, form(kind, fields), **options)
    assert isinstance(found, Reason), found
    return found


def scope(kind: str, fields: dict, *, caller: str = "", embedder: str = "e", **options: object) -> str:
    return asked(kind, fields, **options).scope(caller=caller, namespaces=("llm", "", ""), embedder=embedder)


SYSTEM = {"role": "system", "content": "Answer in French."}
CALL = {"id": "c", "type": "function", "function": {"name": "pay", "arguments": '{"amount":10}'}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
PAID = {"role": "tool", "tool_call_id": "c", "content": "done"}


def test_only_the_last_users_text_is_the_question():
    question = asked("chat", chat(SYSTEM, "Hello there", {"role": "assistant", "content": "Hi"}, ASK))
    assert question.text == ASK
    assert question.form["at"] == ["messages", 3, "content"]
    assert question.form["rest"]["messages"][3] == {"role": "user", "content": None}
    assert question.form["rest"]["messages"][:3] == [
        SYSTEM,
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "Hi"},
    ]


def test_a_paraphrase_has_the_same_scope_on_every_endpoint():
    other = "Tell me the capital city of France."
    for kind, make in ENDPOINTS.items():
        assert asked(kind, make(ASK)).text == ASK
        assert scope(kind, make(ASK)) == scope(kind, make(other)), kind
        assert scope(kind, make(ASK, stream=True)) == scope(kind, make(ASK)), kind
        assert scope(kind, make(ASK, temperature=0.2)) != scope(kind, make(ASK)), kind


ENDPOINTS = {
    "chat": lambda text, **fields: chat(text, **fields),
    "text": lambda text, **fields: {"model": "m", "prompt": text, **fields},
    "responses": lambda text, **fields: {"model": "m", "input": text, **fields},
    "messages": lambda text, **fields: {"max_tokens": 9, **chat(text, **fields)},
}


def test_the_same_text_on_two_endpoints_is_two_scopes():
    assert len({scope(kind, {"model": "m", "messages": [{"role": "user", "content": ASK}], "prompt": ASK,
                             "input": ASK}) for kind in ENDPOINTS}) == 4  # fmt: skip


# --- the ten cases in which a cache that embeds all messages answered wrongly or would


def test_c100_another_image_is_never_the_same_question():
    text = {"type": "text", "text": "What can you see in this picture?"}
    for kind in ("chat", "messages"):
        assert refused(kind, chat({"role": "user", "content": [text, PNG]})) is Reason.MEDIA
        assert refused(kind, chat({"role": "user", "content": [text, OTHER_PNG]})) is Reason.MEDIA
    earlier = [{"role": "user", "content": [text, image]} for image in (PNG, OTHER_PNG)]
    said = {"role": "assistant", "content": "A cat"}
    first, second = (chat(turn, said, "What colour does the cat have?") for turn in earlier)
    assert scope("chat", first) != scope("chat", second)


def test_c101_other_tool_arguments_are_another_scope():
    other = copy.deepcopy(CALLED)
    other["tool_calls"][0]["function"]["arguments"] = '{"amount":99999}'
    ask = "How much did we pay?"
    assert scope("chat", chat("Pay now please", CALLED, PAID, ask)) != scope(
        "chat", chat("Pay now please", other, PAID, ask)
    )
    assert refused("chat", chat("Pay now please", CALLED, PAID)) is Reason.TOOL_RESULT


def test_swapped_roles_are_another_scope():
    one, two = "Translate into German every text", "Translate into French every text"
    first = chat({"role": "system", "content": one}, two)
    second = chat({"role": "user", "content": one}, {"role": "system", "content": two})
    third = chat({"role": "system", "content": two}, one)
    assert refused("chat", second) is Reason.NOT_USER
    assert scope("chat", first) != scope("chat", third)


def test_the_question_behind_a_long_system_prompt_is_never_cut():
    long = {"role": "system", "content": "You are careful. " * 2000}
    first, second = (asked("chat", chat(long, text)) for text in (ASK, "How do I reset my password?"))
    assert (first.text, second.text) == (ASK, "How do I reset my password?")
    assert refused("chat", chat(long["content"]), fits=lambda text: len(text) < 1000) is Reason.TOO_LONG


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Is a dose of 10 mg safe?", "Is a dose of 100 mg safe?"),
        ("Convert 5 USD to EUR today", "Convert 5 EUR to USD today"),
        ("Is this plant safe for cats?", "Is this plant not safe for cats?"),
    ],
)
def test_what_only_a_guard_can_tell_apart_is_never_the_same_normalised_text(one: str, other: str):
    assert scope("chat", chat(one)) == scope("chat", chat(other))
    assert normalised(one) != normalised(other)


def test_c102_another_system_prompt_is_another_scope():
    german = {"role": "system", "content": "Answer in German."}
    assert scope("chat", chat(SYSTEM, ASK)) != scope("chat", chat(german, ASK))
    assert scope("chat", chat(SYSTEM, ASK)) != scope("chat", chat(ASK))
    assert scope("messages", {**chat(ASK), "system": "French"}) != scope(
        "messages", {**chat(ASK), "system": "German"}
    )
    assert scope("responses", {"input": ASK, "instructions": "French"}) != scope(
        "responses", {"input": ASK, "instructions": "German"}
    )


def test_the_same_follow_up_in_two_conversations_is_two_scopes():
    follow = "How much does it cost?"
    said = {"role": "assistant", "content": "Sure."}
    assert scope("chat", chat("Tell me of the small one", said, follow)) != scope(
        "chat", chat("Tell me of the large one", said, follow)
    )


def test_texts_to_be_embedded_are_never_compared_by_meaning():
    for text in ("Take 10 mg of it daily", "Take 100 mg of it daily"):
        assert refused("embedding", {"model": "m", "input": text}) is Reason.KIND
    assert question_of("transcription", {"file": {"$sha256": "0"}}) is Reason.KIND


def test_c104_two_callers_share_no_scope():
    assert scope("chat", chat(ASK), caller="a") != scope("chat", chat(ASK), caller="b")
    question = asked("chat", chat(ASK))
    made = {
        question.scope(caller="", namespaces=names, embedder=embedder, secret=secret)
        for names in (("llm", "", ""), ("llm", "x", ""), ("llm", "", "x"))
        for embedder in ("e", "f")
        for secret in (None, b"s")
    }
    assert len(made) == 12


# --- the scope as a property

leaves = st.sampled_from([None, True, 0, 1, "1", "", ASK, "$question", 0.5])
words = st.sampled_from(
    [ASK, "Tell me the capital city of France.", "Where can one buy cheap bread?", "null", "$question"]
)
parts = st.lists(words.map(lambda text: {"type": "text", "text": text}), min_size=1, max_size=3)
contents = words | parts
turns = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]), "content": contents},
        optional={"name": st.sampled_from(["a", "b"]), "at": leaves, "rest": leaves},
    ),
    max_size=2,
)
requests = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["m", "n"]),
        "messages": st.tuples(turns, contents).map(
            lambda made: [*made[0], {"role": "user", "content": made[1]}]
        ),
    },
    optional={
        "temperature": st.sampled_from([0, 1]),
        "tools": st.just([{"type": "function", "function": {"name": "f"}}]),
        "at": leaves,
        "rest": leaves,
        "context": leaves,
    },
)


def everything_else(fields: dict) -> dict:
    """The request without the last user's last text, by another way than the code's."""
    fields = copy.deepcopy(fields)
    turn = fields["messages"][-1]
    if isinstance(turn["content"], str):
        turn["content"] = ("gap",)
    else:
        turn["content"][-1]["text"] = ("gap",)
    return {name: value for name, value in fields.items() if value is not None}


def changed(data: st.DataObject, value: object) -> object:
    """``value`` with one leaf or one member of it changed."""
    if isinstance(value, dict) and value:
        name = data.draw(st.sampled_from(sorted(value)))
        if data.draw(st.booleans()) and name not in ("messages", "role", "content", "type", "text"):
            return {each: item for each, item in value.items() if each != name}
        return {**value, name: changed(data, value[name])}
    if isinstance(value, list) and value:
        index = data.draw(st.integers(0, len(value) - 1))
        return [*value[:index], changed(data, value[index]), *value[index + 1 :]]
    return data.draw(words | leaves)


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_two_requests_share_a_scope_exactly_if_they_differ_in_nothing_but_the_last_users_text(data):
    first = data.draw(requests)
    second = changed(data, first) if data.draw(st.booleans()) else data.draw(requests)
    found = [question_of("chat", form("chat", fields)) for fields in (first, second)]
    if not all(isinstance(question, Question) for question in found):
        return
    scopes = [question.scope(caller="", namespaces=(), embedder="e") for question in found]
    same = cache_key.canonical(cache_key.jsonable(everything_else(first))) == cache_key.canonical(
        cache_key.jsonable(everything_else(second))
    )
    assert (scopes[0] == scopes[1]) == same


def test_a_request_cannot_say_what_stands_for_the_gap():
    """A request whose own fields look like the form with a gap is another scope than the one with it."""
    gap = asked("chat", chat(ASK))
    imitation = {**gap.form, "messages": [{"role": "user", "content": ASK}]}
    assert asked("chat", imitation).scope(caller="", namespaces=(), embedder="e") != gap.scope(
        caller="", namespaces=(), embedder="e"
    )
    string = {"role": "user", "content": ASK}
    one_part = {"role": "user", "content": [{"type": "text", "text": ASK}]}
    assert scope("chat", chat(string)) != scope("chat", chat(one_part))


@pytest.mark.parametrize(
    "change",
    [
        {"model": "other"},
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"seed": 1},
        {"max_tokens": 5},
        {"stop": ["x"]},
        {"logprobs": True},
        {"user": "u"},
        {"reasoning_effort": "low"},
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "none"},
        {"modalities": ["text", "audio"]},
        {"anything": "new"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_other_field_is_part_of_the_scope(change: dict):
    assert scope("chat", chat(ASK)) != scope("chat", chat(ASK, **change))


def test_of_several_texts_the_last_is_the_question():
    def turn(*texts: str) -> dict:
        return {"role": "user", "content": [{"type": "text", "text": text} for text in texts]}

    document = "The contract runs for two years."
    assert asked("chat", chat(turn(document, ASK))).text == ASK
    assert scope("chat", chat(turn(document, ASK))) == scope(
        "chat", chat(turn(document, "Which is its end date?"))
    )
    assert scope("chat", chat(turn(document, ASK))) != scope("chat", chat(turn("Another contract.", ASK)))


def test_a_responses_turn_is_read_like_a_message():
    turn = {"role": "user", "content": [{"type": "input_text", "text": ASK}]}
    assert asked("responses", {"model": "m", "input": [turn]}).text == ASK
    assert asked("responses", {"model": "m", "input": [{"type": "message", **turn}]}).text == ASK
    assert scope("responses", {"input": [turn], "previous_response_id": "a"}) != scope(
        "responses", {"input": [turn], "previous_response_id": "b"}
    )


def test_json_is_compared_where_it_is_said_where_the_question_is():
    fields = {"options": {"ask": ASK, "k": 3}, "user": 1}
    assert refused("json", fields) is Reason.KIND
    assert asked("json", fields, field="options.ask").text == ASK
    other = {"options": {"ask": "Name the capital of France", "k": 3}, "user": 1}
    assert scope("json", fields, field="options.ask") == scope("json", other, field="options.ask")
    assert scope("json", fields, field="options.ask") != scope(
        "json", {**other, "user": 2}, field="options.ask"
    )
    for wrong in ("options", "options.k", "none", "options.ask.x"):
        assert refused("json", fields, field=wrong) is Reason.NO_TEXT
    assert question_of("json", [ASK], field="a") is Reason.KIND


OUTPUT = {"type": "function_call_output", "call_id": "c", "output": "5"}
BLOCK = {"type": "tool_result", "tool_use_id": "t", "content": "5"}


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        ("chat", chat(ASK, n=2), Reason.MANY_ANSWERS),
        ("chat", chat(ASK, n=True), Reason.MANY_ANSWERS),
        ("text", {"prompt": ASK, "n": 3}, Reason.MANY_ANSWERS),
        ("text", {"prompt": [ASK, ASK]}, Reason.MANY_ANSWERS),
        ("text", {"prompt": ASK, "echo": True}, Reason.ECHO),
        ("text", {"prompt": [1, 2, 3]}, Reason.NO_TEXT),
        ("text", {"prompt": [[1, 2]]}, Reason.NO_TEXT),
        ("text", {}, Reason.NO_TEXT),
        ("text", {"prompt": 7}, Reason.MALFORMED),
        ("chat", chat(ASK, {"role": "assistant", "content": "It is"}), Reason.NOT_USER),
        ("chat", chat(ASK, {"role": "developer", "content": ASK}), Reason.NOT_USER),
        ("chat", chat(ASK, {"role": "function", "name": "f", "content": "5"}), Reason.TOOL_RESULT),
        ("messages", chat(ASK, {"role": "assistant", "content": "It is"}), Reason.NOT_USER),
        (
            "messages",
            chat({"role": "user", "content": [BLOCK, {"type": "text", "text": ASK}]}),
            Reason.TOOL_RESULT,
        ),
        ("messages", chat({"role": "user", "content": [{"type": "document"}]}), Reason.MEDIA),
        ("responses", {"input": [{"role": "user", "content": ASK}, OUTPUT]}, Reason.TOOL_RESULT),
        ("responses", {"input": [{"type": "item_reference", "id": "x"}]}, Reason.NOT_USER),
        ("responses", {"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, Reason.MEDIA),
        ("chat", chat({"role": "user", "content": [{"type": "input_audio"}]}), Reason.MEDIA),
        ("chat", chat({"role": "user", "content": []}), Reason.NO_TEXT),
        ("chat", chat({"role": "user"}), Reason.NO_TEXT),
        ("chat", chat("   \n"), Reason.NO_TEXT),
        ("chat", {"messages": []}, Reason.MALFORMED),
        ("chat", {"messages": "text"}, Reason.MALFORMED),
        ("chat", {"messages": ["text"]}, Reason.MALFORMED),
        ("chat", chat({"role": "user", "content": 5}), Reason.MALFORMED),
        ("chat", chat({"role": "user", "content": ["text"]}), Reason.MALFORMED),
        ("chat", chat({"role": "user", "content": [{"type": "text", "text": 5}]}), Reason.MALFORMED),
        ("chat", chat("broken \ud800 words in this text"), Reason.MALFORMED),
        ("chat", chat("Yes, please do that"), Reason.FEW_WORDS),
        ("chat", chat("Can you explain that again?"), Reason.FEW_WORDS),
        ("embedding", {"input": ASK}, Reason.KIND),
    ],
)  # fmt: skip
def test_what_is_answered_from_an_exact_repeat_only(kind: str, fields: dict, reason: Reason):
    assert refused(kind, fields) is reason


def test_n_of_one_is_one_answer():
    assert scope("chat", chat(ASK, n=1)) == scope("chat", chat(ASK))
    assert question_of("chat", {**chat(ASK), "n": 1}).text == ASK


def test_in_questions_context_the_wording_of_earlier_answers_does_not_count():
    def talk(said: object, first: str = "Tell me of Paris") -> dict:
        return chat(SYSTEM, first, {"role": "assistant", **said}, "How many people live there?")

    one, two = talk({"content": "A city."}), talk({"content": "A large city.", "refusal": None})
    listed = talk({"content": [{"type": "text", "text": "A town."}]})
    assert scope("chat", one) != scope("chat", two)
    assert len({scope("chat", each, context="questions") for each in (one, two, listed)}) == 1
    assert scope("chat", one, context="questions") != scope("chat", one)
    other = talk({"content": "A city."}, "Tell me of Rome")
    assert scope("chat", one, context="questions") != scope("chat", other, context="questions")
    german = {**one, "messages": [{"role": "system", "content": "German"}, *one["messages"][1:]]}
    assert scope("chat", one, context="questions") != scope("chat", german, context="questions")
    # What it did is compared: a call of a tool, and with whatever is not known to be words.
    did = [talk({"content": None, "tool_calls": [{**CALL, "id": name}]}) for name in "ab"]
    assert len({scope("chat", each, context="questions") for each in did}) == 2
    used = [talk({"content": [{"type": "tool_use", "name": name}]}) for name in "ab"]
    assert len({scope("messages", each, context="questions") for each in used}) == 2
    assert len({scope("text", {"prompt": ASK}, context=context) for context in ("all", "questions")}) == 2


def test_models_of_a_caching_group_share_their_scopes():
    forms = [form("chat", {**chat(ASK), "model": name}, caching_groups=[["a", "b"]]) for name in "abc"]
    scopes = [question_of("chat", each).scope(caller="", namespaces=(), embedder="e") for each in forms]
    assert scopes[0] == scopes[1] != scopes[2]


# --- normalised text


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is the capital of France?", "what is the capital of  France"),
        ("How do I login?", "\tHow do i login ?\n"),
        ("How do I login?", "How do I login!"),
        ("How do I login?!", "How do I login..."),
        ("I can\u2019t login", "I can't login"),
        ("Say “yes” now", 'Say "yes" now'),
        ("\uff37\uff48\uff41\uff54 is this\uff1f", "what is this?"),
        ("café", unicodedata.normalize("NFD", "café")),
        ("one\u00a0two", "one two"),
        ("one \r\n\r\ntwo", "one\ntwo"),
        ("法国的首都是哪里\uff1f", "法国的首都是哪里"),
    ],
)
def test_texts_that_normalise_alike(one: str, other: str):
    assert normalised(one) == normalised(other)
    assert normal_key("a" * 64, one) == normal_key("a" * 64, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is 10²?", "What is 102?"),
        ("What is ½ of it?", "What is 1\u20442 of it?"),
        ("What is 10① about", "What is 101 about"),
        ("What is 5!", "What is 5"),
        ("What is n!?", "What is n?"),
        ("Is it in the US", "Is it in the us"),
        ("What does R mean", "What does r mean"),
        ("Explain `Foo`", "Explain `foo`"),
        ('Find "A  B" in it', 'Find "A B" in it'),
        ("Is Ab3x mine", "Is ab3x mine"),
        ("if x:\n  y", "if x: y"),
        ("What is C++", "What is C"),
        ("Explain the operator ??", "Explain the operator"),
        ("Explain it, not that", "Explain it not that"),
    ],
)
def test_texts_that_do_not_normalise_alike(one: str, other: str):
    assert normalised(one) != normalised(other)
    assert normal_key("a" * 64, one) != normal_key("a" * 64, other)


def test_a_very_long_text_is_only_like_itself():
    assert normalised("Word " * 800) == normalised("word " * 800)
    assert normalised("Word " * 801) == "Word " * 801


def test_a_normalised_text_is_keyed_within_its_scope():
    keys = {
        normal_key("a" * 64, ASK),
        normal_key("b" * 64, ASK),
        normal_key("a" * 64, ASK, b"secret"),
        normal_key("a" * 64, ASK + " And why"),
    }
    assert len(keys) == 4
    assert all(len(key) == 64 and set(key) <= set("0123456789abcdef") for key in keys)


@given(st.text(max_size=60) | st.text("aB1 .?!\n\t`\"'\u2019²İΣß", max_size=30))
@settings(max_examples=500, deadline=None)
def test_normalising_again_changes_nothing(text: str):
    assert normalised(normalised(text)) == normalised(text)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("What is the capital of France?", 3),
        ("How do I reset my password?", 3),
        ("It is not the one", 2),
        ("can't login 42", 3),
        ("Thanks, you are", 0),
        ("法国的首都是哪里", 4),
        ("東京の天気は?", 3),
        ("ราคาเท่าไหร่", 3),
        ("Wie spät ist es", 4),
        ("😀 !!", 0),
        ("", 0),
    ],
)
def test_content_words(text: str, count: int):
    assert content_words(text) == count
