"""`calligrapher convert` as a person calls it."""

import pytest
import torch
from diffusers import FluxTransformer2DModel

from calligrapher.errors import CheckpointError
from calligrapher.model.adapter_files import adapter_state, load_adapter
from calligrapher.tiny.pack import DATA
from flows.cli.main import main


def test_a_file_is_converted_and_the_way_back_gives_the_same_weights(
    random_model, tmp_path, capsys
):
    first, second = tmp_path / "ip-adapter.safetensors", tmp_path / "calligrapher.bin"
    assert main(["convert", str(random_model / "calligrapher.bin"), str(first)]) == 0
    assert main(["convert", str(first), str(second)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(first), str(second)]
    wanted = adapter_state(random_model / "calligrapher.bin")
    found = adapter_state(second)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted | found)


def test_mistakes_are_one_line_each(random_model, tmp_path, capsys):
    source = str(random_model / "calligrapher.bin")
    there = tmp_path / "ip-adapter.bin"
    there.write_bytes(b"mine")
    for arguments, words in {
        (source, str(there)): "ip-adapter.bin must not be there yet. Use --force to replace it.",
        (source, str(tmp_path / "adapter.bin")): "must be a folder or be called ip-adapter.bin, ",
        (
            str(tmp_path / "none.bin"),
            str(tmp_path / "calligrapher.bin"),
        ): "An adapter file must exist.",
        (
            str(tmp_path / "no-run"),
            str(tmp_path / "calligrapher.bin"),
        ): "There is no weights file (.bin or .safetensors) of this name, and ",
    }.items():
        assert main(["convert", *arguments]) == 2
        said = capsys.readouterr().err
        assert words in said
        assert len(said.splitlines()) == 1
    assert there.read_bytes() == b"mine"
    assert main(["convert", source, str(there), "--force", "--dtype", "bfloat16"]) == 0
    assert {w.dtype for w in adapter_state(there).values()} == {torch.bfloat16}


def test_the_adapter_of_another_model_is_told_when_it_is_loaded(random_model, tmp_path):
    written = tmp_path / "calligrapher.bin"
    assert main(["convert", str(DATA / "calligrapher.bin"), str(written)]) == 0
    transformer = FluxTransformer2DModel.from_pretrained(random_model / "flux-fill/transformer")
    message = (
        r"must fit this model \(3 attention blocks of width 32\)[^?]*unexpected: attn_adapter\.3\."
    )
    with pytest.raises(CheckpointError, match=message):
        load_adapter(written, transformer)


def test_options_of_another_form_are_refused_by_their_names(tmp_path, capsys):
    source, target = str(DATA / "calligrapher.bin"), str(tmp_path / "out")
    assert main(["convert", source, target, "--to", "adapter-safetensors", "--lora", "merged"]) == 2
    assert "--lora must be left out: it says nothing of --to adapter-s" in capsys.readouterr().err
    assert main(["convert", source, f"{target}/calligrapher.bin", "--license", "mit"]) == 2
    assert "--license must be left out" in capsys.readouterr().err
    assert main(["convert", source, target, "--to", "adapter-safetensors"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/out/calligrapher.safetensors\n"
