"""The parts of the comparison that could be wrong without anybody noticing: weights, limits, groups, ratios."""

import numpy as np
import pytest

import flashfmt
from flashfmt.convert import convert
from reference_engine.synthetic import Shape

LLAMA = Shape("llama-tiny", 2, 64, 96, 4, 2, 128, plain=False, tied=False)
OPT = Shape("opt-tiny", 2, 64, 128, 4, 4, 128, plain=True, tied=True, context_tokens=32)


def run(contender, seconds, *, number=0, session="a", is_ours=False, **more):
    return {
        "case": "x",
        "contender": contender,
        "is_ours": is_ours,
        "session": session,
        "round": number,
        "limit": None,
        "model_bytes": 1,
        "seconds_per_token": seconds,
        "first_token_seconds": 1.0,
        "bytes_read_per_token": None,
        "peak_process_bytes": 1,
        "peak_cgroup_bytes": None,
        **more,
    }


def test_llama_weights_are_the_same_in_flash_and_in_gguf(comparison, tmp_path):
    from comparison.checkpoint_files import write_checkpoint
    from comparison.gguf_files import write_gguf
    from gguf import GGUFReader

    write_checkpoint(tmp_path / "hf", LLAMA)
    write_gguf(tmp_path / "m.gguf", LLAMA, "f16")
    convert(tmp_path / "hf", tmp_path / "m.flash")
    theirs = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    with flashfmt.open(tmp_path / "m.flash") as ours:
        for layer in range(LLAMA.n_layers):
            gate, up, down = ours.bundles(layer).decode(range(LLAMA.d_ff)).swapaxes(0, 1)
            np.testing.assert_array_equal(gate, theirs[f"blk.{layer}.ffn_gate.weight"])
            np.testing.assert_array_equal(up, theirs[f"blk.{layer}.ffn_up.weight"])
            np.testing.assert_array_equal(down.T, theirs[f"blk.{layer}.ffn_down.weight"])
            for ours_name, theirs_name, n_heads in (("q", "attn_q", 4), ("k", "attn_k", 2), ("v", "attn_v", None)):
                weight = ours.tensor(f"layers/{layer}/attention/{ours_name}/weight").decode()
                if n_heads is not None:  # GGUF has pairs side by side, the checkpoint the halves of a head
                    weight = weight.reshape(n_heads, 2, 8, 64).swapaxes(1, 2).reshape(-1, 64)
                np.testing.assert_array_equal(weight, theirs[f"blk.{layer}.{theirs_name}.weight"])
        for ours_name, theirs_name in (("embedding/tokens", "token_embd"), ("logits/weight", "output")):
            np.testing.assert_array_equal(ours.tensor(ours_name).decode(), theirs[f"{theirs_name}.weight"])


@pytest.mark.parametrize("gguf_type", ["f16", "q8_0", "q4_0"])
def test_an_opt_shape_becomes_a_gpt2_of_the_same_matrices(comparison, tmp_path, gguf_type):
    from comparison.gguf_files import write_gguf
    from comparison.weights import Weights, tensors
    from gguf import GGUFReader
    from gguf.quants import dequantize

    write_gguf(tmp_path / "m.gguf", OPT, gguf_type)
    by_name = {tensor.name: tensor for tensor in tensors(OPT)}
    reader = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    tensor = reader["blk.1.attn_qkv.weight"]
    assert tuple(tensor.shape) == (64, 3 * 64)
    found = dequantize(tensor.data, tensor.tensor_type)[64:128]
    expected = Weights().rows(by_name["model.decoder.layers.1.self_attn.k_proj.weight"], np.arange(64))
    tolerance = {"f16": 0, "q8_0": 4e-4, "q4_0": 8e-3}[gguf_type]
    np.testing.assert_allclose(found, expected.astype(np.float32), rtol=0, atol=tolerance)
    assert tuple(reader["position_embd.weight"].shape) == (64, 32)


def test_a_limit_is_a_share_a_size_or_none(comparison):
    from comparison.cases import memory_limit

    assert memory_limit("none", 1000) is None
    assert memory_limit("50%", 1000) == 500
    assert memory_limit("2MiB", 1000) == 2 << 20
    with pytest.raises(ValueError):
        memory_limit("half", 1000)


def test_forms_that_do_not_fit_together_are_run_in_groups_with_the_first_contender(comparison):
    from comparison.cases import disk_groups

    forms = {"ours": "flash", "ours-mmap": "flash", "llama.cpp": "gguf", "llama.cpp-repack": "gguf", "accelerate": "hf"}
    sizes = {"flash": 10, "gguf": 10, "hf": 10}
    assert disk_groups(forms, sizes, 30) == [list(forms)]
    assert disk_groups(forms, sizes, 29) == [
        ["ours", "llama.cpp", "llama.cpp-repack", "ours-mmap"],
        ["ours", "accelerate"],
    ]
    assert disk_groups({"ours": "flash"}, sizes, 5) == [["ours"]]


def test_ratios_are_taken_within_a_round(comparison):
    from comparison.figures import summarise, table

    runs = [
        run("ours", 1.0, is_ours=True),
        run("llama.cpp", 3.0),
        run("ours", 2.0, is_ours=True, number=1),
        run("llama.cpp", 8.0, number=1),
        run("llama.cpp", 100.0, session="b"),
        run("accelerate", 0, failure="killed"),
    ]
    summary = summarise(runs, {"llama.cpp": 3.6})
    (ratio,) = summary["ratios"]
    assert (ratio["ratio"], ratio["range"], ratio["is_met"]) == (3.5, [3.0, 4.0], False)
    assert summary["contenders"]["accelerate"]["failure"] == "killed"
    assert any("3.50 times" in line and "missed" in line for line in table("x", summary))


def test_the_first_tokens_do_not_count(comparison):
    from comparison.figures import per_token

    reported = {"seconds": [9.0, 1.0, 2.0, 3.0], "bytes_read": [100, 110, 130, 160]}
    assert per_token(reported, 1) == {"seconds_per_token": 2.0, "bytes_read_per_token": 20.0}
