"""A projection layer that Dense cannot say: normalised before, gated, or with dropout.

A saved model carries this file, so that stock sentence-transformers loads it with trust_remote_code=True: it may import
nothing of lateforge.
"""

import shutil
from pathlib import Path
from typing import Any, Self

from sentence_transformers.base.modules.module import Module
from torch import Tensor, nn


class Projection(Module):
    """residual(x) + dropout(activation(linear(norm(x))) * gate(norm(x))), on the vector of each token.

    activation, norm: names of classes of torch.nn, norm "none" for none. The gate and the residual are there where they
    are asked for; over unequal widths the residual is a learned, bias-free linear map. GLU variants: Shazeer 2020.
    """

    # What modules.json calls it: the file at the root of the model, wherever this class was imported from.
    __module__ = "projection"
    config_keys = ["in_features", "out_features", "bias", "activation", "norm", "gated", "dropout", "use_residual"]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        activation: str,
        norm: str,
        gated: bool,
        dropout: float,
        use_residual: bool,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bias = bias
        self.activation = activation
        self.norm = norm
        self.gated = gated
        self.dropout = dropout
        self.use_residual = use_residual
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.activation_function: nn.Module = getattr(nn, activation)()
        self.normalization: nn.Module = nn.Identity() if norm == "none" else getattr(nn, norm)(in_features)
        if gated:
            self.gate = nn.Linear(in_features, out_features, bias=bias)
        if use_residual and in_features != out_features:
            self.residual = nn.Linear(in_features, out_features, bias=False)

    def forward(self, features: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        """Replace the token embeddings (N, J, in_features) by (N, J, out_features)."""
        x = features["token_embeddings"]
        normalized = self.normalization(x)
        out = self.activation_function(self.linear(normalized))
        if self.gated:
            out = out * self.gate(normalized)
        out = nn.functional.dropout(out, self.dropout, self.training)
        if self.use_residual:
            out = out + (x if self.in_features == self.out_features else self.residual(x))
        features["token_embeddings"] = out
        return features

    def get_embedding_dimension(self) -> int:
        """The width of the vectors that come out."""
        return self.out_features

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Write config and weights into the module's folder, and this file beside modules.json, where loaders look."""
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)
        shutil.copy(__file__, Path(output_path).parent / "projection.py")

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        init_defaults: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Read back what `save` wrote, from a folder or the Hub."""
        hub: dict[str, Any] = {
            "subfolder": subfolder,
            "token": token,
            "cache_folder": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
        }
        module = cls(**cls.load_config(model_name_or_path, **hub))
        loaded: Self = cls.load_torch_weights(model_name_or_path, model=module, **hub)
        return loaded
