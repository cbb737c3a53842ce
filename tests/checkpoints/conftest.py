import pytest

from .array_files import import_torch


@pytest.fixture
def torch():
    return import_torch()
