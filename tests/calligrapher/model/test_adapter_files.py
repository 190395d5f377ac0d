"""Adapter files: every format is read, round trips are bit-exact, and what does not fit is
named."""

import pickle
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from calligrapher.errors import CheckpointError
from calligrapher.model.adapter_files import (
    adapter_state,
    config_of,
    load_adapter,
    read_tensors,
    split_state,
    write_calligrapher_bin,
    write_ip_adapter_bin,
)
from calligrapher.model.ip_adapter import AdapterConfig, StyleAdapter

WRITERS = [write_calligrapher_bin, write_ip_adapter_bin]
SUFFIXES = [".bin", ".safetensors"]


class Transformer:
    """As much of a transformer as an adapter must fit."""

    def __init__(self, blocks=3, width=24):
        self.attn_processors = dict.fromkeys(map(str, range(blocks)))
        self.inner_dim = width


@pytest.fixture
def state():
    torch.manual_seed(0)
    adapter = StyleAdapter(AdapterConfig(6, 16, 5, 3), num_blocks=3, inner_dim=24)
    return {name: torch.randn_like(tensor) for name, tensor in adapter.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a
    )


# --- formats ---


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_is_read_back_bit_by_bit(state, tmp_path, write, suffix, dtype):
    state = {k: v.to(dtype) for k, v in state.items()}
    path = tmp_path / "new folder" / f"adapter{suffix}"
    write(state, path)
    assert equal(adapter_state(path), state)
    adapter = load_adapter(path, Transformer(), dtype)
    assert equal(adapter.state_dict(), state)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_chain_of_conversions_ends_where_it_began(state, tmp_path):
    path = tmp_path / "0.bin"
    write_calligrapher_bin(state, path)
    for i, (write, suffix) in enumerate([(w, s) for w in WRITERS for s in SUFFIXES], start=1):
        following = tmp_path / f"{i}{suffix}"
        write(adapter_state(path), following)
        path = following
    write_calligrapher_bin(adapter_state(path), tmp_path / "last.bin")
    assert equal(adapter_state(tmp_path / "last.bin"), state)
    assert (tmp_path / "last.bin").read_bytes() == (tmp_path / "0.bin").read_bytes()


def test_the_released_format_has_the_public_keys(state, tmp_path):
    write_calligrapher_bin(state, tmp_path / "calligrapher.bin")
    content = torch.load(tmp_path / "calligrapher.bin", weights_only=True)
    assert list(content) == ["image_proj_mlp", "image_proj_qformer", "attn_adapter"]
    assert list(content["attn_adapter"]) == [
        f"{i}.to_{kind}_ip.weight" for i in range(3) for kind in "kv"
    ]
    assert content["image_proj_qformer"]["query_embeds"].shape == (5, 16)


def test_the_safetensors_twin_has_the_same_names_with_a_dot(state, tmp_path):
    write_calligrapher_bin(state, tmp_path / "calligrapher.safetensors")
    assert equal(load_file(tmp_path / "calligrapher.safetensors"), state)


def test_the_training_format_gives_the_mlp_its_public_place(state, tmp_path):
    write_ip_adapter_bin(state, tmp_path / "ip-adapter.bin")
    content = torch.load(tmp_path / "ip-adapter.bin", weights_only=True)
    assert set(content) == {"image_proj", "image_proj_qformer", "ip_adapter"}
    mlp = nn.Module()
    mlp.proj = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 5 * 16))
    mlp.norm = nn.LayerNorm(16)
    mlp.load_state_dict(content["image_proj"], strict=True)
    assert torch.equal(mlp.proj[2].weight, state["image_proj_mlp.proj.2.weight"])


def public_modules():
    """Modules with the public names; attention processors in one list, as in public code."""

    def block():
        processor = nn.Module()
        processor.to_k_ip = nn.Linear(16, 24, bias=False)
        processor.to_v_ip = nn.Linear(16, 24, bias=False)
        return processor

    qformer = nn.Module()
    qformer.query_embeds = nn.Parameter(torch.zeros(5, 16))
    qformer.id_proj = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 3 * 16))
    qformer.cross_attn = nn.MultiheadAttention(16, 8, batch_first=True)
    qformer.cross_attn_norm = nn.LayerNorm(16)
    qformer.norm = nn.LayerNorm(16)
    mlp = nn.Module()
    mlp.proj = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 5 * 16))
    mlp.norm = nn.LayerNorm(16)
    return {
        "image_proj_mlp": mlp,
        "image_proj_qformer": qformer,
        "attn_adapter": nn.ModuleList(block() for _ in range(3)),
    }


def test_our_file_loads_strictly_into_modules_with_the_public_names(state, tmp_path):
    write_calligrapher_bin(state, tmp_path / "calligrapher.bin")
    content = torch.load(tmp_path / "calligrapher.bin", weights_only=True)
    for name, module in public_modules().items():
        module.load_state_dict(content[name], strict=True)
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, state[f"{name}.{key}"])


def test_public_modules_with_our_file_make_the_same_style_tokens(state, tmp_path):
    write_calligrapher_bin(state, tmp_path / "calligrapher.bin")
    content = torch.load(tmp_path / "calligrapher.bin", weights_only=True)
    modules = public_modules()
    for name, module in modules.items():
        module.load_state_dict(content[name], strict=True)
    mlp, qformer = modules["image_proj_mlp"], modules["image_proj_qformer"]
    style = torch.randn(2, 6)
    with torch.no_grad():
        tokens = mlp.norm(mlp.proj(style).reshape(2, 5, 16))
        read, queries = (
            qformer.id_proj(style).reshape(2, 3, 16),
            qformer.query_embeds[None].repeat(2, 1, 1),
        )
        attended, _ = qformer.cross_attn(queries, read, read)
        tokens = tokens + qformer.norm(qformer.cross_attn_norm(attended + queries))
        ours = load_adapter(tmp_path / "calligrapher.bin", Transformer()).tokens(style)
    torch.testing.assert_close(tokens, ours, rtol=1e-5, atol=1e-5)


def test_a_file_that_public_modules_saved_is_read(tmp_path):
    modules = public_modules()
    torch.save({name: module.state_dict() for name, module in modules.items()}, tmp_path / "c.bin")
    adapter = load_adapter(tmp_path / "c.bin", Transformer())
    for name, module in modules.items():
        assert equal(dict(getattr(adapter, name).state_dict()), dict(module.state_dict()))


@pytest.mark.parametrize(
    "names", [("image_proj_mlp", "attn_adapter"), ("image_proj", "ip_adapter")]
)
def test_a_file_without_a_qformer_is_reported_and_its_share_is_zero(state, tmp_path, caplog, names):
    nested = split_state(state)
    torch.save(
        dict(zip(names, (nested["image_proj_mlp"], nested["attn_adapter"]), strict=True)),
        tmp_path / "o",
    )
    adapter = load_adapter(tmp_path / "o", Transformer())
    assert "has no QFormer: its share of the style tokens is zero" in caplog.text
    style = torch.randn(2, 6)
    assert torch.equal(adapter.tokens(style), adapter.image_proj_mlp(style))
    write_ip_adapter_bin(adapter.state_dict(), tmp_path / "again.bin")
    assert set(torch.load(tmp_path / "again.bin", weights_only=True)) == {
        "image_proj",
        "ip_adapter",
    }


def test_prefixed_keys_below_image_proj_and_queries_with_a_batch_dimension_are_understood(
    state, tmp_path
):
    nested = split_state(state)
    joint = {f"mlp.{k}": v for k, v in nested["image_proj_mlp"].items()}
    joint |= {f"qformer.{k}": v for k, v in nested["image_proj_qformer"].items()}
    joint["qformer.query_embeds"] = joint["qformer.query_embeds"][None]
    torch.save({"image_proj": joint, "ip_adapter": nested["attn_adapter"]}, tmp_path / "a.bin")
    assert equal(load_adapter(tmp_path / "a.bin", Transformer()).state_dict(), state)


def test_an_ordered_dict_and_the_file_format_of_old_torch_are_read(state, tmp_path):
    nested = OrderedDict((k, OrderedDict(v)) for k, v in split_state(state).items())
    torch.save(nested, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert equal(adapter_state(tmp_path / "old.bin"), state)


def test_the_sizes_follow_from_the_shapes(state):
    assert config_of(state) == AdapterConfig(6, 16, 5, 3)


def test_weights_are_converted_when_asked_and_never_tied_to_the_file(state, tmp_path):
    for suffix in SUFFIXES:
        path = tmp_path / f"a{suffix}"
        write_calligrapher_bin(state, path)
        adapter = load_adapter(path, Transformer())
        with path.open("r+b") as file:  # In place, as a careless copy would.
            file.write(b"\0" * path.stat().st_size)
        assert equal(adapter.state_dict(), state)
    write_calligrapher_bin({k: v.half() for k, v in state.items()}, tmp_path / "half.bin")
    adapter = load_adapter(tmp_path / "half.bin", Transformer())
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}


def test_lora_weights_and_bigger_storages_stay_out_of_the_file(state, tmp_path):
    write_calligrapher_bin(state, tmp_path / "a.bin")
    wide = torch.randn(100, 5, 16)
    queries = "image_proj_qformer.query_embeds"
    sliced = state | {queries: wide[7], "transformer.x.lora_A.weight": torch.randn(4)}
    write_calligrapher_bin(sliced, tmp_path / "b.bin")
    assert (tmp_path / "b.bin").stat().st_size == (tmp_path / "a.bin").stat().st_size
    assert equal(adapter_state(tmp_path / "b.bin"), state | {queries: wide[7]})


def test_equal_weights_give_equal_bytes_whatever_the_name(state, tmp_path):
    for suffix in SUFFIXES:
        for name in ("one", "another"):
            write_ip_adapter_bin(state, tmp_path / f"{name}{suffix}")
        assert (tmp_path / f"one{suffix}").read_bytes() == (
            tmp_path / f"another{suffix}"
        ).read_bytes()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(state, tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    write_calligrapher_bin(state, path)
    before = path.read_bytes()

    def disk_full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_calligrapher_bin(state, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# --- the files of a run ---


def test_an_adapter_that_a_run_trained_whole_is_read_from_its_file(state, tmp_path, caplog):
    path = tmp_path / "trained.safetensors"
    save_file({f"adapter.{name}": tensor for name, tensor in state.items()}, path)
    assert equal(adapter_state(path), state)
    assert not caplog.text
    pair = {f"transformer.x.lora_{k}.default.weight": torch.ones(2, 2) for k in "AB"}
    save_file({f"adapter.{name}": tensor for name, tensor in state.items()} | pair, path)
    assert equal(load_adapter(path, Transformer()).state_dict(), state)
    assert "also holds LoRA of the transformer. Only its adapter is read." in caplog.text


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["transformer.x.lora_A.default.weight"], "It holds none"),
        (["adapter.attn_adapter.0.to_k_ip.lora_A.default.weight"], "It holds LoRA pairs of one"),
    ],
)
def test_a_runs_file_without_a_whole_adapter_says_how_to_get_one(tmp_path, names, found):
    path = tmp_path / "ema.safetensors"
    save_file({name: torch.ones(2, 2) for name in names}, path)
    with pytest.raises(
        CheckpointError, match=rf"must hold a whole adapter. {found}.*convert ARTIFACT"
    ):
        adapter_state(path)


@pytest.mark.parametrize("part", ["flux-fill/transformer", "siglip", "flux-fill/vae"])
def test_another_part_of_the_model_is_not_taken_for_an_adapter(random_model, part):
    file = next((random_model / part).glob("*.safetensors"))
    with pytest.raises(
        CheckpointError, match=r"missing: image_proj_mlp or image_proj, [^\n]*\n  unexpected: \w"
    ):
        adapter_state(file)


def test_a_files_unknown_keys_are_named(state, tmp_path):
    nested = split_state(state)
    nested["image_proj_mlp"]["proj.9.weight"] = nested["attn_adapter"]["0.to_q_ip.weight"] = (
        torch.zeros(2)
    )
    torch.save(nested, tmp_path / "a.bin")
    unknown = r"unexpected: attn_adapter\.0\.to_q_ip\.weight, image_proj_mlp\.proj\.9\.weight\n"
    with pytest.raises(CheckpointError, match=unknown):
        load_adapter(tmp_path / "a.bin", Transformer())


# --- what does not fit ---


def test_missing_unexpected_and_misshaped_keys_are_listed(state, tmp_path):
    del state["image_proj_mlp.norm.bias"]
    state["attn_adapter.3.to_k_ip.weight"] = torch.zeros(24, 16)
    state["attn_adapter.1.to_v_ip.weight"] = torch.zeros(24, 17)
    write_calligrapher_bin(state, tmp_path / "a.bin")
    with pytest.raises(CheckpointError) as caught:
        load_adapter(tmp_path / "a.bin", Transformer())
    message = str(caught.value)
    assert "a.bin must fit this model (3 attention blocks of width 24)" in message
    assert "missing: image_proj_mlp.norm.bias\n" in message
    assert "unexpected: attn_adapter.3.to_k_ip.weight\n" in message
    assert "wrong shape: attn_adapter.1.to_v_ip.weight: must be [24, 16], is [24, 17]" in message


def test_an_adapter_for_a_deeper_or_wider_model_is_refused(state, tmp_path):
    write_calligrapher_bin(state, tmp_path / "a.bin")
    with pytest.raises(
        CheckpointError, match=r"missing: attn_adapter\.3\.to_k_ip\.weight, attn_adapter\.3"
    ):
        load_adapter(tmp_path / "a.bin", Transformer(blocks=4))
    with pytest.raises(CheckpointError, match=r"must be \[32, 16\], is \[24, 16\]"):
        load_adapter(tmp_path / "a.bin", Transformer(width=32))


def test_queries_with_a_real_batch_are_misshaped_not_cut(state, tmp_path):
    state["image_proj_qformer.query_embeds"] = torch.zeros(2, 5, 16)
    write_calligrapher_bin(state, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match=r"query_embeds: must be \[5, 16\], is \[2, 5, 16\]"):
        load_adapter(tmp_path / "a.bin", Transformer())


@pytest.mark.parametrize("name", ["proj.0.weight", "proj.2.weight", "norm.weight"])
@pytest.mark.parametrize("value", [None, torch.zeros(()), torch.zeros(0, 4), torch.zeros(2, 2, 2)])
def test_an_mlp_that_gives_no_sizes_is_refused(state, name, value):
    key = f"image_proj_mlp.{name}"
    state.pop(key)
    if value is not None:
        state[key] = value
    with pytest.raises(CheckpointError, match=f"Missing or of another shape: {key}"):
        config_of(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: n.pop("attn_adapter"), "missing: attn_adapter or ip_adapter"),
        (lambda n: n.pop("image_proj_mlp"), "missing: image_proj_mlp or image_proj"),
        (lambda n: n.update(attn_adapter={}), "missing: attn_adapter or ip_adapter"),
        (lambda n: n.update(optimizer={"a": torch.zeros(1)}), "unexpected: optimizer"),
        (
            lambda n: n.update(image_proj=n["image_proj_mlp"]),
            r"twice: image_proj\.norm\.bias, image_proj\.norm\.weight, ",
        ),
    ],
)
def test_parts_that_are_missing_unknown_or_there_twice_are_named(state, tmp_path, change, message):
    nested = split_state(state)
    change(nested)
    torch.save(nested, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match=message):
        adapter_state(tmp_path / "a.bin")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (torch.zeros(3), "a Tensor"),
        ([1, 2], "a list"),
        ({"proj.0.weight": torch.zeros(2)}, r"the keys proj\.0\.weight"),
        ({"image_proj": {"a": 1}}, "the keys image_proj"),
        ({1: {2: torch.zeros(1)}}, "the keys 1"),
    ],
)
def test_a_file_that_holds_something_else_says_what(tmp_path, content, found):
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(
        CheckpointError, match=rf"must hold tensors below top keys .* Found {found}"
    ):
        read_tensors(tmp_path / "a.bin")


def test_another_models_safetensors_file_is_refused(tmp_path):
    save_file(
        {"blocks.0.weight": torch.zeros(2), "bias": torch.zeros(1)}, tmp_path / "a.safetensors"
    )
    with pytest.raises(CheckpointError, match="unexpected: bias, blocks"):
        adapter_state(tmp_path / "a.safetensors")


# --- damaged and hostile files ---


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_truncated_file_is_refused_wherever_it_ends(state, tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write_calligrapher_bin(state, path)
    whole = path.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, *range(200, len(whole), len(whole) // 23), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(
            CheckpointError, match=r"must be a whole weights file .* Reading it gave: \S"
        ):
            read_tensors(path)


@pytest.mark.parametrize("content", [b"<html>Not found</html>", b"\x80", b"PK\x03\x04", b"\0" * 64])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_another_kind_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="must be a whole weights file"):
        read_tensors(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.bin", tmp_path):
        with pytest.raises(CheckpointError, match="An adapter file must exist"):
            read_tensors(path)


def test_a_whole_module_is_told_by_its_class_and_not_to_be_trusted(tmp_path):
    torch.save(torch.nn.Linear(2, 3), tmp_path / "a.bin")
    with pytest.raises(CheckpointError) as caught:
        read_tensors(tmp_path / "a.bin")
    assert str(caught.value) == (
        f"{tmp_path}/a.bin must be a whole weights file that holds nothing but tensors. Reading it"
        " gave: a pickled torch.nn.modules.linear.Linear. Nothing in it was executed."
    )


class Payload:
    """Writes a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("way", ["zip", "old torch", "plain pickle"])
def test_a_pickle_payload_is_refused_and_never_executed(tmp_path, way):
    marker, path = tmp_path / "executed", tmp_path / "a.bin"
    content = {"image_proj_mlp": {"proj.0.weight": torch.zeros(1)}, "attn_adapter": Payload(marker)}
    if way == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=way == "zip")
    with pytest.raises(CheckpointError, match="Nothing in it was executed") as caught:
        read_tensors(path)
    assert not marker.exists()
    assert "weights_only" not in str(caught.value)
    if way == "plain pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert marker.exists()  # The payload works: it was our reader that did not run it.
