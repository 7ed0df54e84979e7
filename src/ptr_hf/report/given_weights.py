"""What a run's weights were, where they were known before training, in sentences."""

from collections.abc import Mapping
from typing import Any

from ptr_hf.report.text import visible


def weight_sentences(record: Mapping[str, Any]) -> list[str]:
    """Where the weights come from, and what they do to the data.

    Args:
        record: of the run's weights, as its checkpoint holds it; empty where it is not known.
    """
    if not record:
        return ["The weights were known before training; where they come from is not recorded."]
    file, sha256 = visible(str(record["file"])), str(record["sha256"])[:12]
    origin = (
        f"The demonstrations were inspected before training, and the weights are in {file}."
        if record["origin"] == "inspection"
        else f"The weights are those of the file {file} (sha256 {sha256}…), known before training."
    )
    if record["smallest"] == record["largest"] == 1.0:
        return [origin, "Every weight is 1, so this run trained as plain post-training does, bit for bit."]
    sentences = [
        origin,
        f"{record['below']:.1%} of the chunks weigh less than 1, in {record['episodes_below']:.1%} of the episodes: "
        f"{record['moved']:.1%} of the weight moves to the others.",
        f"The weights leave an effective sample size of {record['effective_sample_size']:.1%} of the chunks, between "
        f"{record['smallest']:.3g} and {record['largest']:.3g} (mean {record['mean']:.3g}).",
    ]
    return sentences


OPTIONS = ("preset", "weights", "alpha", "weight_min", "standardize_by", "chunk_size", "segment_length", "chunk_stride")
"""Hyperparameters that count in a run whose weights were known before training."""


def given_options(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's hyperparameters those that count where weights were known before training."""
    return {name: hyperparameters[name] for name in OPTIONS if name in hyperparameters}
