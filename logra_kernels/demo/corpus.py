"""The corpus every machine has: the docstrings of Python's standard library, one row a passage.

Sources are parsed, never imported, so nothing runs and the result depends on the files alone. A docstring is cut at
its blank lines into passages of a few hundred characters; the module it stands in is the passage's provider.
"""

import ast
import hashlib
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from logra_kernels.errors import LograError

# Folders that are not the library itself (tests, vendored or third-party code) or that only hold data.
_SKIPPED_FOLDERS = {
    "__pycache__", "_bundled", "dist-packages", "idlelib", "lib-dynload", "lib2to3", "pydoc_data", "site-packages",
    "test", "tests", "turtledemo",
}  # fmt: skip

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Passage:
    """One row of the corpus: `id` names module and place, `source` is the module, the provider."""

    id: str
    text: str
    source: str


@dataclass(frozen=True)
class Corpus:
    """Training passages, held-out passages, and a fingerprint of both (they depend on the Python version)."""

    train: list[Passage]
    held_out: list[Passage]

    @property
    def fingerprint(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of every id and text, in order."""
        digest = hashlib.sha256()
        for passage in (*self.train, *self.held_out):
            digest.update(f"{passage.id}\0{passage.text}\0".encode())
        return digest.hexdigest()[:16]


def stdlib_corpus(
    limit: int | None = None,
    *,
    root: Path | None = None,
    modules: int | None = None,
    low: int = 160,
    high: int = 480,
    held_out: float = 0.04,
) -> Corpus:
    """Passages of the standard library's docstrings, split into training and held-out ones.

    The same files give the same passages in the same order on every machine.

    Args:
        limit: At most so many passages in all, spread evenly over the library by the hash of their text.
        root: Folder of the sources; default the running Python's library.
        modules: Keep the modules with most passages only, so many; default all.
        low, high: Shortest and (about) longest passage in characters.
        held_out: The share that is kept from training.

    Raises:
        LograError: There is no docstring to use under `root`.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    files = sorted(_python_files(root), key=lambda path: path.relative_to(root).as_posix())
    passages = _largest(list(_distinct(_passages(root, files, low, high))), modules)
    if not passages:
        raise LograError(f"no docstrings of {low} characters or more under {root}; use a Python with its sources")
    # The hash of the text, not a random draw over positions: a passage keeps its side when others come or go.
    ranked = sorted(passages, key=lambda passage: hashlib.sha256(passage.text.encode()).digest())[:limit]
    aside = {passage.id for passage in ranked[: max(1, round(held_out * len(ranked)))]}
    kept = {passage.id for passage in ranked} - aside
    return Corpus([p for p in passages if p.id in kept], [p for p in passages if p.id in aside])


def split_passages(docstring: str, low: int, high: int) -> list[str]:
    """Cut a docstring at blank lines (at line ends where a paragraph alone is too long) into passages.

    Paragraphs are joined as long as they stay within `high` characters together. A remainder shorter than `low` goes to
    the passage before it, so that a passage can be up to `high + low` characters; a docstring shorter than `low` gives
    none.
    """
    passages: list[str] = []
    for piece in _pieces(docstring, high):
        if passages and len(passages[-1]) + len(piece) <= high:
            passages[-1] += piece
        else:
            passages.append(piece)
    if len(passages) > 1 and len(passages[-1].strip()) < low:
        last = passages.pop()
        passages[-1] += last
    return [text for passage in passages if len(text := passage.strip("\n").rstrip()) >= low]


def _pieces(docstring: str, high: int) -> Iterator[str]:
    """Paragraphs with the blank lines that follow them, lines where a paragraph is longer than `high`."""
    for paragraph in re.findall(r".+?(?:\n\s*\n|\Z)", docstring, flags=re.DOTALL):
        if len(paragraph) <= high:
            yield paragraph
        else:
            yield from paragraph.splitlines(keepends=True)


def _python_files(root: Path) -> Iterator[Path]:
    for path in root.rglob("*.py"):
        folders = path.relative_to(root).parts[:-1]
        if not any(folder in _SKIPPED_FOLDERS or folder.startswith("config-") for folder in folders):
            yield path


def _passages(root: Path, files: Iterable[Path], low: int, high: int) -> Iterator[Passage]:
    for path in files:
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for name, docstring in _docstrings(path):
            for number, text in enumerate(split_passages(docstring, low, high)):
                yield Passage(f"{module}:{name}#{number}" if name else f"{module}#{number}", text, module)


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of all that has one, in source order; nothing if the file cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    stack: list[tuple[str, ast.AST]] = [("", tree)]
    while stack:
        name, node = stack.pop()
        if isinstance(node, _DOCUMENTED) and (docstring := ast.get_docstring(node)):
            yield name, docstring
        for child in reversed(list(ast.iter_child_nodes(node))):
            inner = getattr(child, "name", None) if isinstance(child, _DOCUMENTED) else None
            stack.append((f"{name}.{inner}".lstrip(".") if inner else name, child))


def _largest(passages: list[Passage], modules: int | None) -> list[Passage]:
    """The passages of the modules that have most of them; of equal ones the first by name."""
    size = Counter(passage.source for passage in passages)
    kept = set(sorted(size, key=lambda source: (-size[source], source))[:modules])
    return [passage for passage in passages if passage.source in kept]


def _distinct(passages: Iterable[Passage]) -> Iterator[Passage]:
    """Drop passages whose words were all seen before in the same order, and number ids that repeat."""
    texts: set[str] = set()
    ids: dict[str, int] = {}
    for passage in passages:
        words = " ".join(passage.text.split())
        if words in texts:
            continue
        texts.add(words)
        ids[passage.id] = ids.get(passage.id, 0) + 1
        repeat = ids[passage.id]
        yield passage if repeat == 1 else Passage(f"{passage.id}~{repeat}", passage.text, passage.source)
