"""Labels (C117): what an entry is found by, in front of its bytes, whatever those are and whatever happens to
them; and which criteria there are."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llm_middleware.caching.invalidation import Wanted, wanted
from llm_middleware.caching.labels import (
    HEAD_BYTES,
    MOST,
    carries,
    count,
    label,
    labelled,
    union,
    unlabelled,
)
from llm_middleware.errors import ConfigError, CorruptEntryError

FIELDS = ["tag", "model", "scope", "namespace", "kind"]

one = st.builds(label, st.sampled_from(FIELDS), st.text())
several = st.lists(one, max_size=MOST)


def refused(value: bytes) -> None:
    with pytest.raises(CorruptEntryError, match="no labels in front"):
        unlabelled(value)


@given(st.sampled_from(FIELDS), st.text())
@example("tag", "\ud800")
def test_c117_a_label_is_eight_bytes_and_always_the_same(field, value):
    assert label(field, value) == label(field, value)
    assert len(label(field, value)) == 8


def test_c117_labels_stay_what_they_are_since_stores_outlive_versions():
    assert label("tag", "a").hex() == "f0f48f59e89d26d7"
    assert labelled(b"", b"x") == b"LBL1\x00\x00\x00\x00\x00x"
    assert labelled(b"12345678", b"x") == b"LBL1\x01\xaf\xda\xe0\x9a12345678x"


def test_c117_one_value_in_two_fields_is_two_labels():
    assert len({label(field, "gpt") for field in FIELDS}) == len(FIELDS)


@given(several, st.binary())
def test_c117_labels_come_back_and_so_does_the_rest(labels, data):
    joined = b"".join(labels)
    assert unlabelled(labelled(joined, data)) == (joined, data)
    assert count(joined) == len(labels)


@given(several, st.binary(max_size=2 * HEAD_BYTES))
def test_c117_the_first_bytes_are_enough_to_read_the_labels(labels, data):
    joined = b"".join(labels)
    value = labelled(joined, data)
    assert unlabelled(value[:HEAD_BYTES]) == (joined, value[9 + len(joined) : HEAD_BYTES])


@given(several, st.binary(), st.data())
def test_c117_a_damaged_byte_of_the_labels_is_corruption(labels, data, draw):
    joined = b"".join(labels)
    value = bytearray(labelled(joined, data))
    at = draw.draw(st.integers(0, 9 + len(joined) - 1))
    value[at] ^= draw.draw(st.integers(1, 255))
    try:
        found, _ = unlabelled(bytes(value))
    except CorruptEntryError:
        return
    # Another number of labels, whose sum is the same by chance.
    assert (at, found != joined) == (4, True)


@given(several, st.binary(), st.data())
def test_c117_what_is_cut_short_is_corruption(labels, data, draw):
    joined = b"".join(labels)
    refused(labelled(joined, data)[: draw.draw(st.integers(0, 9 + len(joined) - 1))])


@given(st.binary().filter(lambda data: not data.startswith(b"LBL1")))
def test_c117_other_bytes_are_corruption(data):
    refused(data)


@given(several, several)
def test_c117_the_union_has_every_label_once_in_order(mine, others):
    together = union(b"".join(mine), b"".join(others))
    assert together == b"".join(dict.fromkeys([*mine, *others]))


@given(several, several, several)
def test_c117_carries_is_every_one_and_some(have, every, some):
    joined = b"".join(have)
    expected = set(every) <= set(have) and (not some or bool(set(some) & set(have)))
    assert carries(joined, every, some) is expected
    assert carries(joined, have) is True
    assert carries(b"".join([*have, *every, *some]), every, some) is True


KEY = "llm:" + "ab" + 62 * "0"


def test_c117_a_prefix_is_that_of_the_key_and_not_of_the_namespace():
    assert Wanted(prefix="ab").matches(KEY, b"") is True
    assert Wanted(prefix="llm").matches(KEY, b"") is False
    assert Wanted(prefix="b").matches(KEY, b"") is False


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({}, None),
        ({"tags": []}, None),
        ({"tags": "blue"}, "tags"),
        ({"tags": [1]}, "tags"),
        ({"tags": [b"blue"]}, "tags"),
        ({"tags": None}, "tags"),
        ({"tags": 5}, "tags"),
        ({"model": 1}, "model"),
        ({"scope": b"x"}, "scope"),
        ({"namespace": ["x"]}, "namespace"),
        ({"kind": "chatt"}, "kind"),
        ({"kind": 3}, "kind"),
        ({"prefix": 3}, "prefix"),
        ({"prefix": None, "model": "m"}, "prefix"),
    ],
)
def test_c117_wrong_criteria_name_the_field(changes, param):
    given = {"tags": (), "model": None, "scope": None, "namespace": None, "kind": None, "prefix": ""}
    with pytest.raises(ConfigError) as caught:
        wanted(**{**given, **changes})
    assert caught.value.param == param


def test_c117_tags_may_be_given_by_an_iterator():
    want = wanted(iter(["a", "b"]), "m", None, None, None, "")
    assert want == Wanted((label("model", "m"),), (label("tag", "a"), label("tag", "b")))


def test_c117_an_empty_scope_is_a_criterion():
    assert wanted((), None, "", None, None, "") == Wanted((label("scope", ""),))


def test_c117_kinds_go_by_litellms_names_too():
    assert wanted((), None, None, None, "acompletion", "") == Wanted((label("kind", "chat"),))
