"""A person who starts it wrongly sees one line that names the thing, and nothing keeps running."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from engine import engine
from model_set import Models
from tiny_models import tiny_eagle3

from whiflash_sglang.checkpoints.manifest import embedded_bundle
from whiflash_sglang.errors import CheckpointError, ConfigError
from whiflash_train.bundle import BundleParts, create

Arguments = Callable[..., list[str]]


@pytest.fixture(scope="module")
def launch(models: Models) -> Arguments:
    """The launcher's own parsing of a command line, plugins loaded."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()

    def parse(*arguments: str, draft: str = "dflash", eagle: str | None = "eagle3") -> object:
        command = ["--model-path", str(models.target), "--device", "cpu"]
        command += ["--speculative-algorithm", "WHIFLASH"]
        command += ["--speculative-draft-model-path", str(getattr(models, draft, draft))]
        command += ["--whiflash-eagle-draft", str(getattr(models, eagle))] if eagle else []
        return prepare_server_args([*command, *arguments])

    return parse


def test_a_wrong_flag_stops_the_launcher(launch: Arguments) -> None:
    with pytest.raises(SystemExit, match=r"whiflash: error: --whiflash-router: .*'fastest'") as stopped:
        launch("--whiflash-router", "fastest")
    assert "\n" not in str(stopped.value)


def test_a_wrong_draft_path_stops_the_launcher(launch: Arguments) -> None:
    with pytest.raises(SystemExit, match=r"whiflash: error: .*nowhere: no such directory"):
        launch(draft="/nowhere")
    with pytest.raises(SystemExit, match=r"whiflash: error: /nowhere/target: no such directory"):
        launch("--model-path", "/nowhere/target")
    assert list(launch(eagle=None)._whiflash.drafters) == ["diffusion"]  # type: ignore[attr-defined]
    with pytest.raises(SystemExit, match="whiflash: error: router 'ar' needs EAGLE-3"):
        launch("--whiflash-router", "ar", eagle=None)


def test_a_right_command_line_is_taken(launch: Arguments, models: Models) -> None:
    settings = launch("--whiflash-router", "ar", "--whiflash-block-size", "4")._whiflash  # type: ignore[attr-defined]
    assert (settings.router, settings.block_size, settings.drafters["ar"]) == ("ar", 4, models.eagle3)


def test_a_bundles_template_needs_a_tokenizer(launch: Arguments) -> None:
    """SGLang would end where it puts it into one."""
    bundle = str(embedded_bundle())
    assert Path(launch(draft=bundle, eagle=None).chat_template).is_file()  # type: ignore[attr-defined]
    assert launch("--skip-tokenizer-init", draft=bundle, eagle=None).chat_template is None  # type: ignore[attr-defined]


def test_hub_ids_are_fetched_as_the_command_line_says(
    launch: Arguments, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The revision is the draft path's; the directory holds all downloads."""
    asked = {}

    def download(path: str, **given: object) -> str:
        asked[path] = given
        return str(getattr(models, path.removeprefix("owner/")))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    revision = ["--speculative-draft-model-revision", "v2", "--download-dir", "/data"]
    launch(*revision, "--whiflash-eagle-draft", "owner/eagle3", draft="owner/dflash", eagle=None)
    assert asked == {
        "owner/dflash": {"revision": "v2", "cache_dir": "/data"},
        "owner/eagle3": {"revision": None, "cache_dir": "/data"},
    }


def test_mixed_chunks_are_switched_off_with_a_warning(launch: Arguments, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("--enable-mixed-chunk").enable_mixed_chunk is False  # type: ignore[attr-defined]
    assert "--enable-mixed-chunk is switched off" in capsys.readouterr().err


def test_what_cannot_be_served_stops_before_weights_are_read(launch: Arguments, models: Models, tmp_path: Path) -> None:
    """One line instead of a traceback, from the same call that a launcher makes: no directory holds weights."""
    falcon = {"architectures": ["FalconH1ForCausalLM"], "model_type": "falcon_h1"}
    for name, changes in (("target", {}), ("falcon", falcon), ("other", {"vocab_size": 400})):
        (tmp_path / name).mkdir()
        for file in models.target.iterdir():
            if file.suffix != ".safetensors":
                (tmp_path / name / file.name).write_bytes(file.read_bytes())
        config = tmp_path / name / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    for name, arguments, message in (
        ("target", ["--pp-size", "2"], r"--pp-size must be 1 \(.*\)"),
        ("target", ["--speculative-num-steps", "3"], "--speculative-num-steps belongs to .*; remove it"),
        ("target", ["--attention-backend", "torch_native"], "not torch_native; remove the flag"),
        ("falcon", [], "FalconH1ForCausalLM keeps a recurrent state .*without (it|WHIFLASH)"),
        ("other", [], "the EAGLE-3 checkpoint .* vocabulary of 320, this target has 400"),
    ):
        with pytest.raises(SystemExit, match=rf"^whiflash: error: .*{message}$"):
            launch("--model-path", str(tmp_path / name), *arguments).resolve_once()  # type: ignore[attr-defined]
    launch("--model-path", str(tmp_path / "target")).resolve_once()  # type: ignore[attr-defined]


@pytest.mark.usefixtures("launch")
def test_our_flags_without_our_algorithm_are_named() -> None:
    from sglang.srt.server_args import prepare_server_args

    with pytest.raises(SystemExit, match=r"--whiflash-router has no effect without --speculative-algorithm"):
        prepare_server_args(["--model-path", "unused", "--whiflash-router", "ar"])
    assert not hasattr(prepare_server_args(["--model-path", "unused"]), "_whiflash")


def test_a_worker_does_not_start_on_a_damaged_checkpoint(models: Models, tmp_path: Path) -> None:
    """And what it had begun is taken down: the next start in the same process works."""
    broken = tiny_eagle3(tmp_path / "eagle3", models.target)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    flags = {"draft": models.dflash, "whiflash_router": "ar"}
    with (
        pytest.raises(CheckpointError, match=rf"{weights} is damaged or truncated: .*; fetch it again"),
        engine(models.target, whiflash={**flags, "whiflash_eagle_draft": str(broken)}),
    ):
        pass
    bundle = tmp_path / "bundle"
    create(BundleParts(str(models.target), str(models.eagle3), str(models.dflash)), bundle)
    weights = bundle / "dflash" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")  # which torch would load
    with (
        pytest.raises(ConfigError, match=f"{weights} is not the file that its bundle was made with"),
        engine(models.target, whiflash={"draft": bundle}),
    ):
        pass
    whole = {**flags, "whiflash_eagle_draft": str(models.eagle3)}
    with engine(models.target, whiflash=whole) as e:
        assert len(e.generate([[1, 2, 3]], max_new_tokens=4)[0]) == 4
