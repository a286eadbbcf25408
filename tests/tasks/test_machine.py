"""What the machine has is read, and too little is said with numbers."""

import pytest

from tasks import machine as subject
from tasks.errors import CapacityError


def test_memory_is_said_with_numbers():
    available = subject.available_memory_bytes()
    assert available > 1 << 20
    subject.require_memory(1, "training", "-")
    with pytest.raises(CapacityError, match=r"training needs about 1000000\.0 GB of memory but only \d+\.\d GB are "):
        subject.require_memory(10**15, "training", "use a smaller base")
    with pytest.raises(CapacityError, match=r"available: use a smaller base$"):
        subject.require_memory(10**15, "training", "use a smaller base")
