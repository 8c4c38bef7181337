"""The corpus: the same rows in the same order each time, of the promised size, none twice, none in both halves."""

import textwrap

import pytest

from logra_kernels.demo.corpus import split_passages, stdlib_corpus
from logra_kernels.errors import LograError


@pytest.fixture(scope="module")
def library():
    return stdlib_corpus(low=160, high=480)


def _write(root, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _sentence(words: str, times: int = 12) -> str:
    return " ".join(f"{words} {i}." for i in range(times))


def test_the_library_gives_thousands_of_passages(library):
    assert len(library.train) > 1500
    assert len({passage.source for passage in library.train}) > 100
    assert 0.02 < len(library.held_out) / len(library.train) < 0.06


def test_passages_have_the_promised_length(library):
    lengths = [len(passage.text) for passage in library.train + library.held_out]
    assert min(lengths) >= 160
    assert sum(length > 640 for length in lengths) < 0.01 * len(lengths)


def test_no_text_and_no_id_occurs_twice(library):
    passages = library.train + library.held_out
    assert len({" ".join(passage.text.split()) for passage in passages}) == len(passages)
    assert len({passage.id for passage in passages}) == len(passages)


def test_tests_and_foreign_code_are_left_out(library):
    tops = {passage.source.split(".")[0] for passage in library.train}
    assert tops.isdisjoint({"test", "idlelib", "site-packages", "lib2to3", "pydoc_data"})


def test_two_readings_are_equal(tmp_path):
    for module in ("b", "a", "pack/__init__", "pack/c"):
        functions = "\n".join(f'def f{i}():\n    """{_sentence(f"{module} {i}")}"""' for i in range(4))
        _write(tmp_path, f"{module}.py", functions)
    one, two = (stdlib_corpus(root=tmp_path, low=20, held_out=0.2) for _ in range(2))
    assert one == two
    assert one.fingerprint == two.fingerprint
    assert {passage.source for passage in one.train + one.held_out} == {"a", "b", "pack", "pack.c"}
    assert len(one.held_out) == round(0.2 * 16)


def test_names_tell_the_place(tmp_path):
    _write(
        tmp_path,
        "m.py",
        textwrap.dedent(f'''
            """{_sentence("module")}"""
            if True:
                class C:
                    """{_sentence("class")}"""
                    def f(self):
                        """{_sentence("one")}"""
                    def f(self, x):
                        """{_sentence("two")}"""
        '''),
    )
    corpus = stdlib_corpus(root=tmp_path, low=20, held_out=0.0)
    # One passage at least is held out; which one is decided by its text.
    assert sorted(p.id for p in corpus.train + corpus.held_out) == ["m#0", "m:C#0", "m:C.f#0", "m:C.f#0~2"]


def test_an_unreadable_source_is_passed_over(tmp_path):
    _write(tmp_path, "bad.py", "def (")
    _write(tmp_path, "good.py", f'"""{_sentence("fine")}"""\ndef f():\n    """{_sentence("well")}"""')
    assert len(stdlib_corpus(root=tmp_path, low=20).train) == 1


def test_a_folder_without_docstrings_is_an_error(tmp_path):
    with pytest.raises(LograError, match="no docstrings"):
        stdlib_corpus(root=tmp_path)


def test_limit_and_modules_keep_a_part(tmp_path):
    for size, module in enumerate(("few", "some", "many"), start=1):
        functions = (f'def f{i}():\n    """{_sentence(f"{module} {i}")}"""' for i in range(4 * size))
        _write(tmp_path, f"{module}.py", "\n".join(functions))

    def kept(**options) -> dict[str, str]:
        corpus = stdlib_corpus(root=tmp_path, low=20, **options)
        return {p.id: p.source for p in corpus.train + corpus.held_out}

    assert len(kept()) == 24
    assert set(kept(limit=7)) <= set(kept(limit=8)) <= set(kept())
    assert len(kept(limit=7)) == 7
    assert set(kept(modules=2).values()) == {"some", "many"}


@pytest.mark.parametrize("high", [50, 120, 400])
def test_splitting_loses_no_words(high):
    paragraphs = [_sentence(f"paragraph {i}", 1 + 3 * i) for i in range(6)]
    text = "\n\n".join("\n".join(textwrap.wrap(paragraph, 40)) for paragraph in paragraphs)
    pieces = split_passages(text, 1, high)
    assert " ".join(pieces).split() == text.split()
    assert all(len(piece) <= high + 1 for piece in pieces)


def test_a_short_end_joins_the_passage_before():
    long, short = _sentence("a long paragraph", 6), "A short end."
    assert split_passages(f"{long}\n\n{short}", 40, len(long) + 5) == [f"{long}\n\n{short}"]
    assert split_passages(short, 40, 100) == []
