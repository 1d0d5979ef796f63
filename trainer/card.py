"""The model card: what a model is, how good it was before and after, what made it, and how to load it."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from omegaconf import OmegaConf

from configs.schema import Config
from trainer.environment import versions


def model_card(
    config: Config,
    *,
    modules: Sequence[tuple[str, str, int]],
    facts: Mapping[str, str],
    result: Mapping[str, Any],
    loading: Mapping[str, str],
    command: str,
    best: bool = False,
) -> str:
    """README.md of a model.

    modules: class, what it does and parameters of each; facts: the start-up table; result: what result.json holds;
    loading: by library, the lines of Python, or why it cannot hold the model; command: what made it; best: of the
    model in result["best"], of which the one score is known that chose it, instead of the last.
    """
    after, before, change, step = result["after"], result["before"], result["change"], result["steps"]
    if best:
        watched, change, step = config.evaluation.metric.name, None, result["best"]["step"]
        after = {watched: result["best"][watched]}
    name, data = config.backbone.name, config.data
    hub = not name.startswith("package:") and not Path(name).exists()
    metadata = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["ColBERT", "late-interaction", "multi-vector", "lateforge"],
        base_model=name if hub else None,
        model_name=config.name if after else None,
        eval_results=[
            EvalResult(
                task_type="retrieval",
                dataset_type=data.format.name,
                dataset_name=f"{facts['evaluation']} of {data.evaluation_path or data.path or data.format.name}",
                metric_type=metric,
                metric_value=value,
            )
            for metric, value in (after or {}).items()
        ]
        or None,
    )
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {config.name}",
        f"A late-interaction retriever: `{name}` trained by lateforge on {facts['data']}.",
        "## Scores",
    ]
    if after and before:
        rows = [
            (metric, f"{before[metric]:.4f}", f"{value:.4f}", f"{value - before[metric]:+.4f}")
            for metric, value in after.items()
        ]
        parts += [
            f"On {facts['evaluation']}:",
            _table(("metric", "before", f"after step {step}", "change"), rows),
        ]
        if change is not None:
            parts += [
                f"Change of {change['metric']}: {change['change']:+.4f}, 95 % interval over the queries "
                f"{change['low']:+.4f} to {change['high']:+.4f}.",
            ]
    else:
        parts += ["The run held nothing out, so nothing is known of its quality."]
    parts += ["## Model", _table(("module", "what it does", "parameters"), [(a, b, f"{c:,}") for a, b, c in modules])]
    parts += ["## How to load it"]
    for library, lines in loading.items():
        parts += [f"**{library}**" if "\n" in lines else f"**{library}**: {lines}"]
        parts += [f"```python\n{lines}\n```"] if "\n" in lines else []
    keys = OmegaConf.to_yaml(OmegaConf.structured(config))
    made_with = ", ".join(f"{package} {number}" for package, number in versions().items() if package != "python")
    parts += [
        "## How it was made",
        f"```\n{command}\n```",
        _table(("", ""), list(facts.items())),
        f"{result['steps']} steps, {result['seconds']:.0f} seconds on {platform.machine()}, Python "
        f"{platform.python_version()}, {made_with}.",
        f"<details><summary>Every key of the run</summary>\n\n```yaml\n{keys}```\n\n</details>",
    ]
    return "\n\n".join(parts) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
