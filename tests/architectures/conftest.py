"""The checkpoints that these tests load."""

from tests.checkpoints import (
    embeddinggemma,
    modernbert,
    pylate,
    pylate_without_type,
    sentence_bert,
    stanford,
    xlm_roberta,
)

__all__ = ["embeddinggemma", "modernbert", "pylate", "pylate_without_type", "sentence_bert", "stanford", "xlm_roberta"]
