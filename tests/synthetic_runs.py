"""Dynamics shaped like a real run's: the curves METHOD.md gives for the paper, with a logger's noise."""

import numpy as np

from ptr_hf.report.dynamics import weight_bin_edges, weight_histogram

CHANCE = 1.0 / 88.0


def ptr_rows(rows: int = 300, total: int = 6000, warmup: float = 0.05, seed: int = 0) -> list[dict]:
    """Accuracy rises and plateaus, T settles near 3, τ falls to its bound, weights spread after the warm-up."""
    draw = np.random.default_rng(seed)
    edges = weight_bin_edges(0.25, 4.0)
    logged = []
    for row in range(1, rows + 1):
        t = row / rows
        accuracy = float(np.clip(0.62 * (1 - np.exp(-5 * t)) + draw.normal(0, 0.02), 0.0, 1.0))
        score = 3.2 * (1 - np.exp(-6 * t)) + draw.normal(0, 0.08)
        temperature = max(0.03, 0.12 * 0.995 ** (260 * t))
        beta = max(1.2, 1.5 * 0.995 ** (45 * t))
        scores = draw.normal(score - 1.5, 1.1, size=256)
        weight = np.ones(256) if t <= warmup else np.clip(np.exp(scores / beta), 0.25, 4.0)
        logged.append(
            {
                "step": round(total * t),
                "loss": 0.9 * np.exp(-4 * t) + 0.25 + draw.normal(0, 0.02),
                "loss_action": 0.8 * np.exp(-5 * t) + 0.05 + draw.normal(0, 0.008),
                "loss_identification": 4.4 - score,
                "loss_ranking": 0.69 * np.exp(-4 * t),
                "loss_tokenizer": 0.0004,
                "accuracy": accuracy,
                "margin": 6.0 * t - 0.8 + draw.normal(0, 0.2),
                "score": score,
                "weight_mean": weight.mean(),
                "weight_min": weight.min(),
                "weight_max": weight.max(),
                "weight_at_floor": float((weight <= 0.25).mean()),
                "weight_at_ceiling": float((weight >= 4.0).mean()),
                "effective_sample_size": float(weight.sum() ** 2 / (256 * (weight**2).sum())),
                "valid_target_ratio": 0.9,
                "temperature": temperature,
                "beta": beta,
                "hard_negative_ratio": 0.5 * float(np.clip((accuracy - 0.1) / 0.4, 0, 1)),
                "belief_entropy": 0.4 * np.exp(-4 * t) + 0.04 + draw.normal(0, 0.006),
                "belief_diversity": 0.3 * np.exp(-2 * t),
                "weight_histogram": weight_histogram(weight, edges).tolist(),
                "weight_bin_edges": edges.tolist(),
            }
        )
    return logged


def sft_rows(rows: int = 300, total: int = 6000, seed: int = 1) -> list[dict]:
    """Plain post-training logs its loss and nothing of the scorer."""
    draw = np.random.default_rng(seed)
    losses = [0.8 * np.exp(-4.5 * row / rows) + 0.06 + draw.normal(0, 0.008) for row in range(1, rows + 1)]
    steps = [round(total * row / rows) for row in range(1, rows + 1)]
    return [
        {"step": step, "loss": loss, "loss_action": loss, "weight_mean": 1.0}
        for step, loss in zip(steps, losses, strict=True)
    ]


def sourced_rows(rows: int = 150, total: int = 6000, warmup: float = 0.05, seed: int = 3) -> list[dict]:
    """A PTR run on a mixture of three sources, the last of which the scorer comes to trust less, and of two tasks."""
    draw = np.random.default_rng(seed)
    names, mixture, quality = ("so101_bench", "franka_lab", "aloha_play"), (0.6, 0.3, 0.1), (0.3, 0.9, -1.6)
    logged = ptr_rows(rows, total, warmup, seed)
    for number, row in enumerate(logged):
        of = draw.choice(3, size=320, p=mixture)
        score = draw.normal(np.array(quality)[of] * min(1.0, 2 * number / rows) + 1.0, 1.0)
        weight = np.ones(320) if number < warmup * rows else np.clip(np.exp(score / 1.3), 0.25, 4.0)
        task = np.where(draw.random(320) < 0.7, "stack the cups", "fold the towel")
        row["share_bound"] = 16.0
        row["sources"] = [_group(name, of == place, weight, score) for place, name in enumerate(names)]
        row["tasks"] = [_group(name, task == name, weight, score) for name in ("stack the cups", "fold the towel")]
    return logged


def _group(name: str, own: np.ndarray, weight: np.ndarray, score: np.ndarray) -> dict:
    return {
        "name": name,
        "chunks": int(own.sum()),
        "targets": int(own.sum()),
        "share": float(own.mean()),
        "weight_share": float(weight[own].sum() / weight.sum()),
        "weight": float(weight[own].mean()),
        "score": float(score[own].mean()),
        "loss": 0.2,
        "at_floor": float((weight[own] <= 0.25).mean()),
        "at_ceiling": float((weight[own] >= 4.0).mean()),
    }
