"""The tokenizer of the tests of data."""

import pytest
from character_tokenizer import character_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer()
