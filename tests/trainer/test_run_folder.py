"""What a run may replace, and that nothing is left half-written."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from sentence_transformers import MultiVectorEncoder

from configs.schema import Config, ConfigError, parse_config
from trainer import run_folder
from trainer.run_folder import RunFolder

MakeConfig = Callable[..., Config]
NO_SPACE = "[Errno 28] No space left on device"
# As libraries written in Rust report it, by exceptions of their own.
FULL = "No space left on device (os error 28)"


def make_folder(make_config: MakeConfig, *overrides: str) -> RunFolder:
    return RunFolder(make_config(*overrides))


def fill(path: Path, *names: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(f"old {name}")


# Refusals


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["config.yaml", "metrics.jsonl", "result.json"], "a finished run"),
        (["result.json"], "a finished run"),
        (["config.yaml", "metrics.jsonl"], "a run that did not finish (config.yaml, metrics.jsonl)"),
        (["model"], "a run that did not finish (model)"),
    ],
)
@pytest.mark.parametrize("method", ["check", "create"])
def test_a_folder_with_a_run_is_refused_and_left_alone(
    method: str, files: list[str], kind: str, make_config: MakeConfig
) -> None:
    folder = make_folder(make_config)
    fill(folder.path, *files)
    with pytest.raises(ConfigError) as caught:
        getattr(folder, method)()
    assert str(caught.value) == (
        f"output_dir={folder.path} holds {kind}: set another name= or output_dir=, or overwrite=true to replace it"
    )
    assert sorted(path.name for path in folder.path.iterdir()) == sorted(files)
    assert all((folder.path / name).read_text() == f"old {name}" for name in files)


@pytest.mark.parametrize("key", ["backbone.name", "data.path"])
def test_a_run_that_would_replace_its_own_input_is_refused(key: str, make_config: MakeConfig, tmp_path: Path) -> None:
    fill(tmp_path / "run", "model", "config.yaml")
    source = tmp_path / "run" / "model"
    folder = make_folder(make_config, "data=pairs", "data.path=other", f"{key}={source}", "overwrite=true")
    with pytest.raises(ConfigError, match=rf"^{key}={source} lies in output_dir={tmp_path}/run, which is replaced"):
        folder.create()
    assert source.read_text() == "old model"


@pytest.mark.parametrize("overwrite", ["true", "false"])
def test_a_file_in_the_place_of_the_folder_is_refused(overwrite: str, make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ConfigError) as caught:
        make_folder(make_config, f"overwrite={overwrite}").check()
    assert str(caught.value) == f"output_dir={tmp_path}/run is a file: name a folder"
    assert (tmp_path / "run").read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_an_error_of_the_config(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = make_folder(make_config, f"output_dir={tmp_path}/file/run")
    with pytest.raises(ConfigError) as caught:
        folder.create()
    assert str(caught.value) == (
        f"output_dir={tmp_path}/file/run: config.yaml cannot be written ([Errno 20] Not a directory: "
        f"'{tmp_path}/file/run'): free space on the disk or name another folder"
    )


def test_check_makes_nothing(make_config: MakeConfig) -> None:
    folder = make_folder(make_config)
    folder.check()
    assert not folder.path.exists()


# What a run writes


def test_a_new_run_keeps_the_files_that_are_no_runs(make_config: MakeConfig) -> None:
    folder = make_folder(make_config)
    fill(folder.path, "notes.txt")
    folder.create()
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.yaml", "notes.txt"]
    assert (folder.path / "notes.txt").read_text() == "old notes.txt"


def test_overwrite_replaces_what_a_run_writes_and_nothing_else(make_config: MakeConfig) -> None:
    folder = make_folder(make_config, "overwrite=true")
    ours = ["config.yaml", "metrics.jsonl", "result.json", "failed_batch.jsonl", "model/weights", "best/weights"]
    foreign = ["notes.txt", "models/weights", "metrics.jsonl.bak"]
    fill(folder.path, *ours, *foreign)
    folder.create()
    assert {path.name for path in folder.path.iterdir()} == {"config.yaml", "notes.txt", "models", "metrics.jsonl.bak"}
    assert all((folder.path / name).read_text() == f"old {name}" for name in foreign)
    assert "old" not in (folder.path / "config.yaml").read_text()


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["head=mlp_residual", "trainer.steps=null", "trainer.epochs=0.5", "trainer.max_gradient_norm=null"],
        ["data=pairs", "data.path=a.jsonl", "data.negative_columns=[no, never]", "backbone.skiplist=['#', ': ', 'no']"],
        [
            "backbone.expansion=null",
            "backbone.query_length=null",
            "optimizer.epsilon=1e-12",
            "optimizer.schedule=cosine",
        ],
    ],
)
def test_the_saved_config_is_read_back_equal(overrides: list[str], make_config: MakeConfig) -> None:
    config = make_config(*overrides)
    folder = RunFolder(config)
    folder.create()
    saved = OmegaConf.load(folder.path / "config.yaml")
    assert isinstance(saved, DictConfig)
    assert parse_config(saved) == config


def test_each_logged_step_is_one_line_of_json(make_config: MakeConfig) -> None:
    folder = make_folder(make_config)
    folder.create()
    folder.log(0, {"eval/map": 0.25})
    folder.log(1, {"train/loss": 1e-7})
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 0, "eval/map": 0.25}, {"step": 1, "train/loss": 1e-7}]


def test_the_failed_batch_is_one_example_a_line(make_config: MakeConfig) -> None:
    folder = make_folder(make_config)
    folder.create()
    examples = [{"query": "a\nb", "place": "f:1"}, {"query": "é", "place": "f:2"}]
    path = folder.write_failed_batch(examples)
    assert path == folder.path / "failed_batch.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == examples


def test_the_result_marks_the_run_as_finished(make_config: MakeConfig) -> None:
    folder = make_folder(make_config)
    folder.create()
    folder.write_result({"steps": 3, "best": None})
    assert json.loads((folder.path / "result.json").read_text()) == {"steps": 3, "best": None}
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.yaml", "result.json"]
    with pytest.raises(ConfigError, match="holds a finished run"):
        folder.check()


def test_a_saved_model_reloads_with_the_same_vectors(encoder: MultiVectorEncoder, make_config: MakeConfig) -> None:
    folder = make_folder(make_config)
    folder.create()
    path = folder.save_model(encoder, "model")
    assert path == folder.path / "model"
    assert sorted(entry.name for entry in folder.path.iterdir()) == ["config.yaml", "model"]
    reloaded = MultiVectorEncoder(str(path), device="cpu")
    for ours, theirs in (
        (encoder.encode_query(["what is it"]), reloaded.encode_query(["what is it"])),
        (encoder.encode_document(["a dog, a cat."]), reloaded.encode_document(["a dog, a cat."])),
    ):
        assert torch.equal(ours[0], theirs[0])


def test_saving_again_replaces_the_model(encoder: MultiVectorEncoder, make_config: MakeConfig) -> None:
    folder = make_folder(make_config)
    fill(folder.path, "model/old_weights", "model.unfinished/older_weights")
    folder.save_model(encoder, "model")
    names = {path.name for path in folder.path.rglob("*")}
    assert "modules.json" in names
    assert not {"old_weights", "older_weights", "model.unfinished"} & names


# Failures


def fail_to_save(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make every save write a part of a model, then fail."""

    def save(self: MultiVectorEncoder, path: str) -> None:
        Path(path).mkdir(parents=True)
        Path(path, "modules.json").write_text("[")
        raise error

    monkeypatch.setattr(MultiVectorEncoder, "save_pretrained", save)


@pytest.mark.parametrize("name", ["model", "best"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), NO_SPACE),
        (SafetensorError(FULL), FULL),
        (Exception(FULL), FULL),
    ],
    ids=["OSError", "SafetensorError", "tokenizers"],
)
def test_a_failed_save_leaves_no_half_written_model(
    error: Exception,
    reason: str,
    name: str,
    encoder: MultiVectorEncoder,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_folder(make_config)
    folder.create()
    fail_to_save(monkeypatch, error)
    with pytest.raises(ConfigError) as caught:
        folder.save_model(encoder, name)
    assert str(caught.value) == (
        f"output_dir={folder.path}: {name} cannot be written ({reason}): free space on the disk or name another folder"
    )
    assert [path.name for path in folder.path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("error", "raised"), [(OSError(errno.ENOSPC, "full"), ConfigError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_a_failed_save_leaves_the_model_that_was_there(
    error: BaseException,
    raised: type[BaseException],
    encoder: MultiVectorEncoder,
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = make_folder(make_config)
    fill(folder.path, "model/modules.json", "model/weights")
    fail_to_save(monkeypatch, error)
    with pytest.raises(raised):
        folder.save_model(encoder, "model")
    assert [path.name for path in folder.path.iterdir()] == ["model"]
    assert {path.name: path.read_text() for path in (folder.path / "model").iterdir()} == {
        "modules.json": "old model/modules.json",
        "weights": "old model/weights",
    }


def full_disk(path: Path, text: str) -> None:
    """Write the half of a text that still fits."""
    path.open("w").write(text[: len(text) // 2])
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_config_that_cannot_be_written_leaves_no_half_of_it(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(make_config)
    monkeypatch.setattr(
        run_folder, "save_config", lambda config, path: full_disk(Path(path), OmegaConf.to_yaml(config))
    )
    with pytest.raises(ConfigError) as caught:
        folder.create()
    assert str(caught.value) == (
        f"output_dir={folder.path}: config.yaml cannot be written ({NO_SPACE}): "
        "free space on the disk or name another folder"
    )
    assert not (folder.path / "config.yaml").exists()


def test_a_result_that_cannot_be_written_does_not_mark_the_run_as_finished(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(make_config)
    folder.create()
    monkeypatch.setattr(Path, "write_text", lambda self, text, **_: full_disk(self, text))
    with pytest.raises(ConfigError) as caught:
        folder.write_result({"steps": 3})
    assert str(caught.value) == (
        f"output_dir={folder.path}: result.json cannot be written ({NO_SPACE}): "
        "free space on the disk or name another folder"
    )
    assert not (folder.path / "result.json").exists()
