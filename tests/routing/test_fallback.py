"""Which groups are asked after one that failed."""

from __future__ import annotations

import pytest

from llm_middleware.errors import (
    BadRequestError,
    ContentPolicyError,
    ContextWindowExceededError,
    ProviderError,
    UpstreamServerError,
)
from llm_middleware.routing.fallback import Fallbacks, own_fallbacks

FAILED, TOO_LONG, REFUSED = UpstreamServerError(""), ContextWindowExceededError(""), ContentPolicyError("")


def fallbacks(general=None, long=None, refused=None, default=None) -> Fallbacks:
    return Fallbacks.of(general, long, refused, default)


def test_an_empty_list_says_none() -> None:
    made = fallbacks([{"m": []}, {"*": ["any"]}], default=["d"])
    assert made.after(FAILED, "m") == ()
    assert made.after(FAILED, "other") == ("any",)
    assert fallbacks([{"m": []}], default=["d"]).after(FAILED, "m") == ()
    assert fallbacks([{"m": []}], default=["d"]).after(FAILED, "other") == ("d",)
    assert fallbacks([{"*": []}], default=["d"]).after(FAILED, "m") == ()
    assert fallbacks([{"m": ["b"]}, {"*": []}]).after(FAILED, "m") == ("b",)


@pytest.mark.parametrize(("error", "place"), [(TOO_LONG, 0), (REFUSED, 1)])
def test_so_does_one_for_an_error_of_its_own(error: ProviderError, place: int) -> None:
    tables: list[object] = [None, None]
    general = [{"m": ["b"]}, {"other": ["c"]}]
    assert fallbacks(general, *tables).after(error, "m") == ("b",)
    tables[place] = [{"m": []}]
    assert fallbacks(general, *tables).after(error, "m") == ()
    assert fallbacks(general, *tables).after(error, "other") == ("c",)
    assert fallbacks(general, *tables).after(FAILED, "m") == ("b",)


def test_those_of_a_request_come_first_and_an_empty_list_of_it_says_none() -> None:
    made = fallbacks([{"m": ["b"]}], [{"m": ["large"]}], default=["d"])
    for said, after in (
        (None, ("b",)),
        (["x"], ("x",)),
        ([], ()),
        ([{"m": ["x"]}], ("x",)),
        ([{"m": []}], ()),
        ([{"*": ["x"]}], ("x",)),
        ([{"other": ["x"]}], ("b",)),
    ):
        assert made.after(FAILED, "m", own_fallbacks(said, "m")) == after
    assert made.after(TOO_LONG, "m", own_fallbacks([], "m")) == ()
    assert made.after(TOO_LONG, "m", own_fallbacks(["x"], "m")) == ("large",)


def test_r44_a_callers_mistake_goes_nowhere_else() -> None:
    assert fallbacks([{"m": ["b"]}], default=["d"]).after(BadRequestError(""), "m") == ()


def test_r45_a_prompt_that_is_too_long_goes_to_the_general_ones_where_none_are_named() -> None:
    made = fallbacks([{"m": ["b"]}], [{"other": ["large"]}])
    assert made.after(TOO_LONG, "m") == ("b",)
    assert made.after(TOO_LONG, "other") == ("large",)
