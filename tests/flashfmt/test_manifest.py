"""The manifest's types and the arrays that follow from it."""

import msgspec
import pytest

from flashfmt.manifest import Manifest, bundle_checksums_name, bundles_name, required_arrays


def manifest(model, **decoder):
    model.manifest["decoder"].update(decoder)
    return msgspec.convert(model.manifest, Manifest)


def names(model, **decoder):
    return set(required_arrays(manifest(model, **decoder)))


def test_defaults_are_those_of_the_specification(model):
    m = manifest(model)
    d = m.decoder
    assert (d.block.order, d.block.shared_norm, d.final_norm, d.embedding_norm) == ("pre_norm", False, True, False)
    assert (d.rotary[0].pairing, d.rotary[0].attention_factor) == ("half", 1.0)
    assert d.ffn.up_activation.kind == "identity"
    assert d.ffn.parts == ("gate", "up", "down")
    assert (d.n_layers, d.rotary_of(0), d.rotary_of(1)) == (2, d.rotary[0], None)


def test_a_manifest_survives_a_round_trip(model):
    m = manifest(model)
    assert msgspec.json.decode(msgspec.json.encode(m), type=Manifest) == m


def test_manifests_are_immutable(model):
    with pytest.raises(AttributeError):
        manifest(model).decoder.d_model = 3


@pytest.mark.parametrize("field", ["metadata_crc32c", "version"])
@pytest.mark.parametrize("value", ["", "00000000\n", "1.0\n", "0000000G"])
def test_patterns_match_to_the_very_end(model, field, value):
    model.manifest[field] = value
    with pytest.raises(msgspec.ValidationError):
        manifest(model)


def test_every_option_adds_or_drops_its_arrays(model):
    base = names(model)
    d = model.manifest["decoder"]
    norm = {"kind": "layer_norm", "eps": 1e-5}

    def changes(**decoder):
        saved = {key: d.get(key) for key in decoder}
        found = names(model, **decoder)
        for key, value in saved.items():
            d.pop(key) if value is None else d.update({key: value})
        return found - base, base - found

    attention = d["attention"]
    layer0 = {name for name in base if name.startswith("layers/0/")}
    assert {"layers/0/ffn/up_bias", "layers/0/ffn/bundle_crc32c", "layers/0/attention/norm/weight"} <= layer0
    assert changes(logits={"tied": True}) == (set(), {"logits/weight"})
    assert changes(logits={"tied": False, "bias": True}) == ({"logits/bias"}, set())
    assert changes(final_norm=False) == (set(), {"final_norm/weight"})
    assert changes(embedding_norm=True) == ({"embedding/norm/weight"}, set())
    assert changes(positions={"n_rows": 130, "offset": 2}) == ({"embedding/positions"}, set())
    assert changes(embedding={"d_embed": 32, "projection": True}) == (
        {"embedding/projection_in", "embedding/projection_out"},
        set(),
    )
    added, dropped = changes(norm={**norm, "weight": False})
    assert not added
    assert {name.rsplit("/", 2)[-2] for name in dropped} == {"norm", "final_norm"}
    assert changes(norm={**norm, "bias": True})[0] == {
        "final_norm/bias",
        *(f"layers/{layer}/{part}/norm/bias" for layer in (0, 1) for part in ("attention", "ffn")),
    }
    added, _ = changes(attention={**attention, "qkv_bias": True, "output_bias": True, "qk_norm": norm})
    assert len(added) == 2 * (3 + 1 + 2)
    assert changes(block={"order": "parallel", "shared_norm": True})[1] == {
        f"layers/{layer}/ffn/norm/weight" for layer in (0, 1)
    }


@pytest.mark.parametrize(("over", "widths"), [("head", (16, 16)), ("projection", (64, 32))])
def test_qk_norm_spans_a_head_or_the_projection(model, over, widths):
    attention = model.manifest["decoder"]["attention"] | {
        "qk_norm": {"kind": "rms_norm", "eps": 1},
        "qk_norm_over": over,
    }
    arrays = required_arrays(manifest(model, attention=attention))
    found = tuple(arrays[f"layers/0/attention/{part}_norm/weight"].shape[0] for part in ("q", "k"))
    assert found == widths


def test_roles_of_arrays(model):
    arrays = required_arrays(manifest(model))
    assert arrays["embedding/tokens"].encodable
    assert arrays["layers/1/predictor/up"].shape == (6, 4)
    assert arrays[bundle_checksums_name(1)].integers
    assert not arrays["final_norm/weight"].encodable
    assert bundles_name(12) == "layers/12/ffn/bundles"
    assert bundles_name(0) not in arrays
