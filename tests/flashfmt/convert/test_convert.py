"""Whole conversions: every architecture, encoding and container, read back and compared with the source's weights."""

import json
import shutil

import numpy as np
import pytest

import flashfmt
from flashfmt.convert import convert
from flashfmt.encodings import Encoding
from flashfmt.errors import CheckpointError, FlashError

VARIANTS = [
    "bamboo", "drelu", "llama", "llama_biases", "llama_head_dim", "llama_relu", "llama_rope_linear",
    "llama_rope_llama3", "llama_rope_yarn", "llama_tied", "mistral", "mistral_no_window", "opt", "opt_no_bias",
    "opt_no_final_norm", "opt_plain_norm", "opt_post_norm_projected", "opt_untied", "prosparse", "qwen2",
    "qwen2_sliding", "qwen3", "qwen3_biases", "smollm3", "smollm3_no_rope",
]  # fmt: skip

ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
LLAMA_LAYER = {
    **{f"attention/{ours}": f"self_attn.{theirs}" for ours, theirs in ATTENTION.items()},
    "attention/output": "self_attn.o_proj",
    "attention/norm": "input_layernorm",
    "attention/q_norm": "self_attn.q_norm",
    "attention/k_norm": "self_attn.k_norm",
    "ffn/norm": "post_attention_layernorm",
}
OPT_LAYER = {
    **{f"attention/{ours}": f"self_attn.{theirs}" for ours, theirs in ATTENTION.items()},
    "attention/output": "self_attn.out_proj",
    "attention/norm": "self_attn_layer_norm",
    "ffn/norm": "final_layer_norm",
}
LLAMA_TOP = {
    "embedding/tokens": "model.embed_tokens.weight",
    "final_norm/weight": "model.norm.weight",
    "logits/weight": "lm_head.weight",
}
OPT_TOP = {
    "embedding/tokens": "model.decoder.embed_tokens.weight",
    "embedding/positions": "model.decoder.embed_positions.weight",
    "embedding/projection_in": "model.decoder.project_in.weight",
    "embedding/projection_out": "model.decoder.project_out.weight",
    "final_norm/weight": "model.decoder.final_layer_norm.weight",
    "final_norm/bias": "model.decoder.final_layer_norm.bias",
    "logits/weight": "lm_head.weight",
}
LLAMA_BIASES = {f"mlp.{part}_proj.bias": f"{part}_bias" for part in ("gate", "up", "down")}
OPT_BIASES = {"fc1.bias": "up_bias", "fc2.bias": "down_bias"}


def resident_arrays(state, n_layers):
    """Every resident array that the oracle's weights call for: our name -> values, spelled out independently."""
    is_opt = any(".decoder." in name for name in state)
    prefix = "model.decoder.layers" if is_opt else "model.layers"
    wanted = dict(OPT_TOP if is_opt else LLAMA_TOP)
    for layer in range(n_layers):
        for ours, theirs in (OPT_LAYER if is_opt else LLAMA_LAYER).items():
            for kind in ("weight", "bias"):
                wanted[f"layers/{layer}/{ours}/{kind}"] = f"{prefix}.{layer}.{theirs}.{kind}"
        for theirs, ours in (OPT_BIASES if is_opt else LLAMA_BIASES).items():
            wanted[f"layers/{layer}/ffn/{ours}"] = f"{prefix}.{layer}.{theirs}"
    return {ours: state[theirs].numpy() for ours, theirs in wanted.items() if theirs in state}


def bundles(state, layer):
    """Bundles of a layer, float32 [d_ff, parts, d_model]."""
    if any(".decoder." in name for name in state):
        mlp = f"model.decoder.layers.{layer}."
        parts = [state[mlp + "fc1.weight"], state[mlp + "fc2.weight"].T]
    else:
        mlp = f"model.layers.{layer}.mlp."
        parts = [state[mlp + "gate_proj.weight"], state[mlp + "up_proj.weight"], state[mlp + "down_proj.weight"].T]
    return np.stack([part.numpy() for part in parts], axis=1)


def largest_error(encoding, values):
    """Bound of a quantised encoding's error: half a step of the row's, or group's, scale."""
    peak = np.abs(values).max()
    return {Encoding.F16: peak * 2**-11, Encoding.BF16: peak * 2**-8, Encoding.Q8: peak / 127, Encoding.Q4: peak / 8}[
        encoding
    ]


def state_of(oracle, decoder):
    state = {name: tensor for name, tensor in oracle.state_dict().items() if "rotary" not in name}
    if decoder.logits.tied:
        del state["lm_head.weight"]
    return state


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_architecture_keeps_its_weights(tiny_checkpoint, tmp_path, variant, dtype):
    path, oracle = tiny_checkpoint(variant, dtype)
    report = convert(path, tmp_path / "m.flash")
    encoding = Encoding.F32 if dtype == "float32" else Encoding.BF16
    with flashfmt.open(tmp_path / "m.flash") as model:
        model.verify()
        state = state_of(oracle, model.decoder)
        expected = resident_arrays(state, model.decoder.n_layers)
        made = {name for name in model.tensors if not name.endswith("bundle_crc32c")} - set(expected)
        assert made == {f"rotary/{table.name}" for table in model.decoder.rotary}
        assert set(expected) <= set(model.tensors)
        for name, values in expected.items():
            stored = model.tensor(name)
            np.testing.assert_array_equal(stored.decode(), values, err_msg=name)
            assert stored.encoding is (encoding if values.ndim == 2 else Encoding.F32)
        for layer in range(model.decoder.n_layers):
            wanted = bundles(state, layer)
            np.testing.assert_array_equal(model.bundles(layer).decode(np.arange(len(wanted))), wanted)
        if model.decoder.rotary:
            rotary = oracle.model.rotary_emb
            np.testing.assert_allclose(model.tensor("rotary/main").decode(), rotary.inv_freq.numpy(), rtol=5e-7)
        assert model.file("config") == (path / "config.json").read_bytes()
        assert model.file("tokenizer") == (path / "tokenizer.json").read_bytes()
        assert model.file("chat_template") is not None
        assert report.n_parameters == sum(tensor.numel() for tensor in state.values())
        assert report.nbytes == model.nbytes
        assert report.bundle_encoding is encoding
        assert not report.resumed


@pytest.mark.parametrize("container", ["file", "directory"])
@pytest.mark.parametrize("encoding", ["f16", "bf16", "q8", "q4"])
@pytest.mark.parametrize("variant", ["llama", "opt"])
def test_every_encoding_stays_within_its_bound(tiny_checkpoint, tmp_path, variant, encoding, container):
    path, oracle = tiny_checkpoint(variant)
    target = tmp_path / "converted"
    convert(path, target, encoding=encoding, residents=encoding, container=container)
    with flashfmt.open(target) as model:
        model.verify()
        assert model.container == container
        state = state_of(oracle, model.decoder)
        for layer in range(model.decoder.n_layers):
            wanted = bundles(state, layer)
            read = model.bundles(layer).decode(np.arange(len(wanted)))
            assert np.abs(read - wanted).max() <= largest_error(Encoding(encoding), wanted)
        for name, values in resident_arrays(state, model.decoder.n_layers).items():
            stored = model.tensor(name)
            if values.ndim == 1:
                assert stored.encoding is Encoding.F32
                np.testing.assert_array_equal(stored.decode(), values)
            elif name == "embedding/positions" and encoding in ("q8", "q4"):
                assert stored.encoding is Encoding.F32
            else:
                assert stored.encoding is Encoding(encoding)
                assert np.abs(stored.decode() - values).max() <= largest_error(Encoding(encoding), values), name


def test_rows_that_do_not_fit_a_quantised_encoding_are_refused_by_name(tiny_checkpoint, tmp_path):
    path, _ = tiny_checkpoint("opt_post_norm_projected")
    with pytest.raises(CheckpointError, match=r"embedding/tokens: rows do not fit q8; choose residents=f16"):
        convert(path, tmp_path / "m.flash", residents="q8")
    convert(path, tmp_path / "m.flash", encoding="q4", residents="f16")


@pytest.fixture
def edited(tiny_checkpoint, checkpoints, tmp_path):
    """A function (variant, drop=(), add={}, **config) -> copy of a checkpoint with tensors and config keys changed."""
    from safetensors.torch import load_file, save_file

    def edit(variant, drop=(), add=None, **config):
        path = tmp_path / "edited"
        shutil.copytree(tiny_checkpoint(variant)[0], path)
        checkpoints.edit_json(path / "config.json", **config)
        tensors = load_file(path / "model.safetensors")
        tensors = {name: tensor.clone() for name, tensor in tensors.items() if name not in drop}
        for name, change in (add or {}).items():
            tensors[name] = change(tensors).clone().contiguous()
        save_file(tensors, path / "model.safetensors")
        return path

    return edit


def test_tensors_must_be_those_of_the_architecture(edited, tmp_path):
    norm = "model.layers.1.input_layernorm.weight"
    with pytest.raises(CheckpointError, match=f"missing tensors: {norm}"):
        convert(edited("llama", drop=[norm]), tmp_path / "m.flash")
    shutil.rmtree(tmp_path / "edited")
    with pytest.raises(CheckpointError, match=r"lm_head.weight: missing .* not declared tied"):
        convert(edited("llama", drop=["lm_head.weight"]), tmp_path / "m.flash")
    shutil.rmtree(tmp_path / "edited")
    extra = {"model.layers.0.self_attn.sinks": lambda tensors: tensors[norm]}
    with pytest.raises(CheckpointError, match=r"unexpected tensors.*: model.layers.0.self_attn.sinks"):
        convert(edited("llama", add=extra), tmp_path / "m.flash")
    shutil.rmtree(tmp_path / "edited")
    with pytest.raises(CheckpointError, match=r"gate_proj.weight: .*expected \[96, 64\], got \[128, 64\]"):
        convert(edited("llama", intermediate_size=96), tmp_path / "m.flash")
    assert not (tmp_path / "m.flash").exists()


def test_rotary_buffers_and_equal_copies_are_ignored(edited, tmp_path):
    add = {
        "lm_head.weight": lambda tensors: tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": lambda tensors: tensors["model.norm.weight"][:8],
    }
    convert(edited("llama_tied", add=add), tmp_path / "m.flash")
    with flashfmt.open(tmp_path / "m.flash") as model:
        assert "logits/weight" not in model.tensors


def test_a_copy_that_differs_is_refused(edited, tmp_path):
    add = {"lm_head.weight": lambda tensors: tensors["model.embed_tokens.weight"] + 1}
    with pytest.raises(CheckpointError, match=r"lm_head.weight: differs from model.embed_tokens.weight"):
        convert(edited("llama_tied", add=add), tmp_path / "m.flash")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_weights_that_are_not_finite_are_refused_by_name(edited, tmp_path, name):
    def spoil(tensors):
        tensors[name].view(-1)[5] = float("nan")
        return tensors[name]

    with pytest.raises(CheckpointError, match=rf"{name}: not a finite weight .*index \[(0, )?5\]") as caught:
        convert(edited("llama", add={name: spoil}), tmp_path / "m.flash")
    assert caught.value.path == tmp_path / "edited"
    assert not list(tmp_path.glob("m.flash*")), "nothing of a refused source is left"


def test_a_base_model_without_prefix(edited, tmp_path):
    path = edited("llama_tied")
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, path / "model.safetensors")
    convert(path, tmp_path / "m.flash")
    with flashfmt.open(tmp_path / "m.flash") as model:
        expected = tensors["model.norm.weight"].numpy()
        np.testing.assert_array_equal(model.tensor("final_norm/weight").decode(), expected)


def test_shards_make_the_same_file(tiny_checkpoint, checkpoints, tmp_path):
    path, _ = tiny_checkpoint("qwen3")
    checkpoints.build(tmp_path / "sharded", "qwen3", max_shard_size="100KB")
    checkpoints.write_tokenizer(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    convert(path, tmp_path / "whole.flash")
    convert(tmp_path / "sharded", tmp_path / "sharded.flash")
    with flashfmt.open(tmp_path / "whole.flash") as one, flashfmt.open(tmp_path / "sharded.flash") as other:
        assert {name: info.crc32c for name, info in one.tensors.items()} == {
            name: info.crc32c for name, info in other.tensors.items()
        }
        assert [layer.crc32c for layer in one.layers] == [layer.crc32c for layer in other.layers]


def test_progress_counts_up_to_the_whole(tiny_checkpoint, tmp_path):
    seen = []
    convert(tiny_checkpoint("llama")[0], tmp_path / "m.flash", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def test_an_interrupted_conversion_resumes_to_the_same_bytes(tiny_checkpoint, tmp_path):
    path, _ = tiny_checkpoint("llama")
    convert(path, tmp_path / "whole.flash")

    class InterruptionError(Exception):
        pass

    def interrupt(done, total):
        if done > total * 0.6:
            raise InterruptionError

    target = tmp_path / "m.flash"
    with pytest.raises(InterruptionError):
        convert(path, target, name=path.name, progress=interrupt)
    assert not target.exists()
    report = convert(path, target, name=path.name)
    assert report.resumed
    assert target.read_bytes() == (tmp_path / "whole.flash").read_bytes()


def test_an_existing_target_is_kept_unless_overwritten(tiny_checkpoint, tmp_path):
    target = tmp_path / "m.flash"
    target.write_bytes(b"precious")
    with pytest.raises(FlashError):
        convert(tiny_checkpoint("llama")[0], target)
    assert target.read_bytes() == b"precious"
    convert(tiny_checkpoint("llama")[0], target, overwrite=True)
    flashfmt.open(target).close()


def test_the_manifest_says_where_the_weights_come_from(tiny_checkpoint, tmp_path):
    path, _ = tiny_checkpoint("prosparse")
    convert(path, tmp_path / "m.flash", name="tiny")
    with flashfmt.open(tmp_path / "m.flash") as model:
        assert model.manifest.name == "tiny"
        provenance = model.manifest.provenance
        assert provenance.source == path.name
        assert provenance.source_format == "safetensors"
        assert provenance.architecture == "SparseLlamaForCausalLM"
        assert provenance.writer == f"flashfmt {flashfmt.__version__}"
        assert model.manifest.tokens.bos == 1
        assert model.manifest.tokens.eos == (2,)
        assert model.decoder.ffn.activation.threshold == 0.01


def test_a_gguf_converts(smollm2, tmp_path):
    from flashfmt.convert import open_checkpoint

    report = convert(smollm2, tmp_path / "m.flash")
    assert report.bundle_encoding is Encoding.F16
    checkpoint = open_checkpoint(smollm2)
    with flashfmt.open(tmp_path / "m.flash") as model:
        assert model.manifest.tokens.eos == (2,)
        assert json.loads(model.file("tokenizer"))["model"]["type"] == "BPE"
        source = checkpoint.read("model.layers.7.mlp.down_proj.weight").data
        neurons = np.array([0, 77, 1535])
        down = model.bundles(7).decode(neurons)[:, 2]
        np.testing.assert_array_equal(down, source[:, neurons].T.astype(np.float16).astype(np.float32))
    checkpoint.close()
