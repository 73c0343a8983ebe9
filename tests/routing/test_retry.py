"""What follows a failed attempt, with seeded randomness and a clock that is told."""

from __future__ import annotations

from random import Random

import pytest

from llm_middleware.errors import (
    AuthenticationError,
    BadRequestError,
    ConfigError,
    ContentPolicyError,
    DeadlineError,
    NotFoundError,
    ProviderError,
    RateLimitError,
    UpstreamConnectionError,
    UpstreamServerError,
)
from llm_middleware.providers.failures import retry_after
from llm_middleware.routing.retry import Decision, Retries

EPOCH = 1_445_412_475.0  # Wed, 21 Oct 2015 07:27:55 GMT


def after(
    retries: Retries,
    error: ProviderError,
    *,
    made: int = 0,
    another: bool = False,
    deadline: float | None = None,
    seed: int = 1,
) -> Decision:
    return retries.after(error, made=made, another=another, now=100.0, random=Random(seed), deadline=deadline)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after-ms": "700"}, 0.7),
        ({"retry-after-ms": "700", "retry-after": "9"}, 0.7),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "120"}, 120.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 5.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:00:00 GMT"}, 0.0),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "later"}, None),
        ({"retry-after": ""}, None),
        ({}, None),
    ],
)
def test_r37_retry_after_is_read_to_the_fraction(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers, lambda: EPOCH) == seconds


def test_r36_no_retry_beyond_the_deadline_and_the_word_of_the_provider_is_kept() -> None:
    error = RateLimitError("", retry_after=120.0)
    assert after(Retries(), error, deadline=110.0) == Decision("give up", 0.0, 120.0)
    assert after(Retries(), error, deadline=110.0, another=True) == Decision("retry", 0.0, 120.0)
    assert after(Retries(), error) == Decision("give up", 0.0, 120.0)  # nobody waits two minutes unasked
    assert after(Retries(), error, deadline=400.0).action == "wait"


def test_r36_nothing_begins_at_the_deadline() -> None:
    error = UpstreamServerError("")
    assert after(Retries(), error, deadline=100.0).action == "give up"
    assert after(Retries(), error, deadline=100.001).action == "retry"


@pytest.mark.parametrize("seconds", [0.7, 1.5])
def test_r37_the_wait_is_what_the_provider_said_and_a_little(seconds: float) -> None:
    waits = [
        after(Retries(), RateLimitError("", retry_after=seconds), seed=seed).seconds for seed in range(200)
    ]
    assert min(waits) >= seconds
    assert max(waits) <= seconds * 1.1
    assert len(set(waits)) == 200


@pytest.mark.parametrize(
    "error",
    [
        RateLimitError(""),
        RateLimitError("", retry_after=1.0),
        UpstreamServerError(""),
        UpstreamConnectionError(""),
    ],
)
def test_r38_waits_last_at_least_retry_after(error: ProviderError) -> None:
    waits = [after(Retries(retry_after=30.0), error, seed=seed).seconds for seed in range(100)]
    assert min(waits) >= 30.0
    assert max(waits) <= 30.25


def test_r39_a_policy_per_class() -> None:
    retries = Retries(retry_policy={"TimeoutErrorRetries": 3, "AuthenticationErrorRetries": 0})
    timeout, denied = DeadlineError(""), AuthenticationError("")
    assert [after(retries, timeout, made=made).action for made in range(5)] == ["retry"] * 3 + ["give up"] * 2
    assert after(retries, denied, another=True).action == "give up"
    server = UpstreamServerError("")
    assert [after(retries, server, made=made).action for made in range(3)] == ["retry", "retry", "give up"]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("BadRequestErrorRetries", BadRequestError("")),
        ("AuthenticationErrorRetries", AuthenticationError("")),
        ("TimeoutErrorRetries", DeadlineError("")),
        ("TimeoutErrorRetries", ProviderError("", status=408)),
        ("RateLimitErrorRetries", RateLimitError("")),
        ("ContentPolicyViolationErrorRetries", ContentPolicyError("")),
        ("InternalServerErrorRetries", UpstreamServerError("")),
        ("InternalServerErrorRetries", UpstreamServerError("", status=503)),
        ("ServiceUnavailableErrorRetries", UpstreamServerError("", status=503)),
        ("NotFoundErrorRetries", NotFoundError("")),
    ],
)
def test_the_names_of_the_policy(name: str, error: ProviderError) -> None:
    assert Retries(num_retries=1, retry_policy={name: 7}).allowed(error) == 7


def test_the_closest_name_of_the_policy_holds() -> None:
    retries = Retries(retry_policy={"InternalServerErrorRetries": 1, "ServiceUnavailableErrorRetries": 5})
    assert retries.allowed(UpstreamServerError("", status=503)) == 5
    assert retries.allowed(UpstreamServerError("")) == 1


def test_the_callers_mistakes_are_not_repeated() -> None:
    for error in (BadRequestError(""), ContentPolicyError("")):
        assert after(Retries(), error, another=True).action == "give up"


def test_wrong_credentials_are_tried_elsewhere_only() -> None:
    for error in (AuthenticationError(""), NotFoundError("")):
        assert after(Retries(), error, another=True) == Decision("retry")
        assert after(Retries(), error).action == "give up"


def test_another_deployment_is_tried_at_once() -> None:
    error = RateLimitError("", retry_after=7.0)
    assert after(Retries(retry_after=30.0), error, another=True) == Decision("retry", 0.0, 7.0)


def test_the_backoff_after_429_is_jittered_in_full_below_a_bound_that_doubles() -> None:
    for made, bound in ((0, 0.5), (1, 1.0), (2, 2.0), (4, 8.0), (9, 8.0)):
        retries = Retries(num_retries=10)
        waits = [after(retries, RateLimitError(""), made=made, seed=seed).seconds for seed in range(2000)]
        assert max(waits) <= bound
        assert sum(waits) / 2000 == pytest.approx(bound / 2, rel=0.05)


def test_other_transient_errors_are_retried_at_once() -> None:
    for error in (UpstreamServerError(""), UpstreamConnectionError(""), DeadlineError("")):
        assert after(Retries(), error) == Decision("retry")


@pytest.mark.parametrize("name", ["num_retries", "retry_after", "backoff", "longest_backoff"])
@pytest.mark.parametrize("value", ["1", True, float("nan"), float("inf"), -1, 10**400, None, [1]])
def test_a_number_is_a_number(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: expected a (whole )?number >= 0, got ") as caught:
        Retries(**{name: value})  # type: ignore[arg-type]
    assert caught.value.param == name


def test_retries_are_whole_and_waits_need_not_be() -> None:
    with pytest.raises(ConfigError, match=r"^num_retries: expected a whole number >= 0, got 1.5$"):
        Retries(num_retries=1.5)  # type: ignore[arg-type]
    assert Retries(num_retries=0, retry_after=1.5).retry_after == 1.5


@pytest.mark.parametrize("policy", ["TimeoutErrorRetries", ["TimeoutErrorRetries"], 3])
def test_a_policy_is_a_mapping(policy: object) -> None:
    with pytest.raises(ConfigError, match=r"^retry_policy: expected a mapping") as caught:
        Retries(retry_policy=policy)  # type: ignore[arg-type]
    assert caught.value.param == "retry_policy"


@pytest.mark.parametrize("number", ["1", True, 1.5, float("nan"), [1]])
def test_a_number_of_a_policy_is_whole(number: object) -> None:
    with pytest.raises(ConfigError, match=r"^retry_policy: TimeoutErrorRetries: expected a number >= 0"):
        Retries(retry_policy={"TimeoutErrorRetries": number})  # type: ignore[dict-item]


def test_wrong_settings() -> None:
    with pytest.raises(ConfigError, match="did you mean 'TimeoutErrorRetries'"):
        Retries(retry_policy={"TimoutErrorRetries": 1})
    with pytest.raises(ConfigError, match="RateLimitErrorRetries: expected a number >= 0, got -1"):
        Retries(retry_policy={"RateLimitErrorRetries": -1})
    assert Retries(retry_policy={"RateLimitErrorRetries": None}).allowed(RateLimitError("")) == 2
