"""The systems of the model page, tiny and random, each a folder in the layout that it is published in: fixtures."""

import json
import shutil
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForPreTraining,
    BertModel,
    Gemma3TextConfig,
    Gemma3TextModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertModel,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaModel,
    XLMRobertaTokenizer,
)

from tests.checkpoints import Checkpoint, as_published

CONFIGURATION = """\
from transformers import XLMRobertaConfig


class TinyConfig(XLMRobertaConfig):
    pass
"""
# The class of transformers would not turn the vectors round: where it is taken instead, scores differ.
MODELING = """\
from transformers import PreTrainedModel, XLMRobertaModel

from .configuration_tiny import TinyConfig


class TinyPreTrainedModel(PreTrainedModel):
    config_class = TinyConfig
    base_model_prefix = "roberta"


class TinyModel(XLMRobertaModel):
    config_class = TinyConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state.flip(-1)
        return output
"""


@pytest.fixture(scope="session")
def colbertv2(stanford: Checkpoint) -> Path:
    """Stanford ColBERT: bert.* and linear.weight in one file."""
    return stanford.folder


@pytest.fixture(scope="session")
def answerai_colbert_small(stanford: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stanford ColBERT as others publish it: strings for booleans, keys left out, a buffer of old releases."""
    folder = tmp_path_factory.mktemp("answerai_colbert_small") / "model"
    shutil.copytree(stanford.folder, folder)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(11)
    weights["linear.weight"] = torch.randn(12, 32)
    weights["bert.embeddings.position_ids"] = torch.arange(64)[None]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    metadata = {"doc_maxlen": 30, "dim": 12, "mask_punctuation": "True", "attend_to_mask_tokens": "False"}
    write_json(folder / "artifact.metadata", metadata)
    return folder


@pytest.fixture(scope="session")
def jina_colbert_v2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An XLM-RoBERTa of its own code, as HF_ColBERT, with markers that its tokenizer has by name."""
    folder = tmp_path_factory.mktemp("jina_colbert_v2")
    words = ["▁what", "▁is", "▁a", "▁cat", "▁"]
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -1.0) for word in words)]
    pieces += [(letter, -9.0) for letter in [*string.ascii_lowercase, *string.punctuation]]
    tokenizer = XLMRobertaTokenizer(vocab=[*pieces, ("<mask>", 0.0)], model_max_length=256)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[QueryMarker]", "[DocumentMarker]"]})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(12)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=258,
        type_vocab_size=1,
    )
    code = {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyModel"}
    write_json(folder / "config.json", config.to_dict() | {"architectures": ["HF_ColBERT"], "auto_map": code})
    weights = XLMRobertaModel(config, add_pooling_layer=False).state_dict()
    save_stanford_weights(folder, {f"roberta.{name}": weights[name] for name in weights}, width=16)
    (folder / "configuration_tiny.py").write_text(CONFIGURATION)
    (folder / "modeling_tiny.py").write_text(MODELING)
    metadata = {
        "query_maxlen": 14,
        "doc_maxlen": 40,
        "dim": 16,
        "query_token_id": "[QueryMarker]",
        "doc_token_id": "[DocumentMarker]",
        "mask_punctuation": True,
        "attend_to_mask_tokens": True,
    }
    write_json(folder / "artifact.metadata", metadata)
    return folder


@pytest.fixture(scope="session")
def colbertv2_lightonai(stanford: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An early PyLate model on BERT: one Dense, markers of the vocabulary."""
    folder = tmp_path_factory.mktemp("colbertv2_lightonai")
    AutoTokenizer.from_pretrained(stanford.folder).save_pretrained(folder)
    BertModel.from_pretrained(stanford.folder).save_pretrained(folder)
    settings = {
        "query_prefix": "[unused0]",
        "document_prefix": "[unused1]",
        "query_length": 11,
        "document_length": 22,
        "attend_to_expansion_tokens": False,
        "skiplist_words": list(string.punctuation),
    }
    write_early_pylate(folder, 24, settings)
    return folder


@pytest.fixture(scope="session")
def gte_moderncolbert(modernbert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An early PyLate model on ModernBERT: one Dense, markers added to the vocabulary with their space."""
    folder = tmp_path_factory.mktemp("gte_moderncolbert")
    tokenizer = AutoTokenizer.from_pretrained(modernbert)
    tokenizer.add_tokens(["[Q] ", "[D] "])
    tokenizer.save_pretrained(folder)
    model = ModernBertModel.from_pretrained(modernbert)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    settings = {
        "query_prefix": "[Q] ",
        "document_prefix": "[D] ",
        "query_length": 32,
        "document_length": 300,
        "attend_to_expansion_tokens": False,
        "skiplist_words": list(string.punctuation),
        "do_query_expansion": True,
    }
    write_early_pylate(folder, 16, settings)
    return folder


@pytest.fixture(scope="session")
def pylate_mlp(pylate: Checkpoint) -> Path:
    """PyLate 1.6 with two Dense layers, the first with a bias, GELU and a residual."""
    return pylate.folder


@pytest.fixture(scope="session")
def bert_base(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERT with the heads of its pretraining, 512 positions, and the names that LayerNorm had then."""
    folder = tmp_path_factory.mktemp("bert_base")
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert, model_max_length=512)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(13)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        architectures=["BertForMaskedLM"],
    )
    config.save_pretrained(folder)
    weights = BertForPreTraining(config).state_dict()
    names = {name: name for name in weights if ".decoder." not in name and "position_ids" not in name}
    for name in names:
        if "LayerNorm" in name:
            names[name] = name.replace("weight", "gamma").replace("bias", "beta")
    save_file(
        {new: weights[old] for old, new in names.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    return folder


@pytest.fixture(scope="session")
def modernbert_base(modernbert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ModernBERT with the head of its pretraining."""
    folder = tmp_path_factory.mktemp("modernbert_base")
    AutoTokenizer.from_pretrained(modernbert).save_pretrained(folder)
    torch.manual_seed(14)
    ModernBertForMaskedLM(ModernBertConfig.from_pretrained(modernbert)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ettin_32m(modernbert: Path) -> Path:
    """A ModernBERT by itself."""
    return modernbert


@pytest.fixture(scope="session")
def embeddinggemma_300m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bidirectional Gemma 3 of 2,048 positions, padding on the left, two bias-free Dense layers behind a pooling, the
    published prompts."""
    folder, backbone = tmp_path_factory.mktemp("embeddinggemma_300m"), tmp_path_factory.mktemp("gemma")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    ids = {piece: index for index, piece in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        pair="<bos> $A <eos> $B <eos>",
        special_tokens=[("<bos>", ids["<bos>"]), ("<eos>", ids["<eos>"])],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        mask_token="<mask>",
        padding_side="left",
        model_max_length=2048,
    ).save_pretrained(backbone)
    torch.manual_seed(15)
    config = Gemma3TextConfig(
        vocab_size=len(ids),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
        max_position_embeddings=2048,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        use_bidirectional_attention=True,
        pad_token_id=ids["<pad>"],
        bos_token_id=ids["<bos>"],
        eos_token_id=ids["<eos>"],
    )
    Gemma3TextModel(config).save_pretrained(backbone)
    layers = [
        Dense(32, 128, bias=False, activation_function=nn.Identity()),
        Dense(128, 32, bias=False, activation_function=nn.Identity()),
    ]
    prompts = {
        "query": "task: search result | query: ",
        "document": "title: none | text: ",
        "Classification": "task: classification | query: ",
    }
    write_sentence_transformer(folder, backbone, layers, prompts=prompts, max_seq_length=2048)
    return folder


@pytest.fixture(scope="session")
def sentence_transformer(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers model with a Dense of the library's defaults, Tanh and a bias."""
    folder = tmp_path_factory.mktemp("sentence_transformer")
    torch.manual_seed(16)
    write_sentence_transformer(folder, tiny_bert, [Dense(32, 20)], prompts={}, max_seq_length=24)
    return folder


@pytest.fixture(scope="session")
def multi_vector(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What sentence-transformers 6 saves: two Dense layers, prompts of words, an expansion to at least 9 tokens, a
    skiplist on both sides."""
    folder = tmp_path_factory.mktemp("multi_vector")
    torch.manual_seed(17)
    names: Any = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
    expansion: Any = {"strategy": "min", "attend": True, "length": 9}
    encoder = MultiVectorEncoder(
        modules=[
            Transformer(str(tiny_bert), document_length=21, query_expansion=expansion),
            Dense(32, 40, activation_function=nn.GELU(), use_residual=True, **names),
            Dense(40, 16, bias=False, activation_function=nn.Identity(), **names),
            MultiVectorMask([".", ","], skiplist_tasks=["query", "document"]),
            Normalize(module_input_name="token_embeddings"),
        ],
        prompts={"query": "what is : ", "document": ""},
        device="cpu",
    )
    encoder.save_pretrained(str(folder), create_model_card=False)
    return folder


def write_sentence_transformer(
    folder: Path, backbone: Path, layers: list[Dense], *, prompts: dict[str, str], max_seq_length: int
) -> None:
    """Transformer, Pooling, Dense layers, Normalize, as releases before 6 wrote them."""
    modules = [Transformer(str(backbone)), Pooling(32, pooling_mode="mean"), *layers, Normalize()]
    model = SentenceTransformer(modules=modules, device="cpu", prompts=prompts)
    model.save_pretrained(str(folder), create_model_card=False)
    as_published(folder)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_seq_length, "do_lower_case": False})


def write_early_pylate(folder: Path, width: int, settings: dict[str, object]) -> None:
    """Add one Dense without use_residual, and settings without model_type, to a saved backbone."""
    (folder / "1_Dense").mkdir()
    torch.manual_seed(18)
    save_file({"linear.weight": torch.randn(width, 32)}, folder / "1_Dense" / "model.safetensors")
    dense = {
        "in_features": 32,
        "out_features": width,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    write_json(folder / "1_Dense" / "config.json", dense)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Dense", "type": "pylate.models.Dense.Dense"},
    ]
    write_json(folder / "modules.json", modules)
    own: dict[str, object] = {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "MaxSim"}
    write_json(folder / "config_sentence_transformers.json", own | settings)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 7, "do_lower_case": False})


def save_stanford_weights(folder: Path, weights: dict[str, Tensor], *, width: int) -> None:
    save_file(
        weights | {"linear.weight": torch.randn(width, 32)}, folder / "model.safetensors", metadata={"format": "pt"}
    )


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
