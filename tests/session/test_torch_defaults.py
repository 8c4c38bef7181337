"""What a user sets as torch's default dtype or device is the user's: numbers here do not hang on it."""

from contextlib import contextmanager

import pytest
import torch
from session.every_answer import SETTINGS, answers, make_case


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


# What is made on the device "meta" has no numbers, as what is made on a GPU would have none for C++.
DEFAULTS = {"bf16": lambda: default_dtype(torch.bfloat16), "another device": lambda: torch.device("meta")}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_run_gives_the_same_numbers(tmp_path, settings, default):
    model, ids = make_case(settings)
    usual = answers(tmp_path / "usual", model, ids, SETTINGS[settings])
    with DEFAULTS[default]():
        other = answers(tmp_path / "other", model, ids, SETTINGS[settings])
    for name, expected in usual.items():
        assert other[name].dtype == expected.dtype, name
        assert torch.equal(other[name], expected), name
