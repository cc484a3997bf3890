"""What is written appears whole or not at all."""

from pathlib import Path

import pytest

from zoo import files


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    files.write(path, "old é")

    def fail() -> None:
        with files.whole(path) as temporary:
            temporary.write_text("ne")
            assert temporary.parent == tmp_path, "a rename across file systems would be a copy"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_bytes() == "old é".encode()
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]
