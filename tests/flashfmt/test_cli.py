"""The command: answers, exit codes, where output goes, verbs of other packages."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import EntryPoint
from pathlib import Path

import click
import pytest

import flashfmt
import flashfmt.cli
import flashfmt.output

ROOT = Path(flashfmt.__file__).parents[1]
COMMAND = [sys.executable, "-c", "from flashfmt.cli import main; main()"]


@pytest.fixture(autouse=True)
def _unsynced(monkeypatch):
    """Don't wait for the disk: what syncs must be there is test_write_faults' matter."""
    monkeypatch.setattr(flashfmt.output, "fsync", lambda _: None)


@pytest.fixture
def flash(capsys):
    """A function: run the command in this process; exit code, stdout, stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            flashfmt.cli.main([str(argument) for argument in arguments])
        return end.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def path(model, tmp_path):
    return model.write_file(tmp_path / "m.flash")


def test_version(flash):
    assert flash("--version") == (0, f"flashfmt, version {flashfmt.__version__}\n", "")


def test_help_names_every_verb(flash):
    code, out, _ = flash("--help")
    assert code == 0
    for verb in ("convert", "diff", "inspect", "pack", "unpack", "verify"):
        assert f"\n  {verb} " in out


@pytest.mark.parametrize("arguments", [["no-such-verb"], ["inspect"], ["inspect", "x", "--no-such-option"]])
def test_wrong_usage(flash, arguments):
    code, out, err = flash(*arguments)
    assert (code, out) == (2, "")
    assert "Error: " in err


class TestInspect:
    def test_a_model_in_words(self, flash, path):
        code, out, err = flash("inspect", path)
        assert (code, err) == (0, "")
        for text in (
            "tiny", "format 1.0", "2 layers of width 64", "4 heads of 16 sharing 2 key/value heads", "RMS norm",
            "predictor of layer 1: low rank 4, reads ffn_input of layer 0", "statistics: 100 tokens",
            "tokens  32 x 64  f16  4.0 KiB  at ", "bundles  6 x 3 x 64  f16", "layers/1", "overhead",
        ):  # fmt: skip
            assert text in out

    def test_layers_that_are_alike_are_folded(self, flash, model, tmp_path):
        for name in [name for name in model.arrays if "/predictor/" in name]:
            del model.arrays[name]
        model.manifest["predictors"] = []
        path = model.write_file(tmp_path / "m.flash")
        folded, unfolded = flash("inspect", path)[1], flash("inspect", path, "--arrays")[1]
        assert "layers/0..1  (2 alike)" in folded
        assert folded.count("bundles  6 x") == 1
        assert unfolded.count("bundles  6 x") == 2

    def test_one_layer(self, flash, path):
        code, out, _ = flash("inspect", path, "--layer", 1)
        assert code == 0
        assert "layers/1" in out
        assert "layers/0" not in out
        code, _, err = flash("inspect", path, "--layer", 2)
        assert code == 2
        assert "layers 0 to 1" in err

    def test_everything_as_json(self, flash, path):
        code, out, err = flash("inspect", path, "--json")
        found = json.loads(out)
        assert (code, err) == (0, "")
        with flashfmt.open(path) as model:
            assert found["manifest"]["decoder"]["d_model"] == 64
            assert sum(found["nbytes_by_role"].values()) == found["nbytes"] == path.stat().st_size
            assert len(found["arrays"]) == len(model.tensors) + len(model.layers) + len(model.files)
            arrays = {array["name"]: array for array in found["arrays"]}
            assert arrays["layers/1/ffn/bundles"]["offset"] == model.layers[1].extent.offset
            assert arrays["layers/1/ffn/bundles"]["stride"] == model.layers[1].geometry.stride

    def test_a_measured_predictor(self, flash, model, tmp_path):
        measured = {"recall": 0.95, "precision": 0.5, "predicted_fraction": 0.2, "n_tokens": 1000, "text": "a text"}
        model.manifest["predictors"][0]["measured"] = measured
        out = flash("inspect", model.write_file(tmp_path / "m.flash"))[1]
        assert "recall 0.950, precision 0.500, 20.0 % predicted, on 1000 tokens of a text" in out
        measured["perplexity_ratio"] = 1.0085
        out = flash("inspect", model.write_file(tmp_path / "n.flash"))[1]
        assert "20.0 % predicted, perplexity of the model +0.85 %, on 1000 tokens" in out


class TestVerify:
    def test_a_whole_model(self, flash, path):
        code, out, err = flash("verify", path)
        assert (code, err) == (0, "")
        assert f"{path}: ok, " in out
        found = json.loads(flash("verify", path, "--json")[1])
        assert found["ok"]
        with flashfmt.open(path) as model:
            assert found["nbytes"] == model.verify_nbytes

    def test_a_damaged_model(self, flash, path):
        with flashfmt.open(path) as model:
            at = model.layers[0].extent.offset
        raw = bytearray(path.read_bytes())
        raw[at] ^= 1
        path.write_bytes(raw)
        code, out, err = flash("verify", path)
        assert (code, out) == (3, "")
        assert err.startswith(f"error: {path}: FF-SUM-5 at layers/0/ffn/bundles[0]")

    def test_no_model(self, flash, tmp_path):
        code, out, err = flash("verify", tmp_path / "nothing")
        assert (code, out) == (1, "")
        assert err == f"error: {tmp_path / 'nothing'}: no such file or directory\n"

    def test_a_later_version(self, flash, model, tmp_path):
        model.manifest["version"] = "2.0"
        assert flash("verify", model.write_file(tmp_path / "later.flash"))[0] == 4


class TestDiff:
    def test_equal_models(self, flash, path):
        assert flash("diff", path, path) == (0, "the models are equal\n", "")
        assert json.loads(flash("diff", path, path, "--json")[1]) == {"equal": True, "differences": []}

    def test_different_models(self, flash, path, tiny, tmp_path):
        other = tiny(seed=8).write_file(tmp_path / "other.flash")
        code, out, _ = flash("diff", path, other)
        assert code == 1
        assert "values   layers/0/ffn/bundles: 1152 of 1152 differ, by up to" in out
        code, out, _ = flash("diff", path, other, "--json")
        assert code == 1
        assert not json.loads(out)["equal"]


class TestPack:
    def test_there_and_back(self, flash, path, tmp_path):
        assert flash("unpack", path, tmp_path / "d")[0] == 0
        assert flash("pack", tmp_path / "d", tmp_path / "p.flash")[0] == 0
        assert flash("diff", path, tmp_path / "p.flash")[0] == 0
        code, out, err = flash("pack", tmp_path / "d", tmp_path / "p.flash")
        assert (code, out) == (1, "")
        assert "exists already" in err
        assert flash("pack", tmp_path / "d", tmp_path / "p.flash", "--overwrite")[0] == 0


class TestConvert:
    def test_a_checkpoint(self, flash, tiny_checkpoint, tmp_path):
        checkpoint, _ = tiny_checkpoint("llama")
        code, out, err = flash(
            "convert", checkpoint, tmp_path / "m.flash", "--encoding", "f16", "--name", "n", "--json"
        )
        assert (code, err) == (0, "")
        report = json.loads(out)
        assert (report["target"], report["bundle_encoding"]) == (str(tmp_path / "m.flash"), "f16")
        with flashfmt.open(tmp_path / "m.flash") as model:
            model.verify()
            assert model.manifest.name == "n"
        code, out, _ = flash("convert", checkpoint, tmp_path / "d", "--residents", "f32")
        assert code == 0
        assert "M parameters" in out

    def test_converting_gives_the_canonical_order(self, flash, tiny_checkpoint, tmp_path, content):
        checkpoint, _ = tiny_checkpoint("llama")
        flash("convert", checkpoint, tmp_path / "m.flash")
        flash("unpack", tmp_path / "m.flash", tmp_path / "d")
        flash("pack", tmp_path / "d", tmp_path / "p.flash")
        assert content(tmp_path / "p.flash") == content(tmp_path / "m.flash")

    def test_no_checkpoint(self, flash, tmp_path):
        code, out, err = flash("convert", tmp_path / "nothing", tmp_path / "m.flash")
        assert (code, out) == (1, "")
        assert err.startswith("error: ")

    def test_an_unknown_encoding(self, flash, tmp_path):
        assert flash("convert", tmp_path, tmp_path / "m", "--encoding", "q5")[0] == 2


class TestPlugins:
    """Verbs of other packages."""

    @pytest.fixture(autouse=True)
    def _plugins(self, monkeypatch):
        points = [
            EntryPoint("greet", f"{__name__}:greet", flashfmt.cli.PLUGIN_GROUP),
            EntryPoint("broken", "no_such_module:verb", flashfmt.cli.PLUGIN_GROUP),
            EntryPoint("number", "math:pi", flashfmt.cli.PLUGIN_GROUP),
            EntryPoint("inspect", "no_such_module:verb", flashfmt.cli.PLUGIN_GROUP),
        ]
        monkeypatch.setattr(flashfmt.cli, "entry_points", lambda group: points)
        monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or sys.modules[greet.callback.__module__])

    def test_a_verb(self, flash):
        assert flash("greet", "you") == (0, "hello you\n", "")

    def test_a_broken_verb_says_so(self, flash):
        code, out, err = flash("broken", "--any", "thing")
        assert (code, out) == (1, "")
        assert err.startswith("error: the command 'broken' of ")
        assert "ModuleNotFoundError: No module named 'no_such_module'" in err

    def test_what_is_no_verb_says_so(self, flash):
        assert "math:pi is not a command" in flash("number")[2]

    def test_the_others_still_work(self, flash, path):
        code, out, _ = flash("--help")
        assert code == 0
        assert "(cannot be loaded)" in out
        assert flash("inspect", path)[0] == 0


@click.command()
@click.argument("whom")
def greet(whom):
    """Say hello."""
    click.echo(f"hello {whom}")


class TestProcess:
    """What only a process of its own shows."""

    def test_a_closed_pipe_is_no_error(self, path):
        command = " ".join(f"'{word}'" for word in [*COMMAND, "inspect", str(path), "--json"])
        shell = subprocess.run(["sh", "-c", f"{command} | true"], capture_output=True, text=True, cwd=ROOT, check=True)
        assert shell.stderr == ""

    def test_an_interruption_says_how_to_continue(self, path, tmp_path):
        slow = (
            "import os, signal, time, flashfmt.output as o\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job's children ignore it
            "def pwrite(*a):\n    print('writing', flush=True); time.sleep(0.2); return os.pwrite(*a)\n"
            "o.pwrite = pwrite\n"
            "from flashfmt.cli import main; main()"
        )
        arguments = ["unpack", str(path), str(tmp_path / "d")]
        process = subprocess.Popen(
            [sys.executable, "-c", slow, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert process.stdout.readline() == "writing\n"
        time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert f"interrupted: {tmp_path / 'd.partial'} is kept, and the same command continues it" in err
        assert "Traceback" not in err
        assert not (tmp_path / "d").exists()
        assert (tmp_path / "d.partial.journal").exists()

    def test_a_bug_shows_its_traceback(self, path):
        code = "import flashfmt.reader as r\nr.open_model = lambda _: 1 / 0\nfrom flashfmt.cli import main; main()"
        process = subprocess.run(
            [sys.executable, "-c", code, "verify", str(path)], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert process.returncode == 1
        assert "ZeroDivisionError" in process.stderr


def test_long_work_says_how_far_it_is(flash, path, monkeypatch):
    monkeypatch.setattr("flashfmt.progress.DELAY_SECONDS", 0.0)
    code, _, err = flash("verify", path)
    assert code == 0
    assert err.startswith("verifying: ")
    assert flash("verify", path, "--quiet")[2] == ""
