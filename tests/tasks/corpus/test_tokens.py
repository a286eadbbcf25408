"""What is written can be read back: documents, their ends, the token between them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.corpus import tokens as subject
from tasks.errors import DataError

EOS = 7
documents = st.lists(st.lists(st.lists(st.integers(0, 65535), max_size=4), min_size=1, max_size=3), max_size=8)


def write(folder: Path, written: list[list[list[int]]], dtype: str = "uint16", eos_id: int | None = EOS) -> int:
    with subject.writing(folder, dtype=dtype, eos_id=eos_id) as writer:
        for document in written:
            for number, ids in enumerate(document, start=1):
                writer.add(ids, is_last=number == len(document))
        return writer.finish()


@given(documents, st.sampled_from(["uint16", "uint32"]), st.sampled_from([1, 3, 1 << 20]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_documents_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: list[list[list[int]]], dtype: str, flush: int
):
    monkeypatch.setattr(subject, "_FLUSH_TOKENS", flush)
    num_tokens = write(tmp_path, written, dtype)
    ids = np.fromfile(tmp_path / "tokens.bin", "<u2" if dtype == "uint16" else "<u4")
    ends = np.fromfile(tmp_path / "document_ends.bin", "<i8")
    assert len(ids) == num_tokens == (ends[-1] if len(ends) else 0)
    end = [EOS] if len(written) > 1 else []
    found = [part.tolist() for part in np.split(ids, ends[:-1])] if written else []
    assert found == [[i for piece in document for i in piece] + end for document in written]


def test_an_error_leaves_no_file(tmp_path: Path):
    with pytest.raises(RuntimeError), subject.writing(tmp_path, dtype="uint16", eos_id=EOS) as writer:
        writer.add([1, 2], is_last=True)
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_several_documents_need_an_end_token_and_one_needs_none(tmp_path: Path):
    assert write(tmp_path, [[[1, 2]]], eos_id=None) == 2
    with pytest.raises(DataError, match="names no eos_token"):
        write(tmp_path, [[[1]], [[2]]], eos_id=None)
