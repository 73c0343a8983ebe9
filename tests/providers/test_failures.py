"""What a provider said instead of an answer, as an error, and what of it may be shown."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_middleware.errors import (
    AuthenticationError,
    BadRequestError,
    ContentPolicyError,
    ContextWindowExceededError,
    DeadlineError,
    NotFoundError,
    PermissionDeniedError,
    ProviderError,
    RateLimitError,
    UnprocessableError,
    UpstreamServerError,
)
from llm_middleware.providers.failures import failure, retry_after
from llm_middleware.providers.masking import LONGEST, masked

NOW = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


def openai(message, code=None, kind="invalid_request_error", param=None, **more) -> bytes:
    error = {"message": message, "type": kind, "param": param, "code": code, **more}
    return json.dumps({"error": error}).encode()


def of(status, body, headers=None, **more) -> ProviderError:
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return failure(status, headers or {}, body, **more)


class TestClasses:
    @pytest.mark.parametrize(
        ("status", "expected"),
        [
            (400, BadRequestError),
            (401, AuthenticationError),
            (402, PermissionDeniedError),
            (403, PermissionDeniedError),
            (404, NotFoundError),
            (405, BadRequestError),
            (408, DeadlineError),
            (409, ProviderError),
            (413, BadRequestError),
            (418, BadRequestError),
            (422, UnprocessableError),
            (429, RateLimitError),
            (498, RateLimitError),
            (500, UpstreamServerError),
            (502, UpstreamServerError),
            (503, UpstreamServerError),
            (504, DeadlineError),
            (520, UpstreamServerError),
            (529, UpstreamServerError),
        ],
    )
    @pytest.mark.parametrize("body", [b"", b"nothing to read", openai("what it says", None, None)])
    def test_by_the_status_alone(self, status, expected, body):
        error = of(status, body)
        assert (type(error), error.status) == (expected, status)

    @pytest.mark.parametrize(("status", "expected"), [(200, 502), (302, 502), (0, 502), (999, 502)])
    def test_a_status_that_is_no_failure_is_a_bad_answer(self, status, expected):
        assert (type(of(status, b"")), of(status, b"").status) == (UpstreamServerError, expected)

    @pytest.mark.parametrize(
        ("event", "expected", "status"),
        [
            ({"error": {"message": "m", "code": 429}}, RateLimitError, 429),  # OpenRouter
            ({"type": "error", "error": {"type": "overloaded_error"}}, UpstreamServerError, 529),
            ({"error": {"message": "m", "type": "server_error"}}, UpstreamServerError, 500),
            ({"error": {"type": "rate_limit_error"}}, RateLimitError, 429),
            ({"error": {"type": "invalid_request_error"}}, BadRequestError, 400),
            ({"error": {"code": "content_filter"}}, ContentPolicyError, 400),
            ({"error": {"message": "m"}}, UpstreamServerError, 502),
            # Anthropic's: https://platform.claude.com/docs/en/api/errors
            ({"type": "error", "error": {"type": "billing_error"}}, PermissionDeniedError, 402),
            ({"type": "error", "error": {"type": "timeout_error"}}, DeadlineError, 504),
            ({"type": "error", "error": {"type": "gateway_timeout_error"}}, DeadlineError, 504),
            ({"type": "error", "error": {"type": "conflict_error"}}, ProviderError, 409),
        ],
    )
    def test_an_event_of_a_stream_says_what_the_status_cannot(self, event, expected, status):
        error = of(200, event)
        assert (type(error), error.status) == (expected, status)

    def test_r58_a_prompt_too_long_is_openais_error(self):
        message = (
            "This model's maximum context length is 8192 tokens. However, your messages resulted in 9001."
        )
        error = of(400, openai(message, "context_length_exceeded", param="messages"))
        assert type(error) is ContextWindowExceededError
        assert error.status == 400
        assert json.loads(error.body()) == {
            "error": {
                "message": message,
                "type": "invalid_request_error",
                "param": "messages",
                "code": "context_length_exceeded",
            }
        }

    @pytest.mark.parametrize(
        ("status", "body"),
        [
            (
                400,
                {
                    "type": "error",
                    "error": {
                        "type": "invalid_request_error",
                        "message": "prompt is too long: 210000 tokens > 200000 maximum",
                    },
                },
            ),
            (
                400,
                {
                    "error": {
                        "type": "invalid_request_error",
                        "message": "input length and `max_tokens` exceed context limit: 9 + 9 > 10",
                    }
                },
            ),
            (400, {"message": "Input is too long for requested model."}),
            (
                400,
                {
                    "object": "error",
                    "code": 400,
                    "message": "This model's maximum context length is 4096 tokens. You requested 5000",
                },
            ),
            (
                400,
                [
                    {
                        "error": {
                            "code": 400,
                            "status": "INVALID_ARGUMENT",
                            "message": "The input token count (9) exceeds the maximum number of tokens (8).",
                        }
                    }
                ],
            ),
            (400, {"error": {"code": 400, "type": "exceed_context_size_error", "message": "too big"}}),
            (413, {"error": {"code": "tokens_limit_reached", "message": "Request body too large"}}),
            (400, {"error": "the request exceeds the available context size, try increasing it"}),
            (422, {"error": {"code": "context_length_exceeded"}}),
        ],
    )
    def test_others_say_it_in_their_words(self, status, body):
        error = of(status, body)
        assert type(error) is ContextWindowExceededError
        assert (error.status, error.code, error.type) == (
            400,
            "context_length_exceeded",
            "invalid_request_error",
        )

    @pytest.mark.parametrize(
        ("status", "body"),
        [
            (
                400,
                openai(
                    "The response was filtered due to the prompt triggering Azure's policy.",
                    "content_filter",
                    None,
                    "prompt",
                    status=400,
                    innererror={"code": "ResponsibleAIPolicyViolation", "content_filter_result": {}},
                ),
            ),
            (400, openai("m", "OperationNotSupported", innererror={"code": "ResponsibleAIPolicyViolation"})),
            (400, openai("m", "content_policy_violation")),
            (400, openai("m", "moderation_blocked")),
            (400, openai("m", "data_inspection_failed")),
            (403, openai("m", "content_filter")),
            (400, {"error": {"type": "x", "message": "Output blocked by content filtering policy"}}),
            (400, openai("Your request was rejected as a result of our safety system.")),
        ],
    )
    def test_a_refusal_has_one_code(self, status, body):
        error = of(status, body)
        assert type(error) is ContentPolicyError
        assert (error.status, error.code) == (400, "content_policy_violation")

    @pytest.mark.parametrize(
        ("status", "message"),
        [
            (400, "Invalid tool: 'rate limit exceeded, too many requests, error 429'"),
            (400, 'messages[0] is wrong: "rate limit"'),
            (400, "tool said: prompt is too long: 3 tokens > 2 maximum"),
            (400, "tool said: output blocked by content filtering policy"),
            (400, "invalid value 'invalid_api_key', 'insufficient_quota'"),
        ],
    )
    def test_r61_words_that_are_quoted_change_nothing(self, status, message):
        error = of(status, openai(message))
        assert (type(error), error.status, error.code) == (BadRequestError, 400, "invalid_request")

    @pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
    def test_r61_nor_do_they_at_another_status(self, status):
        plain = of(status, openai("m"))
        assert type(of(status, openai("prompt is too long: 9 tokens > 8"))) is type(plain)

    @pytest.mark.parametrize(
        ("status", "body", "expected"),
        [
            (
                400,
                {
                    "error": {
                        "code": 400,
                        "message": "API key not valid.",
                        "status": "INVALID_ARGUMENT",
                        "details": [{"reason": "API_KEY_INVALID"}],
                    }
                },
                AuthenticationError,
            ),
            (413, openai("Request too large on TPM", "rate_limit_exceeded", "tokens"), RateLimitError),
            (
                400,
                {"__type": "com.amazon#ThrottlingException", "message": "Too many requests"},
                RateLimitError,
            ),
            (403, openai("m", "rateLimitExceeded"), RateLimitError),
            (429, openai("m", "insufficient_quota", "insufficient_quota"), RateLimitError),
            (500, openai("m", "rate_limit_exceeded"), UpstreamServerError),
        ],
    )
    def test_a_code_says_more_than_a_status(self, status, body, expected):
        assert type(of(status, body)) is expected

    def test_code_type_and_param_are_the_providers_own(self):
        error = of(
            429, openai("m", "insufficient_quota", "insufficient_quota", "messages[0].content[1].image_url")
        )
        assert (error.code, error.type, error.param) == (
            "insufficient_quota",
            "insufficient_quota",
            "messages[0].content[1].image_url",
        )
        error = of(404, openai("no such model", "model_not_found"))
        assert (type(error), error.code) == (NotFoundError, "model_not_found")

    @pytest.mark.parametrize(
        "word", ["sk-abcdef123456", "https://h.example", "a b", "", 5, None, ["a"], "x" * 65]
    )
    def test_a_code_that_is_no_word_is_left_out(self, word):
        error = of(404, openai("m", word, word, word if word != "x" * 65 else "x" * 129))
        assert (error.code, error.type, error.param) == ("not_found", "invalid_request_error", None)


class TestMessages:
    @pytest.mark.parametrize(
        ("body", "expected"),
        [
            ({"error": {"message": " a  b\n\tc "}}, "a b c"),
            (
                {"error": "model 'm' not found, try pulling it first"},
                "model 'm' not found, try pulling it first",
            ),
            ({"message": "cohere says", "id": "x"}, "cohere says"),
            ({"detail": "fastapi says"}, "fastapi says"),
            ({"detail": [{"loc": ["body"], "msg": "field required"}]}, "field required"),
            ({"errors": [{"code": 7003, "message": "no route"}]}, "no route"),
            ([{"error": {"message": "gemini says"}}], "gemini says"),
            ({"error": {"message": ""}}, "the provider answered with status 400"),
            ({"error": {"message": 5}}, "the provider answered with status 400"),
            ({}, "the provider answered with status 400"),
            ([], "the provider answered with status 400"),
            ("text", "the provider answered with status 400"),
            (b"upstream connect error", "upstream connect error"),
            (b"{not json", "the provider answered with status 400"),
            (b"<html><body>nginx at 10.0.0.1</body></html>", "the provider answered with status 400"),
            (b"\xff\xfe", "the provider answered with status 400"),
            (b"[" * 100_000, "the provider answered with status 400"),
            (b'{"error":{"code":' + b"1" * 5000 + b"}}", "the provider answered with status 400"),
            (b'{"error":{"message":"' + b"a" * (1 << 18) + b'"}}', "the provider answered with status 400"),
        ],
    )
    def test_what_is_told(self, body, expected):
        if isinstance(body, str):
            body = b'"text"'
            expected = '"text"'
        assert of(400, body).message == expected

    def test_a_proxys_page_is_not_told(self):
        error = of(502, b"Bad gateway at edge-7", {"content-type": "text/html; charset=utf-8"})
        assert error.message == "the provider answered with status 502"

    def test_a_long_plain_text_is_cut_at_a_word(self):
        assert of(500, b"word " * 500).message == " ".join(["word"] * 60)
        assert of(500, b"wor " + "é".encode() * 300).message == "wor"
        assert of(500, b"ab " + "é".encode() * 100).message == "ab " + "é" * 100

    @pytest.mark.parametrize(
        ("said", "shown"),
        [
            ("Incorrect API key provided: sk-proj-abc***xyz.", "Incorrect API key provided: ***"),
            ("bad key sk-none-at-all here", "bad key *** here"),
            ("api_key='abc.def' is wrong", "api_key='***' is wrong"),
            ('{"api_key": "abcdef"} is wrong', '{"api_key": "***"} is wrong'),
            ("Authorization: Bearer abcdefgh is wrong", "Authorization: *** *** is wrong"),
            ("got Bearer abc.def-ghi_123", "got Bearer ***"),
            ("gsk_AbCd1234 and xai-AbCd1234 and hf_AbCd1234", "*** and *** and ***"),
            ("AIzaSyA1234567 AKIAABCDEFGHIJKL eyJhbGciOi.eyJzdWI.sig", "*** *** ***"),
            ("key 0123456789abcdef0123456789abcdef", "key ***"),
            ("deployment 6f9619ff-8b86-d011-b42d-00c04fc964ff is gone", "deployment *** is gone"),
            ("in organization org-AbC123 on tokens", "in organization *** on tokens"),
            ("The deployment 'my-gpt' is gone", "The deployment *** is gone"),
            ("see https://platform.openai.com/account?a=b for more", "see [url] for more"),
            ("postgres://u:p@db/x failed", "[url] failed"),
            ("see platform.openai.com/account/api-keys.", "see [host]"),
            ("res.openai.azure.com:443 refused", "[host] refused"),
            ("llm.svc.cluster.local:8000 refused", "[host] refused"),
            ("connect to 10.1.2.3:8000/v1 failed", "connect to [host] failed"),
            ("connect to [fe80::1:2]:8000 failed", "connect to [host] failed"),
            ("localhost:4000 and vllm-7b:8000 refused", "[host] and [host] refused"),
            ("HTTPConnectionPool(host='vllm', port=8000)", "HTTPConnectionPool(host=***, port=8000)"),
        ],
    )
    def test_r60_keys_addresses_and_ids_are_masked(self, said, shown):
        assert of(400, openai(said)).message == shown

    @pytest.mark.parametrize(
        "text",
        [
            "model claude-3-5-sonnet-20241022 is overloaded",
            "gpt-4o-mini-2024-07-18 does not support logprobs",
            "messages.0.content.1: Input should be a valid list",
            "tools[0].function.name: String should match pattern '^[a-zA-Z0-9_-]{1,64}$'",
            "max_tokens: 100000 > 8192, which is the maximum allowed number of output tokens",
            "Rate limit reached for gpt-4o on tokens per min (TPM): Limit 30000, Used 29000, Requested 2000.",
            "'temperature' must be between 0 and 2, e.g. 0.7",
            "meta-llama/Llama-3.3-70B-Instruct is not available",
            "unexpected key-value pair; user-provided schema is wrong",
            "Invalid token count",
        ],
    )
    def test_what_helps_the_caller_stays(self, text):
        assert of(400, openai(text)).message == text

    def test_r60_the_targets_own_secrets_are_masked_wherever_they_stand(self):
        secrets = ("correcthorse", "my-gpt", "vllm.house")
        error = of(400, openai("no my-gpt at vllm.house for correcthorsebattery", "my-gpt"), secrets=secrets)
        assert error.message == "no *** at *** for ***battery"

    def test_a_message_has_an_end(self):
        error = of(400, openai("word " * 1000))
        assert len(error.message) == LONGEST
        assert error.message.endswith("…")

    def test_what_is_cut_off_at_the_end_is_not_told_by_halves(self):
        text = f"https://h.example/{'a' * 1312} " * 3 + "correcthorse"
        assert masked(text, ["correcthorse"]) == "[url] [url] [url]"

    @given(st.binary(max_size=300), st.integers(-1, 700), st.text(max_size=40))
    def test_any_bytes_are_some_error(self, body, status, header):
        headers = {"retry-after": header, "content-type": header, "date": header, "retry-after-ms": header}
        error = failure(status, headers, body)
        assert isinstance(error, ProviderError)
        assert 0 < len(error.message) <= LONGEST
        assert 400 <= error.status <= 599
        json.loads(error.body())

    JSON = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(
                    ["error", "errors", "detail", "details", "message", "code", "type", "innererror"]
                ),
                inner,
            )
        ),
        max_leaves=12,
    )

    @given(JSON, st.sampled_from([200, 400, 401, 403, 413, 422, 429, 500]))
    def test_any_json_is_some_error(self, value, status):
        error = failure(status, {}, json.dumps(value).encode())
        assert 0 < len(error.message) <= LONGEST
        assert isinstance(error.code, str)
        json.loads(error.body())

    KEY = st.from_regex(r"\A(sk-[A-Za-z0-9]{20,48}|[0-9a-f]{31}1|gsk_[A-Za-z]{20}[0-9])\Z").filter(
        lambda key: not key.isdigit()
    )

    @given(KEY, st.text(alphabet=" .,:;'\"()[]{}<>\n=", min_size=1, max_size=3), st.text(max_size=30))
    def test_r60_no_key_is_ever_shown(self, key, around, text):
        assert key not in masked(f"{text}{around}{key}{around}{text}")


class TestRetryAfter:
    """R59."""

    @pytest.mark.parametrize(
        ("headers", "expected"),
        [
            ({"retry-after": "7"}, 7.0),
            ({"retry-after": " 1.5 "}, 1.5),
            ({"retry-after-ms": "700"}, 0.7),
            ({"retry-after-ms": "700", "retry-after": "1"}, 0.7),
            ({"retry-after-ms": "soon", "retry-after": "1"}, 1.0),
            ({"retry-after": "0"}, 0.0),
            ({"retry-after": "-1"}, None),
            ({"retry-after": "nan"}, None),
            ({"retry-after": "inf"}, None),
            ({"retry-after": "soon"}, None),
            ({"retry-after": ""}, None),
            ({}, None),
            ({"retry-after": "Tue, 14 Nov 2023 22:13:50 GMT"}, 30.0),
            ({"retry-after": "Tue, 14 Nov 2023 22:13:10 GMT"}, 0.0),
            (
                {
                    "retry-after": "Tue, 14 Nov 2023 23:00:05 GMT",
                    "date": "Tue, 14 Nov 2023 23:00:00 GMT",
                },
                5.0,
            ),
        ],
    )
    def test_r59_seconds(self, headers, expected):
        assert retry_after(headers, lambda: NOW) == expected

    def test_r59_it_is_on_the_error(self):
        assert of(429, openai("m"), {"retry-after": "7"}).retry_after == 7.0
        assert of(503, openai("m"), {"retry-after-ms": "250"}).retry_after == 0.25
        assert of(429, openai("m")).retry_after is None

    def test_googles_retry_info(self):
        details = [{"@type": "x.QuotaFailure"}, {"@type": "x.RetryInfo", "retryDelay": "17.5s"}]
        body = {"error": {"code": 429, "message": "m", "status": "RESOURCE_EXHAUSTED", "details": details}}
        assert of(429, body).retry_after == 17.5
        assert of(429, body, {"retry-after": "3"}).retry_after == 3.0
