"""Weights for other programs: each format is loaded by the library that it is made for."""

import json

import pytest
import torch
from diffusers import FluxFillPipeline
from safetensors import safe_open
from small_runs import rewrite_average
from velocities import velocity

from calligrapher.errors import ParamsError
from calligrapher.model.adapter_files import adapter_state, load_adapter
from tasks.weights.convert import convert
from tasks.weights.exports import export

ONE_ROUND = {
    "rounds": 1,
    "warmup": {"steps": 0},
    "rollout": {"num_cases": 2, "num_images_per_prompt": 2},
}
LORA = {
    "train_adapter": True,
    "lora": {"rank": 2, "alpha": 3.0, "targets": ["transformer_blocks.0.attn.to_k", "ff.net.2"]},
}


def header(path):
    with safe_open(path, framework="pt") as content:
        return content.metadata()


@pytest.mark.parametrize("to", ["diffusers-lora", "kohya-lora"])
def test_the_pipeline_with_an_exported_lora_and_adapter_has_the_trained_velocity(
    train, make_resources, random_model, tmp_path, to
):
    folder, _ = train("tuned", **ONE_ROUND, model=LORA)
    policy = make_resources(**ONE_ROUND, model=LORA).model.policy
    weights = {n: torch.randn(w.shape) * 0.2 for n, w in policy.snapshot().items()}
    rewrite_average(folder / "round-0000/update", weights)
    policy.load(weights)
    wanted = velocity(policy.model.transformer, policy.model.adapter)

    lora = export("tuned", str(tmp_path / "out"), to, runs_dir=tmp_path)
    adapter = export("tuned", str(tmp_path / "out"), "adapter-safetensors", runs_dir=tmp_path)
    pipeline = FluxFillPipeline.from_pretrained(random_model / "flux-fill")
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    transformer = pipeline.transformer.eval()
    found = velocity(transformer, load_adapter(adapter, transformer))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert header(lora)["calligrapher.run"] == "tuned"


def test_an_adapter_says_in_its_header_what_it_is(train, random_model, tmp_path):
    folder, _ = train("plain", **ONE_ROUND, evaluate={"every": 1})
    out = export(
        "plain", str(tmp_path / "mine.safetensors"), "adapter-safetensors", runs_dir=tmp_path
    )
    (twin,) = convert(str(folder), str(tmp_path / "calligrapher.safetensors"))
    assert all(torch.equal(w, adapter_state(twin)[n]) for n, w in adapter_state(out).items())
    found = header(out)
    manifest = json.loads((folder / "round-0000/update/artifact.json").read_text())
    assert found["calligrapher.digest"] == manifest["files"]["ema.safetensors"]["sha256"]
    assert found["calligrapher.base"] == str(random_model / "flux-fill")
    assert found["calligrapher.rounds"] == "1"
    measured = json.loads((folder / "round-0000/evaluate/metrics.json").read_text())
    scores = json.loads(found["calligrapher.scores"])
    assert scores["after"]["reward"]["mean"] == measured["reward"]
    assert scores["before"]["reward"]["low"] <= scores["before"]["reward"]["mean"]


def test_a_file_without_a_run_keeps_its_digest_alone(random_model, tmp_path):
    source = str(random_model / "calligrapher.bin")
    out = export(source, str(tmp_path), "adapter-safetensors")
    assert out == tmp_path / "calligrapher.safetensors"
    assert list(header(out)) == ["calligrapher.digest"]


def test_lora_of_a_run_without_it_is_refused_and_nothing_is_replaced_unasked(
    train, random_model, tmp_path
):
    train("plain", **ONE_ROUND)
    for source in ("plain", str(random_model / "calligrapher.bin")):
        with pytest.raises(ParamsError, match="kohya-lora needs a run that trained LoRA"):
            export(source, str(tmp_path / "out"), "kohya-lora", runs_dir=tmp_path)
    assert not (tmp_path / "out").exists()
    there = tmp_path / "calligrapher.safetensors"
    there.write_bytes(b"mine")
    with pytest.raises(ParamsError, match="must not be there yet"):
        export("plain", str(tmp_path), "adapter-safetensors", runs_dir=tmp_path)
    assert there.read_bytes() == b"mine"
    export("plain", str(tmp_path), "adapter-safetensors", runs_dir=tmp_path, force=True)
    assert adapter_state(there)
