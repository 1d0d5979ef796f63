"""Checkpoints in the layouts that they are published in, tiny and random: fixtures of several test modules."""

import json
import shutil
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AddedToken,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    Gemma3TextConfig,
    Gemma3TextModel,
    GemmaTokenizer,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaModel,
    XLMRobertaTokenizer,
)

# in_features, out_features, activation, bias, residual
Row = tuple[int, int, str, bool, bool]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A late-interaction checkpoint and what its own files say of it."""

    folder: Path
    rows: list[Row]
    weights: list[dict[str, Tensor]]
    query_prefix: str
    document_prefix: str
    query_length: int
    document_length: int
    attends: bool
    skipped: set[str]
    skips_in_queries: bool


# Preset, fixture, and what its positions allow: documents of ModernBERT and Gemma reach beyond their local layers.
ARCHITECTURES = {
    "bert": ("bert_base", "tiny_bert", 60),
    "xlm_roberta": ("checkpoint", "xlm_roberta", 60),
    "modernbert": ("modernbert_base", "modernbert", 200),
    "gemma3": ("embeddinggemma_300m", "gemma", 60),
}


@pytest.fixture(scope="session")
def modernbert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ModernBERT, 32 wide: byte-level BPE, markers in its vocabulary, spare rows in its embedding table."""
    folder = tmp_path_factory.mktemp("modernbert")
    merges = [("c", "a"), ("ca", "t"), ("Ġ", "cat")]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "[unused0]"]
    ids = {piece: index for index, piece in enumerate([*pieces, *special])}
    backend = Tokenizer(models.BPE(vocab=ids, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token=AddedToken("[MASK]", lstrip=True, normalized=False),
        model_max_length=512,
    )
    tokenizer.add_tokens(["[unused0]"])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = ModernBertConfig(
        vocab_size=len(tokenizer) + 4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=512,
        pad_token_id=ids["[PAD]"],
        bos_token_id=ids["[CLS]"],
        eos_token_id=ids["[SEP]"],
        cls_token_id=ids["[CLS]"],
        sep_token_id=ids["[SEP]"],
    )
    ModernBertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def xlm_roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An XLM-RoBERTa, 32 wide: SentencePiece, and 66 stored positions that hold 64 tokens."""
    folder = tmp_path_factory.mktemp("xlm_roberta")
    words = ["▁what", "▁is", "▁a", "▁cat"]
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -1.0) for word in words)]
    pieces += [(letter, -9.0) for letter in ["▁", *string.ascii_lowercase, *".,?!"]]
    XLMRobertaTokenizer(vocab=[*pieces, ("<mask>", 0.0)], model_max_length=64).save_pretrained(folder)
    torch.manual_seed(2)
    config = XLMRobertaConfig(
        vocab_size=len(pieces) + 1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=66,
        type_vocab_size=1,
    )
    XLMRobertaModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bidirectional Gemma 3, 32 wide, every other layer local: spaces as "▁" without one in front, padding on the
    left."""
    folder = tmp_path_factory.mktemp("gemma_tokens")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = ["▁", *string.ascii_lowercase, *string.ascii_uppercase, *string.punctuation, "ca", "cat", "▁cat"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    ids = {piece: index for index, piece in enumerate([*special, *pieces])}
    merges: Any = [("c", "a"), ("ca", "t"), ("▁", "cat")]
    tokenizer = GemmaTokenizer(vocab=ids, merges=merges, model_max_length=64, padding_side="left")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        pair="<bos> $A <eos> $B <eos>",
        special_tokens=[("<bos>", ids["<bos>"]), ("<eos>", ids["<eos>"])],
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(5)
    config = Gemma3TextConfig(
        vocab_size=len(ids),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
        max_position_embeddings=64,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        use_bidirectional_attention=True,
        pad_token_id=ids["<pad>"],
        bos_token_id=ids["<bos>"],
        eos_token_id=ids["<eos>"],
    )
    Gemma3TextModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sentence_bert(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers model as most are: Transformer, Pooling, Normalize."""
    folder = tmp_path_factory.mktemp("sentence_bert")
    modules = [Transformer(str(tiny_bert)), Pooling(32, pooling_mode="mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder), create_model_card=False)
    as_published(folder)
    return folder


@pytest.fixture(scope="session")
def embeddinggemma(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EmbeddingGemma in small: bidirectional Gemma 3, two bias-free Dense layers behind a pooling, prompts of words."""
    folder, backbone = tmp_path_factory.mktemp("embeddinggemma"), tmp_path_factory.mktemp("gemma")
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.save_pretrained(backbone)
    torch.manual_seed(3)
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
        max_position_embeddings=64,
        use_bidirectional_attention=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    Gemma3TextModel(config).save_pretrained(backbone)
    modules = [
        Transformer(str(backbone)),
        Pooling(32, pooling_mode="mean"),
        Dense(32, 128, bias=False, activation_function=nn.Identity()),
        Dense(128, 32, bias=False, activation_function=nn.Identity()),
        Normalize(),
    ]
    prompts = {"query": "what is : ", "document": "a : the : ", "Clustering": "of : "}
    SentenceTransformer(modules=modules, device="cpu", prompts=prompts).save_pretrained(
        str(folder), create_model_card=False
    )
    as_published(folder)
    return folder


@pytest.fixture(scope="session")
def stanford(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """What stanford-nlp ColBERT writes: bert.* with its unused pooler, a root linear.weight, artifact.metadata."""
    folder = tmp_path_factory.mktemp("stanford")
    vocabulary = (tiny_bert / "vocab.txt").read_text().splitlines()
    vocabulary[1:1] = ["[unused0]", "[unused1]"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    model = bert(len(vocabulary))
    weights = {f"bert.{name}": tensor for name, tensor in model.state_dict().items()}
    weights["linear.weight"] = torch.randn(24, 32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": ["HF_ColBERT"]}
    (folder / "config.json").write_text(json.dumps(config))
    metadata = {
        "query_maxlen": 12,
        "doc_maxlen": 20,
        "dim": 24,
        "query_token_id": "[unused0]",
        "doc_token_id": "[unused1]",
        "query_token": "[Q]",
        "doc_token": "[D]",
        "mask_punctuation": True,
        "attend_to_mask_tokens": False,
        "similarity": "cosine",
    }
    (folder / "artifact.metadata").write_text(json.dumps(metadata))
    return Checkpoint(
        folder=folder,
        rows=[(32, 24, "Identity", False, False)],
        weights=[{"linear.weight": weights["linear.weight"]}],
        query_prefix="[unused0]",
        document_prefix="[unused1]",
        query_length=12,
        document_length=20,
        attends=False,
        skipped={",", "!"},
        skips_in_queries=False,
    )


@pytest.fixture(scope="session")
def pylate(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """What PyLate 1.6 writes: a Transformer, its own Dense class, settings in config_sentence_transformers.json."""
    folder = tmp_path_factory.mktemp("pylate")
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.add_tokens(["[Q] ", "[D] "])
    tokenizer.save_pretrained(folder)
    bert(len(tokenizer)).save_pretrained(folder)
    weights = [
        {"linear.weight": torch.randn(48, 32), "linear.bias": torch.randn(48), "residual.weight": torch.randn(48, 32)},
        {"linear.weight": torch.randn(16, 48)},
    ]
    rows = [(32, 48, "GELU", True, True), (48, 16, "Identity", False, False)]
    paths = {"GELU": "torch.nn.modules.activation.GELU", "Identity": "torch.nn.modules.linear.Identity"}
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for index, ((in_features, out_features, activation, bias, residual), tensors) in enumerate(
        zip(rows, weights, strict=True), start=1
    ):
        name = f"{index}_Dense"
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
        config = {
            "in_features": in_features,
            "out_features": out_features,
            "bias": bias,
            "activation_function": paths[activation],
            "use_residual": residual,
        }
        (folder / name / "config.json").write_text(json.dumps(config))
        modules.append({"idx": index, "name": str(index), "path": name, "type": "pylate.models.Dense.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    # Whatever was tokenised last: no length of the model.
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 7, "do_lower_case": False}))
    settings = {
        "model_type": "ColBERT",
        "__version__": {"sentence_transformers": "5.3.0", "transformers": "4.57.6", "pytorch": "2.9.1"},
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "MaxSim",
        "query_prefix": "[Q] ",
        "document_prefix": "[D] ",
        "query_length": 10,
        "document_length": 18,
        "attend_to_expansion_tokens": True,
        "skiplist_words": [",", "cat"],
        "do_query_expansion": True,
    }
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings))
    return Checkpoint(
        folder=folder,
        rows=rows,
        weights=weights,
        query_prefix="[Q] ",
        document_prefix="[D] ",
        query_length=10,
        document_length=18,
        attends=True,
        skipped={",", "cat"},
        skips_in_queries=False,
    )


@pytest.fixture
def pylate_without_type(pylate: Checkpoint, tmp_path: Path) -> Checkpoint:
    """PyLate 1.6 on top of a sentence-transformers model: no model_type."""
    folder = tmp_path / "pylate_without_type"
    shutil.copytree(pylate.folder, folder)
    path = folder / "config_sentence_transformers.json"
    settings = json.loads(path.read_text())
    del settings["model_type"]
    path.write_text(json.dumps(settings))
    return Checkpoint(**(vars(pylate) | {"folder": folder}))


def bert(vocabulary_size: int) -> BertModel:
    torch.manual_seed(4)
    return BertModel(
        BertConfig(
            vocab_size=vocabulary_size,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
        )
    )


def as_published(folder: Path) -> None:
    """Turn a save of today into the layout of published models: old class paths, Dense without names of its tensors."""
    modules = json.loads((folder / "modules.json").read_text())
    for module in modules:
        module["type"] = "sentence_transformers.models." + module["type"].rpartition(".")[2]
    (folder / "modules.json").write_text(json.dumps(modules))
    for path in folder.glob("*_Dense/config.json"):
        config = json.loads(path.read_text())
        path.write_text(json.dumps({key: config[key] for key in config if not key.startswith("module_")}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24, "do_lower_case": False}))
