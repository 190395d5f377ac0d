import hashlib

from reward_server.scorers.digest import folder_digest


def test_the_digest_is_over_every_byte_that_a_model_is_loaded_from(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(3_000_000))
    first = folder_digest(tmp_path)
    lines = [f"config.json:{hashlib.sha256(b'{}').hexdigest()}",
             f"model.safetensors:{hashlib.sha256(bytes(3_000_000)).hexdigest()}"]  # fmt: skip
    assert first == hashlib.sha256("\n".join(lines).encode()).hexdigest()
    weights.write_bytes(bytes(2_999_999) + b"1")  # the last number of the last layer
    changed = folder_digest(tmp_path)
    assert changed != first
    weights.rename(tmp_path / "other.safetensors")
    assert folder_digest(tmp_path) not in (first, changed)


def test_notes_and_folders_beside_the_weights_do_not_count(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = folder_digest(tmp_path)
    (tmp_path / "README.md").write_text("read me")
    (tmp_path / "figures").mkdir()
    assert folder_digest(tmp_path) == before
