"""`SemanticTier`: behind the exact tier, answers to questions that were asked before in other words.

A look-up goes: the question of the request, if it has one that may be compared; the same question in another
spelling; its vector, within a budget; the nearest stored questions of the same scope; the decision. The index
is only a hint: an answer is served from the ordinary store, and a row whose answer is gone there is removed.

Whatever fails here is a plain miss: counted, and never raised to a request.
"""

from __future__ import annotations

import math
from collections.abc import Coroutine, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from .._ports.protocol import Port
from ..caching import cache_key
from ..caching.answer import Found
from ..caching.fastlane import select
from ..caching.memo import Memo
from ..types import Clock
from .answers import only_text
from .decision import Decision
from .embed_cache import CachedEmbedder, Pending
from .embedders import UnfitTextError
from .indexing import Index
from .modes import Mode
from .normal import normal_key
from .question import Context, Question, Reason, question_of
from .records import Neighbour, Row
from .tally import Tally
from .teaching import Teacher

if TYPE_CHECKING:
    from ..caching.keeper import Recorded
    from ..caching.lookup import Header
    from ..caching.plan import Plan
    from ..caching.tiers import Tiers

__all__ = ["SemanticTier", "Sought"]

_NEIGHBOURS = 8
_SPELLING = 0.9  # a cosine that two spellings of one question reach
_EMBEDDING = 10.0  # seconds that a stored answer waits for its question's vector


@dataclass(slots=True)
class Sought:
    """What a look-up came to. ``detail``: how the answer was found, or why there is none; ``similarity``: of
    the nearest question, None where no vector was compared."""

    detail: str
    found: Found | None = None
    similarity: float | None = None
    question: Question | None = None
    scope: str = ""
    pending: Pending | None = None
    decision: Decision | None = None
    own: dict[str, object] = field(default_factory=dict)  # what its own row says that is there already


class SemanticTier:
    """``embedder``, ``index``, ``mode``, ``teacher`` (of the verified mode): the parts. ``tiers``: where
    answers are. ``secret``: of the cache. ``context``, ``question_field``: see `question_of`.
    ``shadow``: whether answers are only counted."""

    def __init__(
        self,
        embedder: CachedEmbedder,
        index: Index,
        mode: Mode,
        teacher: Teacher | None,
        *,
        tiers: Tiers,
        tally: Tally,
        clock: Clock,
        secret: bytes | None,
        context: Context = "all",
        question_field: str | None = None,
        shadow: bool = False,
    ) -> None:
        self.embedder, self.index, self.mode, self.teacher = embedder, index, mode, teacher
        self._tiers, self._clock = tiers, clock
        self._secret = secret
        self._context, self._field, self._shadow = context, question_field, shadow
        self._spellings: Memo[str, str] = Memo(10_000, 1 << 30)
        self.tally = tally

    def update(self, secret: bytes | None) -> None:
        """From now on of this secret: what was stored under another one is never found again."""
        self._secret = secret

    # --- looking for an answer

    async def find(self, port: Port, plan: Plan, header: Header) -> Sought:
        """An answer to a question of like meaning, or why there is none. Nothing is raised."""
        try:
            sought = await self._find(port, plan, header)
            self.tally.worked("a look-up")
        except Exception as exc:
            sought = Sought("error")
            self.tally.failed(exc, "a look-up")
        if sought.question is None and sought.detail != "error":
            self.tally.add(f"exact:{sought.detail}")
        else:
            self.tally.looked(hit=sought.found is not None, detail=sought.detail)
        return sought

    async def _find(self, port: Port, plan: Plan, header: Header) -> Sought:
        question = self._question(plan)
        if isinstance(question, Reason):
            return Sought(question.value)
        sought = Sought("none", question=question, scope=self._scope(plan, question))
        spelling = normal_key(sought.scope, question.text, self._secret)
        key = self._spellings.get(spelling)
        if key is not None and key != plan.key:
            await self._serve(port, plan, header, sought, key, "normalized")
        if sought.detail in ("none", "gone", "unsuitable"):
            await self._compare(port, plan, header, sought, spelling)
        return sought

    async def _compare(self, port: Port, plan: Plan, header: Header, sought: Sought, spelling: str) -> None:
        question = sought.question
        assert question is not None
        sought.pending = self.embedder.start(port, question.text, plan.scope)
        vector = await self.embedder.wait(port, sought.pending)
        if vector is None:
            sought.detail = self._why_none(sought.pending.error)
            return
        self.tally.worked("embedding")
        near = await self.index.search(port, sought.scope, vector, _NEIGHBOURS)
        sought.own = next((dict(one.row.payload) for one in near if one.row.key == plan.key), {})
        near = [one for one in near if one.row.key != plan.key]
        sought.similarity = near[0].similarity if near else 0.0
        same = self._same(near, sought.scope, spelling)
        if same is not None:
            key, similarity = same.row.key, same.similarity
            await self._serve(port, plan, header, sought, key, "normalized", similarity)
        else:
            await self._decide(port, plan, header, sought, near)

    def _why_none(self, error: BaseException | None) -> str:
        """Why there is no vector, whose call ended with ``error``, or has not ended."""
        if isinstance(error, UnfitTextError):
            return "unknown-words" if error.code == "text_unknown" else Reason.TOO_LONG.value
        if not isinstance(error, Exception):
            return "embedding-late"
        self.tally.failed(error, "embedding")
        return "embedding-failed"

    def _same(self, near: Sequence[Neighbour], scope: str, spelling: str) -> Neighbour | None:
        """The neighbour that is the question itself, in another spelling."""
        for one in near:
            if one.similarity < _SPELLING:
                break
            if normal_key(scope, one.row.text, self._secret) == spelling:
                return one
        return None

    async def _decide(
        self, port: Port, plan: Plan, header: Header, sought: Sought, near: Sequence[Neighbour]
    ) -> None:
        assert sought.question is not None
        family = self.family(plan.key, plan.kind, plan.model)
        teaches = plan.store and not plan.controls.only_if_cached
        decision = await self.mode.decide(port, family, sought.question.text, near, teaches=teaches)
        sought.decision, sought.detail = decision, _detail(decision.reason)
        if decision.action != "hit":
            return
        assert decision.neighbour is not None
        key, similarity = decision.neighbour.row.key, decision.neighbour.similarity
        await self._serve(port, plan, header, sought, key, "semantic", similarity)
        if sought.found is not None:
            self.tally.served(decision.probability)
            if self.teacher is not None:
                self.teacher.served(sought.found.key, family, decision)

    async def _serve(
        self,
        port: Port,
        plan: Plan,
        header: Header,
        sought: Sought,
        key: str,
        like: str,
        similarity: float = 1.0,
    ) -> None:
        """Serve the stored answer under ``key``, if it is there and fits the request."""
        entry, tier = await self._tiers.get(port, plan.kind, key)
        if entry is None:
            sought.detail = "gone"
            port.spawn(lambda: self._drop(port, key))
            return
        found = select(entry, plan, self._clock(), tier, header)
        if found is None or found.stale is not None or not only_text(plan.kind, found.body):
            sought.detail = "unsuitable"
        elif self._shadow:
            sought.detail = "shadow"
        else:
            found.like, found.key, found.tier, found.similarity = like, key[-64:], "semantic", similarity
            sought.found, sought.detail = found, like

    async def _drop(self, port: Port, key: str) -> None:
        """Remove the row of an answer that is gone; not where its store only fails to say."""
        try:
            if await self._tiers.gone(port, key):
                await self.index.remove(port, [key])
        except Exception as exc:
            self.tally.failed(exc, "removing")

    def _question(self, plan: Plan) -> Question | Reason:
        return question_of(
            plan.kind, plan.form, field=self._field, context=self._context, fits=self.embedder.fits
        )

    def _scope(self, plan: Plan, question: Question) -> str:
        names = (_namespace(plan.key), plan.controls.namespace or "", plan.route)
        return question.scope(
            caller=plan.scope, namespaces=names, embedder=self.embedder.id, secret=self._secret
        )

    def family(self, key: str, kind: str, model: str | None) -> str:
        """The name under which is kept what was learnt of such questions, whoever asked them. ``key``: of any
        answer in the same namespace."""
        text = cache_key.canonical([kind, model, self.embedder.id])
        return f"{_namespace(key)}:{cache_key.digest('family', '', (), text, None)[:32]}"

    # --- keeping a question

    async def stored(
        self, port: Port, plan: Plan, answer: Recorded, sought: Sought | None, kept_for: float | None
    ) -> None:
        """The answer to ``plan`` was kept for so many seconds: from now on its question is compared. Nothing
        is raised."""
        try:
            await self._stored(port, plan, answer, sought or Sought(""), kept_for)
        except Exception as exc:
            self.tally.failed(exc, "storing")

    async def _stored(
        self, port: Port, plan: Plan, answer: Recorded, sought: Sought, kept_for: float | None
    ) -> None:
        if sought.question is None:
            question = self._question(plan)
            if isinstance(question, Reason):
                return
            sought.question, sought.scope = question, self._scope(plan, question)
        if answer.status != 200 or not only_text(plan.kind, answer.body):
            return
        pending = sought.pending or self.embedder.start(port, sought.question.text, plan.scope)
        expires = math.inf if kept_for is None else self._clock() + kept_for
        body = answer.body
        if pending.done:
            await self._keep(port, plan, body, sought, pending, expires)
        else:
            port.spawn(lambda: self._keep(port, plan, body, sought, pending, expires))

    async def _keep(
        self, port: Port, plan: Plan, body: bytes, sought: Sought, pending: Pending, expires: float
    ) -> None:
        try:
            vector = await pending.wait(port, _EMBEDDING)
            if vector is None:
                return
            assert sought.question is not None
            if sought.similarity is None and sought.detail != "error":
                # Nothing was compared: what its own row says is to stay there.
                near = await self.index.search(port, sought.scope, vector, _NEIGHBOURS)
                sought.own = next((dict(one.row.payload) for one in near if one.row.key == plan.key), {})
            row = Row(plan.key, sought.scope, sought.question.text, vector, expires, sought.own)
            await self.index.add(port, row, plan.scope)
            self._spellings.put(normal_key(row.scope, row.text, self._secret), plan.key)
            self.tally.worked("storing")
            decision, sought.decision = sought.decision, None  # a stream may be kept twice
            if decision is not None and decision.action == "explore" and self.teacher is not None:
                family = self.family(plan.key, plan.kind, plan.model)
                self.teacher.begin(port, plan, family, decision, body)
        except Exception as exc:
            self.tally.failed(exc, "storing")

    async def report(self, port: Port, key: str, kind: str | None, model: str | None) -> None:
        """Somebody says that the answer under ``key``, of this ``kind`` and ``model``, was wrong."""
        self.tally.add("reported")
        if self.teacher is not None:
            await self.teacher.report(port, key, None if kind is None else self.family(key, kind, model))

    # --- what is removed elsewhere

    async def removed(self, port: Port, keys: Sequence[str]) -> None:
        """These answers are being removed from the store; what they were asked for goes too."""
        await self._try("removing", self.index.remove(port, keys))

    async def flushed(self, port: Port, namespace: str) -> None:
        """`removed`, of all answers of a namespace."""
        await self._try("removing", self.index.flush(port, namespace))

    async def purge(self, port: Port) -> None:
        """Remove the questions whose answers are over."""
        await self._try("removing", self.index.purge(port))

    async def close(self, port: Port) -> None:
        """Keep what was learnt, and release files and connections."""
        if self.teacher is not None:
            await self.teacher.families.close(port)
        await self._try("closing", self.index.close(port))

    async def _try(self, doing: str, work: Coroutine[object, object, object]) -> None:
        try:
            await work
            self.tally.worked(doing)
        except Exception as exc:
            self.tally.failed(exc, doing)

    def stats(self) -> dict[str, object]:
        """What `Tally.told` tells, the ``threshold`` of the static mode, and the counters of
        ``embedding``."""
        told = self.tally.told(bounded=self.teacher is not None)
        threshold = getattr(self.mode, "threshold", None)
        return {**told, "threshold": threshold, "embedding": asdict(self.embedder.stats)}


def _namespace(key: str) -> str:
    return key.rpartition(":")[0]


def _detail(reason: str) -> str:
    """What may be told of a decision: a guard's rule, and not the words that it minds."""
    rule, minds, _ = reason.partition(":")
    return f"veto-{rule}" if minds else reason
